"""Starts the real server with the real model for the tests, and knows how to ask it.

RUDDER_BIN is the binary (default: target/release/rudder), RUDDER_MODEL the model (default: the
catalog's qwen2.5-coder-0.5b, or a GGUF file).
"""

import os
import pathlib
import re
import signal
import socket
import subprocess
import time

import httpx
import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BINARY = os.environ.get("RUDDER_BIN", str(TARGET / "release" / "rudder"))
MODEL = os.environ.get("RUDDER_MODEL", "qwen2.5-coder-0.5b")
START_SECONDS = 120

SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(\{.*\})? (\S+)$")


class Server:
    """One `rudder serve` process on a free port."""

    def __init__(self, log, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        if "--data-dir" not in flags:
            flags = (*flags, "--data-dir", str(log.with_suffix(".data")))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RUDDER_") or k == "RUDDER_CACHE"}
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [BINARY, "serve", "--model", MODEL, "--host", "127.0.0.1", "--port", str(port), *flags],
                stdout=output,
                stderr=output,
                env=environment,
            )
        self.http = httpx.Client(base_url=self.url, timeout=300)
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=300)
        self._wait_ready()
        self.model = self.openai.models.list().data[0].id

    def _wait_ready(self):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if self.http.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"not ready after {START_SECONDS} s:\n{self.log.read_text()}")

    def stop(self, how=signal.SIGTERM, seconds=60):
        """Signals the process and returns its exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def metrics(self):
        """Sums of all samples of each metric name, labels put aside."""
        sums = {}
        for line in self.http.get("/metrics").text.splitlines():
            if sample := SAMPLE.match(line):
                sums[sample[1]] = sums.get(sample[1], 0.0) + float(sample[3])
        return sums

    def wait_idle(self, seconds=10):
        """Waits until nothing runs or waits; returns the metrics then."""
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            if metrics["vllm:num_requests_running"] == 0 and metrics["vllm:num_requests_waiting"] == 0:
                return metrics
            assert time.monotonic() < end, f"still busy after {seconds} s"
            time.sleep(0.05)

    def chat(self, content, **options):
        """One chat answer to one user message; greedy and short unless told otherwise."""
        options = {"temperature": 0, "max_tokens": 24} | options
        messages = [{"role": "user", "content": content}]
        return self.openai.chat.completions.create(model=self.model, messages=messages, **options)

    def complete(self, prompt, **options):
        """One completion; greedy and short unless told otherwise."""
        options = {"temperature": 0, "max_tokens": 24} | options
        return self.openai.completions.create(model=self.model, prompt=prompt, **options)

    def tokenize(self, text):
        """Token ids of plain text."""
        answer = self.http.post("/tokenize", json={"content": text})
        assert answer.status_code == 200, answer.text
        return answer.json()["tokens"]

    def detokenize(self, tokens):
        """Text of token ids."""
        answer = self.http.post("/detokenize", json={"tokens": tokens})
        assert answer.status_code == 200, answer.text
        return answer.json()["content"]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The server most tests share, as a user starts it."""
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    assert server.process.poll() is None, f"the server died during the tests:\n{server.log.read_text()}"
    assert server.stop() == 0


@pytest.fixture
def start(tmp_path):
    """Starts servers of a test's own, with the flags it gives."""
    servers = []

    def start(*flags):
        servers.append(Server(tmp_path / f"log{len(servers)}.txt", *flags))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)
