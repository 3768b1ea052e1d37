#!/usr/bin/env python3
"""Time to first token of a conversation that a killed server left on disk, against a cold prefill.

    cargo build --release
    benches/restart.py --model qwen2.5-coder-0.5b --tokens 500 4000

Starts the server without KV on disk and with it, in turn. Cold: the first request of a fresh server.
Resumed: the same prompt after SIGKILL in mid-generation and a restart. Medians over --repeats, each
with a prompt of its own; the servers' warm-up request shares nothing with it. Only the standard
library is needed.
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Server:
    def __init__(self, arguments, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [arguments.binary, "serve", "--model", arguments.model, "--port", str(port), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(self.url + "/v1/models", timeout=10) as answer:
                    self.model = json.load(answer)["data"][0]["id"]
                break
            except urllib.error.URLError:
                assert self.process.poll() is None and time.monotonic() - began < 300, "the server does not start"
                time.sleep(0.1)
        self.post("/v1/completions", {"prompt": "warm up", "max_tokens": 2})

    def open(self, path, body):
        data = json.dumps(body | {"model": self.model, "temperature": 0}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=600)

    def post(self, path, body):
        with self.open(path, body) as answer:
            return json.load(answer)

    def first_token(self, prompt, kill_after=None):
        """Seconds to the first token, tokens found in the cache, and the text of 16 tokens."""
        began, first, text, cached = time.monotonic(), None, [], None
        options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        body = {"prompt": prompt, "max_tokens": 400 if kill_after else 16, **options}
        with self.open("/v1/completions", body) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("choices"):
                    first = first or time.monotonic() - began
                    text.append(event["choices"][0]["text"])
                if event.get("usage"):
                    cached = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                if kill_after and len(text) == kill_after:
                    self.stop(signal.SIGKILL)
                    break
        return first, cached, "".join(text)

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait()


def prompt(server, tokens, repeat):
    files = sorted((ROOT / "crates").glob("*/src/*.rs"))
    text = f"// Repeat {repeat}\n" + "".join(path.read_text() for path in files[repeat:])
    return server.post("/tokenize", {"content": text})["tokens"][:tokens]


def leave_page_cache(folder):
    os.sync()
    for path in pathlib.Path(folder).glob("*.kv"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(arguments, count, repeat):
    """One prompt of `count` tokens: cold, cold with KV written behind, and resumed after a kill."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        data = ("--data-dir", os.path.join(folder, "data"))
        flags = (*data, "--kv-disk", "8GiB", "--kv-dir", os.path.join(folder, "kv"))
        server = Server(arguments, *data)
        tokens = prompt(server, count, repeat)
        cold, _, wanted = server.first_token(tokens)
        server.stop()
        server = Server(arguments, *flags)
        writing, _, _ = server.first_token(tokens, kill_after=8)
        if arguments.cold_disk:
            leave_page_cache(os.path.join(folder, "kv"))
        server = Server(arguments, *flags)
        resumed, cached, text = server.first_token(tokens)
        server.stop()
    assert text == wanted, "the resumed answer differs"
    return {"tokens": len(tokens), "cold_s": cold, "cold_while_writing_s": writing, "resumed_s": resumed,
            "cached_tokens": cached}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--binary", default=str(ROOT / "target" / "release" / "rudder"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4000], help="lengths of prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="parent of the folder for KV, on the disk to measure")
    parser.add_argument("--cold-disk", action="store_true",
                        help="have the files leave the page cache between kill and restart, as a reboot would")
    parser.add_argument("--output", help="file for the result as JSON")
    arguments = parser.parse_args()
    rows, medians = [], []
    for count in arguments.tokens:
        for repeat in range(arguments.repeats):
            rows.append(row := measure(arguments, count, repeat))
            print(f"repeat {repeat}: cold {row['cold_s']:.3f} s, with KV written behind "
                  f"{row['cold_while_writing_s']:.3f} s, resumed {row['resumed_s']:.3f} s with "
                  f"{row['cached_tokens']} of {row['tokens']} tokens from disk", flush=True)
        middle = {key: statistics.median(row[key] for row in rows[-arguments.repeats:]) for key in rows[0]}
        medians.append(middle | {"faster": middle["cold_s"] / middle["resumed_s"]})
        print(f"median of {count} tokens: cold {middle['cold_s']:.3f} s, resumed {middle['resumed_s']:.3f} s: "
              f"{medians[-1]['faster']:.1f} times as fast", flush=True)
    if arguments.output:
        result = {"model": arguments.model, "cold_disk": arguments.cold_disk, "cpus": os.cpu_count(),
                  "load": os.getloadavg(), "rows": rows, "medians": medians}
        pathlib.Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
