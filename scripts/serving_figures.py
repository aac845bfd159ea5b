#!/usr/bin/env python3
"""What `bitfit serve` takes and gives: a committed JSON file a figure, and the tables of docs/serving.md.

usage: serving_figures.py BITFIT MANY_TASKS [--only FIGURE[,FIGURE..]] [--rounds N] [--work DIR]
       serving_figures.py --table

BITFIT is the binary, MANY_TASKS the example of that name (cargo build --release --examples), which writes the bases and
patches into DIR (default target/serving); `oha`, a public load generator, is on the PATH or named by $OHA. Sides of a ratio
run in turn; a ratio is of medians, with the 90 % interval of 2,000 resamplings of the rounds. Everything runs on this
machine: the load generator takes its share of the processor, and so does the tokenizer.

`pipelines` needs a Python with torch and transformers, the one that runs this; `tei` a text-embeddings-router, which $TEI
names.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measured import ROOT, commit, facts, ratio_of_medians, write_aside

RESULTS = ROOT / "benches" / "results" / "serving"
PAGE = ROOT / "docs" / "serving.md"
# Every one is a token of the default vocabulary: a text of N of them has N + 2 tokens.
WORDS = "time year people way day man thing woman life child world school state family student group country hand part place".split()
LENGTH = 32
THREADS = os.cpu_count()


def text(tokens, draw):
    return " ".join(draw.choice(WORDS) for _ in range(tokens - 2))


class Server:
    """A `bitfit serve` that is ready; `started_s` is how long that took."""

    def __init__(self, bitfit, fixture, *more, patches="patches"):
        command = [bitfit, "serve", "--base", fixture / "base", "--patches", fixture / patches, "--listen", "127.0.0.1:0"]
        began = time.monotonic()
        self.process = subprocess.Popen([*map(str, command), "--log", "error", *more], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.started_s = time.monotonic() - began
        if "http://" not in line:
            sys.exit(f"the server did not start: {line}")
        self.address = line.split("http://")[1].strip()
        self.connection = http.client.HTTPConnection(self.address, timeout=120)

    def ask(self, method, path, body=None):
        for last in (False, True):
            try:
                self.connection.request(method, path, None if body is None else json.dumps(body))
                response = self.connection.getresponse()
                break
            except (http.client.RemoteDisconnected, BrokenPipeError):
                # A connection that lay idle for long has been closed; the next request opens another.
                self.connection.close()
                if last:
                    raise
        data = response.read()
        if response.status >= 300:
            sys.exit(f"{method} {path}: {response.status} {data[:300]}")
        return json.loads(data)

    def predict(self, tasks, inputs):
        return self.ask("POST", "/v1/predict", {"tasks": tasks, "inputs": [{"text": text} for text in inputs]})["results"]

    def done(self):
        return self.ask("GET", "/info")["done"]

    def resident_mb(self):
        return resident_mb(self.process.pid)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()
        self.process.terminate()
        self.process.wait()


def resident_mb(pid, field="Pss_Anon"):
    """Memory of its own, anonymous, in 10^6 bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


def processor_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def oha(url, connections, seconds, body, rate=None, anew=False):
    """Requests a second and latencies in ms. `url` is a pattern (in which oha takes a dot as it is), of which each request draws one; `anew` connects for each
    request, without which a connection stays with the port that it drew first."""
    command = [os.environ.get("OHA") or shutil.which("oha") or sys.exit("oha is missing: cargo install oha")]
    command += ["--no-tui", "--output-format", "json", "-z", f"{seconds}s", "-c", str(connections), "-w"]
    command += ["-m", "POST", "-T", "application/json", "-d", json.dumps(body), "--rand-regex-url", url]
    if rate:
        command += ["-q", f"{rate:.3f}", "--latency-correction"]
    if anew:
        command += ["--disable-keepalive"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"oha: {done.stderr}")
    found = json.loads(done.stdout)
    if set(found["statusCodeDistribution"]) != {"200"} or found["errorDistribution"]:
        sys.exit(f"not every request was answered: {found['statusCodeDistribution']} {found['errorDistribution']}")
    latency = {name: 1000 * found["latencyPercentiles"][name] for name in ("p50", "p99")}
    return {"requests_s": found["summary"]["requestsPerSec"], **latency}


def one_input(tokens=LENGTH):
    return {"inputs": [{"text": text(tokens, random.Random(tokens))}]}


def tasks_url(server, tasks):
    """The routes of so many tasks, as a pattern."""
    digits = {1: "000", 20: "0[0-1][0-9]", 64: "0([0-5][0-9]|6[0-3])", 1000: "[0-9][0-9][0-9]"}[tasks]
    return f"http://{server.address}/v1/tasks/t{digits}/predict"


class Measuring:
    def __init__(self, args):
        self.bitfit, self.example = Path(args.bitfit).resolve(), Path(args.many_tasks).resolve()
        self.rounds, self.work = args.rounds, Path(args.work).resolve()

    def fixture(self, name, shape, tasks, selection="bitfit"):
        folder = self.work / name
        if not (folder / "whole").exists():
            subprocess.run([self.example, folder, shape, str(tasks), selection], check=True)
            one = folder / "one"
            one.mkdir(exist_ok=True)
            shutil.copy(folder / "patches" / "t000.safetensors", one)
            (folder / "whole").touch()
        return folder

    def base(self):
        return self.fixture("base-1000", "base", 1000)

    def bench(self, *more):
        command = [self.bitfit, "bench", "--method", "forward", "--threads", str(THREADS), "--json", *map(str, more)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def live_tasks(self):
        """1,000 live tasks beside one: memory, loading, requests a second."""
        base = self.base()
        started = {"1": [], "1000": []}
        # The first of each also brings the files into memory, and does not count.
        for i in range(4):
            for tasks, patches in (("1", "one"), ("1000", "patches")):
                with Server(self.bitfit, base, "--preload", patches=patches) as server:
                    started[tasks] += [server.started_s] if i else []
        with Server(self.bitfit, base, "--preload", patches="one") as one, Server(self.bitfit, base, "--preload") as many:
            found = {
                "started_s": started,
                "resident_mb": {"1": one.resident_mb(), "1000": many.resident_mb()},
                "patch_mb": sum(p.stat().st_size for p in (base / "patches").iterdir()) / 1000 / 1e6,
                "rounds": [],
            }
            for server in (one, many):
                oha(tasks_url(server, 1), 64, 5, one_input())
            for _ in range(self.rounds):
                found["rounds"].append({
                    "1": oha(tasks_url(one, 1), 64, 12, one_input()),
                    "1000": oha(tasks_url(many, 1000), 64, 12, one_input()),
                })  # fmt: skip
            found["resident_after_mb"] = {"1": one.resident_mb(), "1000": many.resident_mb()}
        return found

    def mixed_forward(self):
        """A forward of 64 sequences of one task, and of 64 tasks."""
        return {"bench": self.bench("--shape", "base", "--batch", 64, "--length", LENGTH, "--tasks", "1,64", "--steps", 8 * self.rounds)}

    def overhead(self):
        """Tokens a second at saturation, beside the bare forward of as many tokens."""
        base, rounds = self.base(), []
        with Server(self.bitfit, base, "--preload", patches="one") as server:
            url = tasks_url(server, 1)
            oha(url, 128, 10, one_input())
            for _ in range(self.rounds):
                before = server.done()
                began = time.monotonic()
                oha(url, 128, 15, one_input())
                seconds, after = time.monotonic() - began, server.done()
                served = {name: after[name] - before[name] for name in after}
                bare = self.bench("--shape", base / "base", "--batch", 128, "--length", LENGTH, "--steps", 5)
                rounds.append({
                    "served_tokens_s": served["tokens"] / seconds, "bare_tokens_s": bare["tokens_per_s"],
                    "encoder_busy": served["forward_us"] / 1e6 / seconds, "batch_tokens": served["tokens"] / served["batches"],
                })  # fmt: skip
        return {"rounds": rounds}

    def idle(self):
        """An idle server: what it adds to the forward of one short text, and what it uses with 1,000 tasks live."""
        rounds, draw = [], random.Random(0)
        with Server(self.bitfit, self.base(), "--preload") as server:
            for i in range(110):
                body = {"inputs": [{"text": text(8, draw)}]}
                before = server.done()["forward_us"]
                began = time.monotonic()
                server.ask("POST", "/v1/tasks/t000/predict", body)
                took = time.monotonic() - began
                forward = (server.done()["forward_us"] - before) / 1e6
                if i >= 10:
                    rounds.append({"answer_ms": 1000 * took, "forward_ms": 1000 * forward})
                time.sleep(0.02)
            before = processor_s(server.process.pid)
            time.sleep(60)
            idle = (processor_s(server.process.pid) - before) / 60
        return {"rounds": rounds, "idle_cores": idle}

    def latency(self):
        """Latency at shares of what the server can do, one task and 64 mixed; requests come as a clock says."""
        found = {}
        with Server(self.bitfit, self.base(), "--preload") as server:
            for tasks in (1, 64):
                url = tasks_url(server, tasks)
                oha(url, 64, 5, one_input())
                most = oha(url, 64, 20, one_input())["requests_s"]
                found[str(tasks)] = {"requests_s": most}
                for share in (50, 80, 95):
                    found[str(tasks)][f"{share} %"] = oha(url, 256, 40, one_input(), most * share / 100)
        return found

    def upper_layers(self):
        """One text through 12 tasks of layers 8..12, asked at once and one by one."""
        fixture, rounds, draw = self.fixture("base-upper", "base", 12, "bitfit layers=8..12"), [], random.Random(0)
        tasks = [f"t{i:03}" for i in range(12)]
        with Server(self.bitfit, fixture, "--preload") as server:
            for i in range(3 * self.rounds + 1):
                asked = text(LENGTH, draw)
                began = time.monotonic()
                together = server.predict(tasks, [asked])
                between = time.monotonic()
                apart = [server.predict([task], [asked])[0] for task in tasks]
                ended = time.monotonic()
                if together != apart:
                    sys.exit("12 tasks at once gave other bits than one by one")
                if i:
                    rounds.append({"together_s": between - began, "apart_s": ended - between})
        return {"rounds": rounds}

    def pipelines(self):
        """20 tasks over MiniLM: one server, beside a transformers pipeline in a process a task."""
        script = ROOT / "benches/reference/pipeline_server.py"
        found = self.beside("pipelines", lambda model, port: [sys.executable, script, model, port], "", one_input())
        return {**found, "libraries": versions("torch", "transformers")}

    def tei(self):
        """The same beside text-embeddings-inference in a process a task; $TEI is its binary."""
        tei = os.environ.get("TEI") or sys.exit("TEI is unset: it names text-embeddings-router")
        command = lambda model, port: [tei, "--model-id", model, "--hostname", "127.0.0.1", "--port", port]  # noqa: E731
        found = self.beside("tei", command, "predict", {"inputs": one_input()["inputs"][0]["text"]})
        version = subprocess.run([tei, "--version"], capture_output=True, text=True).stdout.split()
        return {**found, "libraries": {"text-embeddings-inference": version[-1]}}

    def beside(self, name, command, path, body):
        """20 tasks over MiniLM: one server of ours, beside a process a task, each with a whole model of its own."""
        fixture, rounds, n, port = self.fixture("minilm-20", "minilm", 20), [], 20, 18000
        with contextlib.ExitStack() as stack:
            processes = []
            for task in range(n):
                model = self.work / "merged" / f"t{task:03}"
                if not model.exists():
                    patch = fixture / "patches" / f"t{task:03}.safetensors"
                    merge = [self.bitfit, "patch", "merge", patch, "--base", fixture / "base", "--output", model]
                    subprocess.run(list(map(str, merge)), check=True, capture_output=True)
                log = stack.enter_context(open(self.work / f"{name}-{task}.log", "w"))
                process = subprocess.Popen(list(map(str, command(model, port + task))), stdout=log, stderr=log)
                stack.callback(process.wait)
                stack.callback(process.kill)
                processes.append(process)
            for task, process in enumerate(processes):
                wait_for(process, port + task)
            server = stack.enter_context(Server(self.bitfit, fixture, "--preload"))
            ours = lambda seconds: oha(tasks_url(server, 20), 40, seconds, one_input(), anew=True)  # noqa: E731
            theirs = lambda seconds: oha(f"http://127.0.0.1:{port // 100}[0-1][0-9]/{path}", 40, seconds, body, anew=True)  # noqa: E731
            ours(5), theirs(5)
            for _ in range(self.rounds):
                rounds.append({"bitfit": ours(10), name: theirs(10)})
            memory = {"bitfit": resident_mb(server.process.pid, "Pss"), name: sum(resident_mb(p.pid, "Pss") for p in processes)}
        return {"rounds": rounds, "pss_mb": memory, "tasks": n}


def wait_for(process, port):
    """Until something listens at a port."""
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None:
            sys.exit(f"{process.args} did not start")
        time.sleep(0.5)
    sys.exit(f"{process.args} does not listen")


def versions(*names):
    from importlib import metadata

    return {name: metadata.version(name) for name in names}


FIGURES = {
    "live-tasks": Measuring.live_tasks,
    "mixed-forward": Measuring.mixed_forward,
    "overhead": Measuring.overhead,
    "idle": Measuring.idle,
    "latency": Measuring.latency,
    "upper-layers": Measuring.upper_layers,
    "pipelines": Measuring.pipelines,
    "tei": Measuring.tei,
}


# What docs/serving.md says ------------------------------------------------------------------------------------------


BESIDE = {
    "pipelines": "a transformers `pipeline`\nbehind Python's own HTTP server, one thread each, `benches/reference/pipeline_server.py`",
    "tei": "text-embeddings-inference\nwith its candle backend, built without the MKL that its own images have",
}


def shown(ratio):
    value, (low, high) = ratio
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def column(rounds, *path):
    for step in path:
        rounds = [each[step] for each in rounds]
    return rounds


def rows(found):
    """The lines of the table, of the figures that there are: what, asked, measured."""
    of = found.get
    if live := of("live-tasks"):
        grown = live["resident_after_mb"]["1000"] - live["resident_after_mb"]["1"]
        yield "1,000 live tasks: memory over one", "at most 450 MB", f"{grown:.0f} MB, for files of {1000 * live['patch_mb']:.0f} MB"
        one, many = (statistics.median(live["started_s"][tasks]) for tasks in ("1", "1000"))
        yield "loading 1,000 tasks at the start, beyond the base", "at most 10 s", f"{many - one:.1f} s (ready after {many:.1f} s, with one task after {one:.1f} s)"
        ratio = ratio_of_medians(column(live["rounds"], "1000", "requests_s"), column(live["rounds"], "1", "requests_s"))
        yield "requests/s of 1,000 tasks over those of one", "at least 0.95", shown(ratio)
    if mixed := of("mixed-forward"):
        pair = mixed["bench"]["tasks"][1]
        low, high = pair["interval"]
        yield "speed of a forward of 64 tasks over one of one task", "at least 0.97", shown((1 / pair["ratio"], (1 / high, 1 / low)))
    if overhead := of("overhead"):
        rounds = overhead["rounds"]
        ratio = ratio_of_medians(column(rounds, "served_tokens_s"), column(rounds, "bare_tokens_s"))
        busy = statistics.median(column(rounds, "encoder_busy"))
        yield "tokens/s at saturation over those of the bare forward", "at least 0.90", f"{shown(ratio)}; the encoder is busy {100 * busy:.1f} % of the time"
    if idle := of("idle"):
        added = [each["answer_ms"] - each["forward_ms"] for each in idle["rounds"]]
        forward = statistics.median(column(idle["rounds"], "forward_ms"))
        yield "an idle server adds to the forward of 8 tokens", "at most 3 ms", f"{statistics.median(added):.2f} ms to {forward:.1f} ms (90 % within {sorted(added)[int(0.9 * len(added))]:.2f} ms)"
        yield "an idle server with 1,000 live tasks uses", "below 1 % of a core", f"{100 * idle['idle_cores']:.2f} %"
    if upper := of("upper-layers"):
        ratio = ratio_of_medians(column(upper["rounds"], "together_s"), column(upper["rounds"], "apart_s"))
        yield "12 tasks of `--layers 8..12` over one text, over 12 requests", "at most 0.50, equal bits", f"{shown(ratio)}, equal bits"


def table():
    lines = ["## Figures", "", "`scripts/serving_figures.py` measures them: the shape of BERT-base in f32 unless said, random weights, texts of"]
    lines += [f"{LENGTH} tokens, one a request, `oha` on the same machine. Sides of a ratio ran in turn; ratios are of medians, with their", "90 % interval (of the mixed forward: the median of pairs of steps, and where 90 % of them lie)."]
    kinds = sorted({path.stem.rsplit("@", 1)[1] for path in RESULTS.glob("*@*.json")})
    for kind in kinds:
        found = {p.stem.rsplit("@", 1)[0]: json.loads(p.read_text(encoding="utf-8")) for p in RESULTS.glob(f"*@{kind}.json")}
        first = next(iter(found.values()))
        commits = ", ".join(f"{name} {found[name]['commit']}" for name in FIGURES if name in found)
        lines += ["", f"### {first['processor']}, {kind}, {first['cores']} cores", "", f"A commit a figure: {commits}.", ""]
        lines += ["| | asked | measured |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows(found))]
        if latency := found.get("latency"):
            lines += ["", "Requests come as a clock says, at shares of what the server was measured to answer just before:", ""]
            lines += ["| tasks | most requests/s | | 50 % | 80 % | 95 % |", "| --- | --- | --- | --- | --- | --- |"]
            for tasks in ("1", "64"):
                of = latency[tasks]
                for name in ("p50", "p99"):
                    cells = [f"{of[f'{share} %'][name]:.0f} ms" for share in (50, 80, 95)]
                    lines.append(f"| {tasks} | {of['requests_s']:.1f} | {name} | " + " | ".join(cells) + " |")
        for name, what in BESIDE.items():
            if name not in found:
                continue
            rounds, memory = found[name]["rounds"], found[name]["pss_mb"]
            ratio = ratio_of_medians(*(column(rounds, side, "requests_s") for side in ("bitfit", name)))
            libraries = ", ".join(f"{library} {version}" for library, version in found[name]["libraries"].items())
            lines += ["", f"20 tasks of MiniLM-L6's shape, beside a process a task, each {what} ({libraries}).", "40 connections' worth of requests at once, a connection a request:", ""]
            lines += ["| | requests/s | p50 | p99 | memory |", "| --- | --- | --- | --- | --- |"]
            for side in ("bitfit", name):
                cells = [statistics.median(column(rounds, side, of)) for of in ("requests_s", "p50", "p99")]
                lines.append(f"| {side} | {cells[0]:.0f} | {cells[1]:.0f} ms | {cells[2]:.0f} ms | {memory[side]:,.0f} MB |")
            lines += ["", f"Requests/s: {shown(ratio)} times theirs; memory: theirs is {memory[name] / memory['bitfit']:.0f} times ours."]
    page = PAGE.read_text(encoding="utf-8")
    begin = page.index("## Figures")
    end = page.find("\n## ", begin + 1)
    write_aside(PAGE, page[:begin] + "\n".join(lines) + "\n" + (page[end:] if end > 0 else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bitfit", nargs="?")
    parser.add_argument("many_tasks", nargs="?")
    parser.add_argument("--only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", default=ROOT / "target" / "serving")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return table()
    if not args.many_tasks:
        parser.error("BITFIT and MANY_TASKS are needed")
    measuring, about = Measuring(args), {**facts(), "commit": commit()}
    # Of what needs a program that cannot be had from a registry, only where it is asked for.
    for name in args.only.split(",") if args.only else [name for name in FIGURES if name != "tei"]:
        print(name, flush=True)
        found = {**about, **FIGURES[name](measuring)}
        write_aside(RESULTS / f"{name}@{about['kind']}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
