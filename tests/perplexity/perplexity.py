#!/usr/bin/env python3
"""Compares Rudder's perplexity on a fixed text of code with llama.cpp's, on the same model file.

    tests/perplexity/perplexity.py --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --llama-perplexity PATH

Both score the same tokens in the same way, llama.cpp's: the text is cut into windows of 2,000 tokens, and of
each window the second half counts, every token given all that is before it in the window. Rudder is asked over
HTTP (`/v1/completions` with `echo` and `logprobs`), llama.cpp's `llama-perplexity` reads the file. The exit status
is 1 if they differ by more than `--tolerance`. Only the standard library is needed.
"""

import argparse
import contextlib
import datetime
import gzip
import hashlib
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TEXT = HERE / "code.txt.gz"  # sources of this repository, joined
TEXT_SHA256 = "f663fc06a4d390985b991818aa76c5065ddbb7231eda33447cf8187008241b69"


def main():
    args = parse_arguments()
    text = gzip.decompress(TEXT.read_bytes())
    if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
        sys.exit(f"{TEXT} is not the text that earlier figures are of; restore it")
    ours, scored = rudder(args, text.decode())
    print(f"Rudder     {ours:.4f}  over {scored} tokens", file=sys.stderr)
    figures = {"date": datetime.date.today().isoformat(), "model": pathlib.Path(args.model).name,
               "text_sha256": TEXT_SHA256, "windows": args.windows, "window": args.window,
               "tokens_scored": scored, "rudder": ours}
    if args.llama_perplexity:
        theirs = llama(args, text)
        print(f"llama.cpp  {theirs:.4f}  Rudder is {ours / theirs - 1:+.3%}", file=sys.stderr)
        figures |= {"llama.cpp": theirs, "difference": ours / theirs - 1, "tolerance": args.tolerance}
    print(json.dumps(figures))
    if args.llama_perplexity and abs(ours / theirs - 1) > args.tolerance:
        sys.exit(1)


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True, help="GGUF file, or for Rudder alone a Hugging Face folder")
    p.add_argument("--rudder", default=str(ROOT / "target/release/rudder"), help="rudder binary")
    p.add_argument("--llama-perplexity", help="llama-perplexity binary; without it Rudder is measured alone")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--window", type=int, default=2000, help="tokens of a window")
    p.add_argument("--windows", type=int, default=10)
    p.add_argument("--tolerance", type=float, default=0.005, help="allowed relative difference")
    return p.parse_args()


# ------------------------------------------------------------------ Rudder


def rudder(args, text):
    """Perplexity, and the number of tokens it is of."""
    with server(args) as url:
        tokens = post(url, "/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
        needed = args.window * args.windows
        if len(tokens) < needed:
            sys.exit(f"the text has {len(tokens)} tokens, {args.windows} windows need {needed}; ask for fewer")
        total, scored = 0.0, 0
        for start in range(0, needed, args.window):
            window = tokens[start:start + args.window]
            # A window's first half is context. llama.cpp leaves out one token more, the first of the second half.
            logprobs = score(url, window)[args.window // 2 + 1:]
            total -= sum(logprobs)
            scored += len(logprobs)
            print(f"  {start + args.window} tokens: {math.exp(total / scored):.4f}", file=sys.stderr)
        return math.exp(total / scored), scored


def score(url, tokens):
    """The log-probability of every token given those before it."""
    answer = post(url, "/v1/completions", {
        "prompt": tokens, "echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0})
    return answer["choices"][0]["logprobs"]["token_logprobs"]


@contextlib.contextmanager
def server(args):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [args.rudder, "serve", "--model", args.model, "--threads", str(args.threads), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield url
        finally:
            process.terminate()
            process.wait()


def wait_for(url, process, log):
    for _ in range(1200):
        if process.poll() is not None:
            log.seek(0)
            sys.exit(f"rudder ended: {log.read().decode(errors='replace')[-500:]}")
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=10):
                return
        except OSError:
            time.sleep(0.1)
    sys.exit("rudder is not ready after two minutes")


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        sys.exit(f"{path}: {e.code} {e.read().decode(errors='replace')[:500]}")


# --------------------------------------------------------------- llama.cpp


def llama(args, text):
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(text)
        file.flush()
        command = [args.llama_perplexity, "-m", args.model, "-f", file.name, "-t", str(args.threads), "-c",
                   str(args.window), "--chunks", str(args.windows)]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
    if done.returncode or not found:
        sys.exit(f"llama-perplexity failed: {(done.stdout + done.stderr)[-500:]}")
    return float(found.group(1))


if __name__ == "__main__":
    main()
