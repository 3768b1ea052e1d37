"""Soaks a server: many streams, random disconnects, then looks whether everything was given back.

    python soak.py --url http://127.0.0.1:8000 [--pid PID] [--streams 64] [--seconds 120] [--seed 1]

Fails (exit 1) when afterwards anything runs or waits, a KV block is still held, free and cached blocks
are not all blocks, memory grew between an early and a late quiet moment, any request ended in a way
the client did not cause, or the server no longer answers a question as it did before.

Start the server with a small KV cache (--kv-memory 32MiB --max-context 1024): blocks run out, so that
preemption is soaked too, and every page of it is touched before memory is first looked at.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import random
import re
import sys
import time

import httpx

# Growth of resident memory allowed between the two quiet moments. The first comes after a warm-up that
# fills the prefix cache and the workspaces; allocator slack and per-connection buffers stay below this.
MAX_GROWTH_MB = 64
QUESTION = "Name the capital of France. Answer with the name alone."
# Statuses that a client under load is told honestly.
TURNED_AWAY = {429, 503}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, help="the server's process, to watch its memory")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def rss_mb(pid):
    """Anonymous resident memory: mapped weights come and go with the page cache and do not count."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024


async def metrics(http):
    """Sums of all samples of each metric name, labels put aside."""
    sums = collections.Counter()
    for line in (await http.get("/metrics")).text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            sums[name.split("{")[0]] += float(value)
    return sums


async def kv_blocks(http):
    """KV blocks by state: used, cached, free."""
    text = (await http.get("/metrics")).text
    return {state: int(n) for state, n in re.findall(r'^rudder_kv_blocks\{.*state="(\w+)".*\} (\d+)', text, re.M)}


async def quiet(http, seconds=30):
    """Waits until nothing runs or waits; returns whether that came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        now = await metrics(http)
        if now["vllm:num_requests_running"] == 0 and now["vllm:num_requests_waiting"] == 0:
            return True
        await asyncio.sleep(0.1)
    return False


async def answer(http, model):
    body = {"model": model, "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": QUESTION}]}
    response = await http.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"]


def request(dice, model):
    """A request of random shape: prompts that share a prefix or do not, short and long, streamed or not."""
    shared = "You are a careful engineer. " * dice.choice([0, 5, 20])
    words = " ".join(str(dice.randrange(10**6)) for _ in range(dice.choice([2, 5, 50])))
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"{shared}Continue: {words}"}],
        "max_tokens": dice.choice([dice.randrange(1, 40), dice.randrange(100, 400)]),
        "temperature": dice.choice([0, 0.7, 1.2]),
        "n": dice.choice([1, 1, 1, 2]),
        "logprobs": dice.random() < 0.2,
        "stop": dice.choice([None, ["\n\n"], ["7"]]),
        "stream": dice.random() < 0.85,
        "ignore_eos": dice.random() < 0.5,
    }


async def one(http, dice, model, ends):
    """Sends one request and often leaves it early; books how it ended."""
    body = request(dice, model)
    leave = dice.random() < 0.5
    patience = dice.expovariate(1.0) if leave else None
    try:
        async with asyncio.timeout(patience):
            async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code in TURNED_AWAY:
                    await response.aread()
                    ends["turned away"] += 1
                    await asyncio.sleep(0.2)
                    return
                if response.status_code != 200:
                    ends[f"status {response.status_code}: {(await response.aread())[:200]}"] += 1
                    return
                lines = [line async for line in response.aiter_lines() if line and not line.startswith(":")]
    except TimeoutError:
        ends["left"] += 1
        return
    except httpx.HTTPError as error:
        ends[f"{type(error).__name__}: {error}"] += 1
        return
    if body["stream"]:
        whole = lines[-1:] == ["data: [DONE]"] and not any('"error":' in line for line in lines)
    else:
        whole = all(choice["finish_reason"] for choice in json.loads("".join(lines))["choices"])
    ends["finished" if whole else f"ended oddly: {lines[-2:]}"] += 1


async def soak(args, http, model, seconds, ends, number):
    async def client(index):
        dice = random.Random(f"{args.seed}/{number}/{index}")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await one(http, dice, model, ends)

    await asyncio.gather(*(client(i) for i in range(args.streams)))


async def main():
    args = parse()
    limits = httpx.Limits(max_connections=None)
    faults = []
    async with httpx.AsyncClient(base_url=args.url, timeout=600, limits=limits) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        all_blocks = sum((await kv_blocks(http)).values())
        before = await answer(http, model)
        ends, memory = collections.Counter(), []
        # A third warms up, the rest is measured.
        for number, seconds in enumerate((args.seconds / 3, args.seconds * 2 / 3)):
            await soak(args, http, model, seconds, ends, number)
            if not await quiet(http):
                faults.append("something still runs or waits 30 s after the last client went")
            if args.pid:
                memory.append(rss_mb(args.pid))
        blocks = await kv_blocks(http)
        preemptions = (await metrics(http))["rudder_num_preemptions_total"]
        if blocks["used"] != 0:
            faults.append(f"{blocks['used']} KV blocks are still held")
        if sum(blocks.values()) != all_blocks:
            faults.append(f"of {all_blocks} KV blocks there are {blocks}")
        after = await answer(http, model)
        if after != before:
            faults.append(f"the answer changed from {before!r} to {after!r}")
    if memory and memory[1] - memory[0] > MAX_GROWTH_MB:
        faults.append(f"memory grew from {memory[0]:.0f} to {memory[1]:.0f} MB")
    faults += [f"{count} x {end}" for end, count in ends.items() if end not in ("finished", "left", "turned away")]
    if not ends["finished"] or not ends["left"]:
        faults.append("the soak proved nothing: it needs streams that finish and streams that leave")

    print(f"{args.streams} streams, {args.seconds:.0f} s:", ", ".join(f"{n} {end}" for end, n in ends.items()))
    print("memory, MB:", ", ".join(f"{m:.0f}" for m in memory) or "not watched", f"- {preemptions:.0f} preemptions - KV blocks:", blocks)
    for fault in faults:
        print("FAULT:", fault)
    print("soak:", "failed" if faults else "passed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
