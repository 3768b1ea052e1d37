"""Writes greedy-qwen2.5-coder-0.5b.json: what llama.cpp answers greedily, token by token.

    python make_greedy.py --url http://127.0.0.1:8080 --model FILE.gguf > greedy-qwen2.5-coder-0.5b.json

The server is llama.cpp's, on one thread so that its own sums keep one order, with its KV cache in f32:
    llama-server -m FILE.gguf -t 1 -c 4096 -np 1 -ctk f32 -ctv f32 -fa off --port 8080

Every prompt of prompts.json is sent twice, as it is and through the model's chat template. A case
holds the prompt's token ids and, for each of up to 64 steps, the chosen id and the five likeliest ids
with their log-probabilities. A case shorter than 64 ends with the model's end-of-turn token.
"""

import argparse
import hashlib
import json
import pathlib
import urllib.request

STEPS = 64


def post(url, path, body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def greedy(url, prompt):
    """One greedy run from token ids, as [[id, [ids], [logprobs]], ...]."""
    answer = post(
        url,
        "/completion",
        {
            "prompt": prompt,
            "n_predict": STEPS,
            "n_probs": 5,
            "return_tokens": True,
            "cache_prompt": False,
            "samplers": ["top_k"],
            "top_k": 1,
        },
    )
    steps = []
    for step in answer["completion_probabilities"]:
        top = step["top_logprobs"]
        steps.append([step["id"], [t["id"] for t in top], [round(t["logprob"], 4) for t in top]])
    return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="the GGUF file the server runs, for its SHA-256")
    args = parser.parse_args()

    prompts = json.loads((pathlib.Path(__file__).parent / "prompts.json").read_text())
    cases = []
    for prompt in prompts:
        chat = post(
            args.url, "/apply-template", {"messages": [{"role": "user", "content": prompt["chat"]}]}
        )["prompt"]
        for kind, text in (("raw", prompt["raw"]), ("chat", chat)):
            tokens = post(
                args.url, "/tokenize", {"content": text, "add_special": False, "parse_special": kind == "chat"}
            )["tokens"]
            cases.append(
                {"name": prompt["name"], "kind": kind, "prompt": tokens, "steps": greedy(args.url, tokens)}
            )
    with open(args.model, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    print('{"oracle":"llama.cpp","model_sha256":"%s","cases":[' % sha256)
    print(",\n".join(json.dumps(case, separators=(",", ":")) for case in cases))
    print("]}")


if __name__ == "__main__":
    main()
