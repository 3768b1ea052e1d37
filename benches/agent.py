#!/usr/bin/env python3
"""Replays agent traces on Rudder and on llama.cpp's server in turn, and prints the ratios.

    benches/agent.py --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --llama-server PATH

Each replay has a fresh server process, on the same GGUF file with the same number of threads; each repeat
runs in the other order than the one before. The figures are those of `rudder bench agent-trace`, medians over the
repeats. With `--drafts-off "FLAGS"`, Rudder also runs with these flags, and every turn's output is compared with
that of the run without them, byte for byte by its hash. Needs the Python standard library only.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile

import peers

TRACES = pathlib.Path(__file__).resolve().parent / "traces"

# Name, unit, the figure of a result's summary.
FIGURES = [
    ("whole trace", "s", lambda s: s["wall"]),
    ("whole trace without pauses", "s", lambda s: s["replay"]["busy"]),
    ("first token of first turns, median", "ms", lambda s: 1e3 * s["replay"]["first_ttft"]["median"]),
    ("first token of follow-ups, median", "ms", lambda s: 1e3 * s["replay"]["follow_up_ttft"]["median"]),
    ("first token of follow-ups, p90", "ms", lambda s: 1e3 * s["replay"]["follow_up_ttft"]["p90"]),
    ("decode, all turns", "tok/s", lambda s: s["replay"]["decode_tokens_per_second"]),
    ("decode, edits", "tok/s", lambda s: s["replay"]["edit_tokens_per_second"]),
    ("share of input from the cache", "%", lambda s: 100 * s["cached_share"]),
]


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parse_arguments()
    contenders = find_contenders(args)
    for trace in args.traces:
        facts = describe(args, contenders, trace)
        samples = {name: [] for name in contenders}
        for repeat in range(args.repeats):
            order = list(contenders) if repeat % 2 == 0 else list(reversed(contenders))
            for name in order:
                peers.say(f"{trace.stem}, repeat {repeat + 1} of {args.repeats}, {name}")
                samples[name].append(replay(args, contenders[name], trace))
            text = write_report(args, facts, samples)
        print(text, flush=True)


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True, help="GGUF file that both load")
    p.add_argument("--traces", nargs="+", type=pathlib.Path, default=sorted(TRACES.glob("*.json")))
    p.add_argument("--rudder", default=str(peers.ROOT / "target/release/rudder"), help="rudder binary")
    p.add_argument("--rudder-flags", default="", help="more flags of `rudder serve`")
    p.add_argument("--drafts-off", help="flags of `rudder serve` for one more contender whose outputs must be the same")
    p.add_argument("--llama-server", help="llama-server binary; without it, Rudder runs alone")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each server")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--pause-scale", default="1", help="pauses are this many times as long as recorded")
    p.add_argument("--recorded", action="store_true", help="go on from recorded answers: the same prompts for all")
    p.add_argument("--results", type=pathlib.Path, default=peers.ROOT / "benches/results", help="folder of the report")
    args = p.parse_args()
    if args.repeats < 1 or args.threads < 1:
        p.error("--repeats and --threads must be at least 1")
    return args


def find_contenders(args):
    """Servers by name, as `peers.Server` starts them: llama.cpp has four slots of 16,384 tokens of context."""
    threads = str(args.threads)

    def server(command, version):
        return {"command": lambda port, _long: [*command, "--port", port], "version": version}

    def rudder(flags):
        command = [args.rudder, "serve", "--model", args.model, "--threads", threads, *flags.split()]
        return server(command, peers.git_revision())

    contenders = {"Rudder": rudder(args.rudder_flags)}
    if args.drafts_off:
        contenders["Rudder, no drafts"] = rudder(f"{args.rudder_flags} {args.drafts_off}")
    if args.llama_server:
        command = [args.llama_server, "-m", args.model, "-t", threads, "-np", "4", "-c", "65536", "--no-webui",
                   "--host", "127.0.0.1"]
        contenders["llama.cpp"] = server(command, peers.version(args.llama_server))
    return contenders


def replay(args, contender, trace):
    """One replay on a fresh server: its figures, and each turn's output as a hash."""
    with tempfile.TemporaryDirectory() as folder, peers.Server(contender, False) as server:
        server.first_answer()
        result = pathlib.Path(folder) / "result.json"
        command = [args.rudder, "bench", "agent-trace", str(trace), "--url", server.url, "--json", str(result),
                   "--pause-scale", args.pause_scale, *(["--recorded"] if args.recorded else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"the replay failed: {done.stderr.strip()}")
        result = json.loads(result.read_text())
    turns = result["runs"][0]["requests"]
    errors = [turn["error"] for turn in turns if turn.get("error")]
    if errors:
        sys.exit(f"{len(errors)} turns failed; the first: {errors[0]}")
    peers.say(f"  {result['summary']['wall']:.1f} s")
    return {"figures": [figure(result["summary"], of) for _, _, of in FIGURES],
            "outputs": [turn["output_hash"] for turn in turns]}


def figure(summary, of):
    try:
        return of(summary)
    except TypeError:  # the run does not have it
        return None


# ------------------------------------------------------------------ the report


def describe(args, contenders, trace):
    """What a reader of the figures has to know."""
    def short(command):
        return [pathlib.Path(part).name if os.sep in part else part for part in command]

    return {"trace": trace.stem, "date": datetime.date.today().isoformat(), "cpu": peers.cpu_name(),
            "threads": args.threads, "model": pathlib.Path(args.model).name, "pause_scale": args.pause_scale,
            "recorded": args.recorded,
            "load_average_before": os.getloadavg(),
            "commands": {name: short(c["command"]("PORT", False)) for name, c in contenders.items()},
            "versions": {name: c["version"] for name, c in contenders.items()}}


def write_report(args, facts, samples):
    """Writes the report of a trace's replays so far as JSON and as a table, and returns the table."""
    stem = pathlib.Path(args.model).stem
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{facts['cpu']} agent {facts['trace']} {stem}".lower()).strip("-")
    report = args.results / f"{facts['date']}-{slug}.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{name}, {unit}" for name, unit, _ in FIGURES]
    runs = {name: [{"figures": dict(zip(names, run["figures"])), "outputs": run["outputs"]} for run in done]
            for name, done in samples.items()}
    report.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")
    text = markdown(facts, samples)
    report.with_suffix(".md").write_text(text)
    return text


def markdown(facts, runs):
    """Figures side by side, Rudder's over each other contender's, and whether the outputs are the same."""
    first, *others = runs
    answers = "recorded answers" if facts["recorded"] else "each server's own answers"
    lines = [f"# Agent trace {facts['trace']}, {facts['date']}, {facts['cpu']}", "",
             f"{facts['model']}, {facts['threads']} threads, {answers}, pauses x {facts['pause_scale']}; medians of "
             f"{len(runs[first])} repeats, least to most in brackets. Load average before: "
             f"{facts['load_average_before'][0]:.2f}.", "",
             "| | " + " | ".join(runs) + "".join(f" | {first} / {name}" for name in others) + " |",
             "|---" * (1 + len(runs) + len(others)) + "|"]
    for number, (name, unit, _) in enumerate(FIGURES):
        values = {who: [run["figures"][number] for run in done if run["figures"][number] is not None]
                  for who, done in runs.items()}
        ratios = [ratio(values[first], values[other]) for other in others]
        lines.append(f"| {name}, {unit} | " + " | ".join([*map(spread, values.values()), *ratios]) + " |")
    lines.append("")
    for other in others:
        turns = list(zip(*(run["outputs"] for who in (first, other) for run in runs[who])))
        same = sum(len(set(turn)) == 1 for turn in turns)
        lines += [f"{first} and {other}: {same} of {len(turns)} turns have the same output in every repeat.", ""]
    lines += ["Versions: " + "; ".join(f"{name}: {version}" for name, version in facts["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def spread(values):
    if not values:
        return "-"
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def ratio(ours, theirs):
    if not ours or not theirs or not statistics.median(theirs):
        return "-"
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}"


if __name__ == "__main__":
    main()
