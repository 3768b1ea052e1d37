#!/usr/bin/env python3
"""What holding an answer to a grammar costs a token: single-stream decode, free and held in turn, as ratios.

    benches/grammar.py --url http://127.0.0.1:8000 --repeats 11

Every answer has the same prompt, temperature 0 and token limit; speed is that of the tokens after the first. Jump-ahead, which
gives forced tokens without a draw, makes held answers faster where the form is rigid; log-probabilities are asked for
everywhere, which turns it off, so that what is left is the cost of masks alone.
"""

import argparse
import json
import statistics
import time
import urllib.request

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kind": {"enum": ["function", "struct", "trait"]}, "summary": {"type": "string"}},
    "required": ["name", "kind", "summary"],
    "additionalProperties": False,
}
SCHEMA = {"type": "object", "properties": {"items": {"type": "array", "items": ITEM, "minItems": 20}}, "required": ["items"]}
FORMS = {
    "free": {},
    "any text": {"guided_regex": r"[\s\S]*"},
    "JSON object": {"response_format": {"type": "json_object"}},
    "JSON schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "items", "strict": True, "schema": SCHEMA}}},
}
PROMPT = "Write a JSON object with a list of twenty items of a Rust library, each with name, kind and summary."


def decode_speed(url, model, tokens, form):
    """Tokens a second after the first, of one streamed answer; and how many there were."""
    body = {
        "model": model, "stream": True, "temperature": 0, "max_tokens": tokens, "logprobs": True,
        "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": PROMPT}], **form,
    }
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    times, used = [], None
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                used = event.get("usage") or used
                if event["choices"] and event["choices"][0].get("logprobs"):
                    times.append(time.monotonic())
    count = used["completion_tokens"]
    return (count - 1) / (times[-1] - times[0]), count


def main():
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--url", default="http://127.0.0.1:8000")
    p.add_argument("--tokens", type=int, default=200)
    p.add_argument("--repeats", type=int, default=11)
    args = p.parse_args()
    with urllib.request.urlopen(f"{args.url}/v1/models", timeout=60) as answer:
        model = json.load(answer)["data"][0]["id"]
    for form in FORMS.values():
        decode_speed(args.url, model, args.tokens, form)  # compiles the grammar, fills the prefix cache
    speeds, counts = {name: [] for name in FORMS}, {}
    for _ in range(args.repeats):
        for name, form in FORMS.items():
            speed, counts[name] = decode_speed(args.url, model, args.tokens, form)
            speeds[name].append(speed)
    print("| answer | tokens | decode, tok/s | free over held, median of pairs |\n|---|---|---|---|")
    for name, found in speeds.items():
        ratio = statistics.median(free / held for free, held in zip(speeds["free"], found))
        print(f"| {name} | {counts[name]} | {statistics.median(found):.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
