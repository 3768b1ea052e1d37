#!/usr/bin/env python3
"""Measures what drafts are worth: the same greedy answers with and without them, one stream.

    benches/drafts.py --rudder target/release/rudder --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

Edit turns ask for `drafts_source.py` back with one change, once with the file as `prediction` too; free
turns ask for prose and new code; sibling turns ask what their session was asked before, in the same words
(a retry) or in others. Two servers, one with drafts and one without, are asked in turn, in alternating
order. Decoding speed is tokens after the first over the time from the first to the last; the ratio is
the median of the pairs'. Answers must be equal with and without, or the script fails. With `--draft-model MODEL` a
third server has that draft model too.

With `--record FOLDER` nothing is measured: the tokens of every turn, the prompt's on one line and the
answer's on the next, are written there, for the engine's tests to replay.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = (HERE / "drafts_source.py").read_text()
EDITS = {
    "rename a method": "Rename the method `touches` to `involves`, also where it is called.",
    "change a constant": "Change MAX_ENTRIES to 50_000.",
    "add type hints": "Add type hints to all methods of this file.",
    "add a docstring": 'Give the method `accounts` the docstring """All names, sorted.""".',
}
FREE = {
    "explain": "Explain in some 300 words how a hash map resolves collisions.",
    "new code": "Write a Python function that merges overlapping intervals, with three examples.",
    "story": "Tell a story of a lighthouse keeper and a whale.",
    "list": "Which ten books on software engineering would you recommend, and why?",
}
AGAIN = {
    "retry": ("Tell a story of a clockmaker and a fox.", "Tell a story of a clockmaker and a fox."),
    "other words": (
        "Write a Python class for a queue with a capacity: push, pop, peek, len.",
        "Write a Python class `Queue` with a capacity and the methods push, pop, peek and len. Add docstrings.",
    ),
}
MODES = {"off": ["--draft", "off"], "lookup": []}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--rudder", default=str(HERE.parent / "target/release/rudder"))
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--draft-model")
    arguments.add_argument("--pairs", type=int, default=5)
    arguments.add_argument("--edit-tokens", type=int, default=900)
    arguments.add_argument("--free-tokens", type=int, default=256)
    arguments.add_argument("--json", type=pathlib.Path, help="write all figures there")
    arguments.add_argument("--record", type=pathlib.Path, help="write the turns' tokens to this folder")
    options = arguments.parse_args()
    if options.record:
        return record(options)
    if options.draft_model:
        MODES["model"] = ["--draft-model", options.draft_model]
    figures = {name: [] for name, _ in turns(options)}
    with contextlib.ExitStack() as running:
        servers = {mode: running.enter_context(Server(options, mode)) for mode in MODES}
        for pair in range(options.pairs):
            for server in servers.values():
                for name, (before, _) in AGAIN.items():
                    server.ask(session(f"{name} {pair}", before, options))
            for name, body in turns(options, pair):
                order = list(MODES)[:: -1 if pair % 2 else 1]
                figures[name].append({mode: servers[mode].ask(body) for mode in order})
    report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def turns(options, pair=0):
    """Names and requests of a pair."""
    for name, edit in EDITS.items():
        ask = f"{edit} Answer with the whole file in one code block and nothing else.\n\n```python\n{SOURCE}```"
        yield f"edit: {name}", body(ask, options.edit_tokens)
    predicted = {"type": "content", "content": f"```python\n{SOURCE}```"}
    yield f"edit: {name}, with `prediction`", body(ask, options.edit_tokens) | {"prediction": predicted}
    for name, ask in FREE.items():
        yield f"free: {name}", body(ask, options.free_tokens)
    for name, (_, ask) in AGAIN.items():
        yield f"sibling: {name}", session(f"{name} {pair}", ask, options)


def session(name, ask, options):
    """A turn of a session of this name."""
    return body(ask, options.free_tokens) | {"prompt_cache_key": name}


def body(text, tokens):
    return {
        "model": "any", "messages": [{"role": "user", "content": text}], "temperature": 0,
        "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True},
    }


def record(options):
    with Server(options, "off") as server:
        for name, asked in turns(options):
            asked |= {"stream": False, "return_token_ids": True}
            del asked["stream_options"]
            answer = json.loads(server.post(asked).read())
            tokens = [answer["prompt_token_ids"], answer["choices"][0]["token_ids"]]
            file = options.record / (re.sub(r"\W+", "-", name).strip("-") + ".tokens")
            file.write_text("".join(" ".join(map(str, line)) + "\n" for line in tokens))


def report(figures):
    print("| turn | tokens | without, tok/s |" + " with, tok/s | ratio | accepted of drafted |" * (len(MODES) - 1))
    print("|---|---|---|" + "---|---|---|" * (len(MODES) - 1))
    for name, pairs in figures.items():
        if len({run.pop("text") for pair in pairs for run in pair.values()}) != 1:
            sys.exit(f"{name}: the answers differ")
        speed = {mode: statistics.median(pair[mode]["speed"] for pair in pairs) for mode in MODES}
        row = f"| {name} | {pairs[-1]['off']['tokens']} | {speed['off']:.1f} |"
        for mode in list(MODES)[1:]:
            ratio = statistics.median(pair[mode]["speed"] / pair["off"]["speed"] for pair in pairs)
            last = pairs[-1][mode]
            row += f" {speed[mode]:.1f} | {ratio:.2f} | {last['accepted']:.0f} of {last['drafted']:.0f} |"
        print(row)


class Server:
    """Rudder with drafts or without, in a process of its own."""

    def __init__(self, options, mode):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.data = tempfile.TemporaryDirectory()
        command = [options.rudder, "serve", "--model", options.model, *MODES[mode], "--kv-memory", "256MiB",
                   "--port", str(self.port), "--alias", "any", "--data-dir", self.data.name]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        for _ in range(600):
            try:
                self.get("/ready")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        self.__exit__()
        sys.exit("the server does not start")

    def __exit__(self, *_):
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait()
        self.data.cleanup()

    def get(self, path):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5).read().decode()

    def counter(self, name):
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"rudder_{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def post(self, body):
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=600)

    def ask(self, body):
        counters = ["spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"]
        before = [self.counter(name) for name in counters]
        text, times, tokens = "", [], 0
        with self.post(body) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    if choice["delta"].get("content"):
                        text += choice["delta"]["content"]
                        times.append(time.monotonic())
        drafted, accepted = (self.counter(name) - past for name, past in zip(counters, before))
        speed = (tokens - 1) / (times[-1] - times[0])
        return {"text": text, "tokens": tokens, "speed": speed, "drafted": drafted, "accepted": accepted}


if __name__ == "__main__":
    main()
