"""A model over two processes answers as over two ranks of one, ends clearly when one of them dies, and takes in nobody who has another model."""

import concurrent.futures
import os
import signal
import socket
import subprocess

import openai
import pytest

from conftest import BINARY, MODEL

RANKS = ("--device", "cpu", "--tensor-parallel-size", "2")
PROMPTS = ["def add(a, b):\n    return", "fn main() {\n" * 20, "class Stack:\n    def __init__(self):\n"]


class Node:
    """`rudder serve` as node 1."""

    def __init__(self, log, port, model=(MODEL,)):
        self.log = log
        flags = (*RANKS, "--threads", "1", "--nnodes", "2", "--node-rank", "1", "--master-port", str(port))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RUDDER_") or k == "RUDDER_CACHE"}
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [BINARY, "serve", "--model", *model, *flags], stdout=output, stderr=output, env=environment
            )

    def ended(self, seconds=60):
        """Waits for the end; the exit status and what was logged."""
        return self.process.wait(seconds), self.log.read_text()


@pytest.fixture
def nodes(start, tmp_path):
    """Starts node 1, and then node 0 as a server; their port in between."""
    others = []

    def nodes(before=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if before:
            others.append(Node(tmp_path / "before.txt", port, before))
        leader = ("--nnodes", "2", "--master-port", str(port), *RANKS, "--threads", "1")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            server = pool.submit(start, *leader)
            if before:
                others[0].process.wait(60)
            others.append(Node(tmp_path / "node.txt", port))
            return server.result(), *reversed(others)

    yield nodes
    for node in others:
        if node.process.poll() is None:
            node.process.kill()
            node.process.wait()


def answers(server):
    """The choices for all prompts, asked all at once."""
    options = {"max_tokens": 48, "logprobs": 2, "extra_body": {"ignore_eos": True}}
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: server.complete(prompt, **options).choices[0], PROMPTS))


def test_two_nodes_answer_as_two_ranks_of_one_process(start, nodes):
    ranks = start(*RANKS, "--threads", "2")
    server, node = nodes()
    # One at a time first: what runs beside an answer does not change it, but decides how its prompt is cut.
    for prompt in PROMPTS:
        one, two = (s.complete(prompt, max_tokens=64, logprobs=1).choices[0] for s in (ranks, server))
        assert (one.text, one.logprobs.token_logprobs) == (two.text, two.logprobs.token_logprobs)
    for one, two in zip(answers(ranks), answers(server), strict=True):
        assert (one.text, one.logprobs.token_logprobs) == (two.text, two.logprobs.token_logprobs)
    # In good order.
    assert server.stop() == 0
    status, log = node.ended()
    assert status == 0 and "node 0 has ended" in log, log


def test_a_node_that_is_killed_fails_what_runs_and_ends_the_server(nodes):
    server, node = nodes()
    stream = server.openai.completions.create(model=server.model, prompt="Once", max_tokens=2000, stream=True)
    next(iter(stream))
    node.process.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError, match="node 1 at 127.0.0.1 is gone"):
        for _ in stream:
            pass
    assert server.process.wait(30) != 0
    assert "node 1 at 127.0.0.1 is gone: " in server.log.read_text()
    assert "start all nodes again" in server.log.read_text()


def test_a_node_that_is_killed_while_nothing_runs_ends_the_server(nodes):
    server, node = nodes()
    node.process.send_signal(signal.SIGKILL)
    assert server.process.wait(30) != 0
    assert "node 1 at 127.0.0.1 is gone: " in server.log.read_text()


def test_a_node_that_loses_node_0_ends_with_the_reason(nodes):
    server, node = nodes()
    server.process.send_signal(signal.SIGKILL)
    status, log = node.ended()
    assert status != 0 and "node 0 at 127.0.0.1" in log and "is gone" in log, log


def test_a_node_with_another_model_is_refused_and_the_right_one_taken(nodes):
    # Random weights in another model's shape: there is no second model here.
    server, node, refused = nodes(before=("qwen3-8b", "--load-format", "dummy"))
    status, log = refused.ended()
    assert status != 0 and "model is qwen3" in log and "on node 1 and qwen2" in log, log
    assert server.complete("def add(a, b):").choices[0].text
    assert node.process.poll() is None
