#!/usr/bin/env python3
"""Measures what drafts are worth: the same greedy answers with and without them, one stream.

    benches/drafts.py --rudder target/release/rudder --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

Edit turns ask for a source file back with one change, once as it is and once with the file as
`prediction`; free turns ask for prose and new code. Decoding speed is tokens after the first over the
time from first to last. Answers must be equal with and without, or the script fails.
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "crates/scheduler/src/block_pool.rs"
EDITS = [
    "Rename the function `allocate` to `take`.",
    "Add a comment line `// Checked by the caller.` above the function `retain`.",
]
FREE = [
    "Explain in some 200 words how a hash map resolves collisions.",
    "Write a Python function that merges overlapping intervals, with three examples.",
]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--rudder", default=str(ROOT / "target/release/rudder"))
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--edit-tokens", type=int, default=1600)
    options = arguments.parse_args()
    figures = {}
    for repeat in range(options.repeats):
        # Each repeat in the other order, so that drift favours neither.
        for mode in ["off", "lookup"][:: -1 if repeat % 2 else 1]:
            with Server(options.rudder, options.model, mode) as server:
                for name, body in turns(options.edit_tokens):
                    figures.setdefault(name, {}).setdefault(mode, []).append(server.ask(body))
    print("| turn | tokens | off, tok/s | lookup, tok/s | ratio | accepted of drafted |")
    print("|---|---|---|---|---|---|")
    for name, modes in figures.items():
        texts = {run["text"] for runs in modes.values() for run in runs}
        if len(texts) != 1:
            sys.exit(f"{name}: the answers differ")
        speed = {mode: statistics.median(run["speed"] for run in runs) for mode, runs in modes.items()}
        last = modes["lookup"][-1]
        print(f"| {name} | {last['tokens']} | {speed['off']:.1f} | {speed['lookup']:.1f} "
              f"| {speed['lookup'] / speed['off']:.2f} | {last['accepted']:.0f} of {last['drafted']:.0f} |")


def turns(edit_tokens):
    source = FILE.read_text()
    for edit in EDITS:
        ask = f"{edit} Answer with the whole file and nothing else.\n\n```rust\n{source}```"
        yield f"edit: {edit}", body(ask, edit_tokens)
    predicted = {"type": "content", "content": f"```rust\n{source}```"}
    yield "edit with prediction", body(ask, edit_tokens) | {"prediction": predicted}
    for free in FREE:
        yield f"free: {free}", body(free, 256)


def body(text, tokens):
    return {
        "model": "any", "messages": [{"role": "user", "content": text}], "temperature": 0,
        "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True},
    }


class Server:
    """Rudder with drafts or without, in a process of its own."""

    def __init__(self, rudder, model, mode):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [rudder, "serve", "--model", model, "--draft", mode, "--port", str(self.port), "--alias", "any"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        for _ in range(600):
            try:
                self.get("/health")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        sys.exit("the server does not start")

    def __exit__(self, *_):
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait()

    def get(self, path):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5).read().decode()

    def counter(self, name):
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"rudder_{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def ask(self, body):
        counters = ["spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"]
        before = [self.counter(name) for name in counters]
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        text, times, tokens = "", [], 0
        with urllib.request.urlopen(request, timeout=600) as response:
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
