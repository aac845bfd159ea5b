#!/usr/bin/env python3
"""Speed and memory beside PyTorch, ONNX Runtime and OpenVINO: both sides in turn, a committed JSON file a group.

usage: bench_vs_pytorch.py BITFIT_BINARY [ROUNDS (default 7)] [--only GROUP[,GROUP..]] [--list]
       bench_vs_pytorch.py --table

A group is what runs in turn: our commands and the others' of one shape and size, or variants of ours alone. Its file in benches/results/speed/
holds every round, so that a stopped run goes on where it was; more rounds are added to it. `--only` takes groups by
name, in the order given. `--table` writes benches/RESULTS.md from what is there.

A ratio is of medians over the rounds, the fastest of the others over ours, with the 90 % interval of 2,000 resamplings
of the rounds. A row is met where the lower end is at least 0.95 of its figure. Our last
layer is computed for the first token of each sequence alone, which is all that the head reads; the ratio without that is
estimated by the operations it saves.

Every process runs 3 steps that are not counted and then 3 that are; a round takes their median. Epochs run over the first
2,048 training rows: ours is the whole process, from loading the base to the dev result and the patch; theirs is the
training loop alone, without imports, loading and dev (the whole of theirs is kept as `whole_s`).

The others need a Python with torch, transformers, onnx, onnxscript, onnxruntime and openvino: the one that runs this.
Epochs need scipy and scikit-learn there, GLUE (BITFIT_GLUE_DIR) and the default base (scripts/fetch-base.sh) besides.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from measured import commit, facts, write_aside

ROOT = Path(__file__).resolve().parent.parent
SPEED = ROOT / "benches" / "results" / "speed"
REPORT = ROOT / "benches" / "RESULTS.md"
THREADS = "2"
LAYERS = {"base": (12, 768, 3072), "minilm": (6, 384, 1536)}
# Of BERT-base: embeddings, encoder and pooler.
PARAMETERS = 109_482_240


class Group(NamedTuple):
    """What runs in turn: name, shape, batch, length, our precisions, the others' by name."""

    name: str
    shape: str
    method: str
    batch: int
    length: int
    ours: tuple
    others: tuple

    @property
    def size(self):
        return ["--shape", self.shape, "--batch", str(self.batch), "--length", str(self.length), "--threads", THREADS]

    @property
    def turns(self):
        """Whom it runs beside. Without bf16 arithmetic PyTorch's autocast takes ten times its f32, which is then its best."""
        bf16 = facts()["kind"] == "avx512-bf16"
        return tuple(other for other in self.others if bf16 or not other.startswith("pytorch bf16"))

    def our_command(self, binary, precision):
        *full, precision = precision.split()
        method = full[0] if full else self.method
        return [binary, "bench", "--method", method, *self.size, "--precision", precision, "--steps", "3", "--json"]

    def other_command(self, other):
        if other == "onnx":
            return [sys.executable, "benches/reference/onnx_forward.py", *self.size, "--runs", "3"]
        _, dtype, *how = other.split()
        extra = ["--compile"] if how else []
        return [
            sys.executable, "benches/reference/pytorch_step.py", "--method", self.method, *self.size, "--dtype", dtype,
            "--steps", "3", *extra,
        ]  # fmt: skip


class Epoch(NamedTuple):
    """An epoch of 2,048 rows of a task at the authors' recipe: our best precision packed, PyTorch in f32 padded to 128."""

    name: str
    task: str
    others: tuple = ("pytorch f32 epoch",)

    @property
    def turns(self):
        return self.others

    @property
    def ours(self):
        # bf16 is the fastest where the processor multiplies it, and saves memory alone where it does not.
        return ("bf16 epoch" if facts()["kind"] == "avx512-bf16" else "f32 epoch",)

    def our_command(self, binary, precision):
        return [
            binary, "train", "--base", BASE, "--task", self.task, "--data", GLUE, "--precision", precision.split()[0],
            "--batch-size", "8",
            "--epochs", "1", "--limit", "2048", "--max-length", "128", "--threads", THREADS, "--seed", "0",
            "--out", RUN, "--overwrite", "--json",
        ]  # fmt: skip

    def other_command(self, _):
        return [
            sys.executable, "benches/reference/pytorch_train.py", BASE, GLUE, self.task, "bitfit", "--pad", "max",
            "--batch", "8", "--epochs", "1", "--limit", "2048", "--threads", THREADS,
        ]  # fmt: skip


class Own(NamedTuple):
    """Our own engine alone: variants of `bitfit bench`, by name, in turn."""

    name: str
    variants: dict
    turns: tuple = ()

    @property
    def ours(self):
        return tuple(self.variants)

    def our_command(self, binary, variant):
        return [binary, "bench", *self.variants[variant], "--threads", THREADS, "--json"]


GLUE = os.environ.get("BITFIT_GLUE_DIR", "GLUE")
RUN = str(Path(tempfile.gettempdir()) / "bitfit-epoch")
BASE = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitfit" / "all-MiniLM-L6-v2")
EAGER, COMPILED = ("pytorch f32", "pytorch bf16"), ("pytorch f32 compiled", "pytorch bf16 compiled")
SELECTIONS = {"": [], "--terms query,intermediate": ["--terms", "query,intermediate"], "--layers 8..12": ["--layers", "8..12"]}
GROUPS = [
    Group("base-bitfit", "base", "bitfit", 16, 128, ("f32", "bf16", "full f32"), EAGER),
    Group("base-bitfit-compiled", "base", "bitfit", 16, 128, ("f32", "bf16"), COMPILED),
    Group("minilm-bitfit", "minilm", "bitfit", 16, 128, ("f32", "bf16"), EAGER),
    Group("minilm-bitfit-compiled", "minilm", "bitfit", 16, 128, ("f32", "bf16"), COMPILED),
    Group("base-forward", "base", "forward", 16, 128, ("f32", "bf16", "int8"), ("pytorch f32", "onnx")),
    Group("base-one-text", "base", "forward", 1, 32, ("f32", "bf16", "int8"), ("pytorch f32", "onnx")),
    Group("base-bitfit-32", "base", "bitfit", 32, 128, ("f32", "bf16"), EAGER),
    Epoch("epoch-rte", "rte"),
    Epoch("epoch-cola", "cola"),
    Own("growth", {
        f"{p} {128 * batch}": ["--shape", "base", "--precision", p, "--batch", str(batch), "--length", "128", "--steps", str(steps)]
        # Short steps are many, so that a moment's noise is not all that is measured of them.
        for p in ("f32", "bf16") for batch, steps in ((4, 25), (32, 9), (128, 3))
    }),
    Own("selections", {
        f"{p} {name}".strip(): ["--shape", "base", "--precision", p, "--batch", "16", "--length", "128", "--steps", "3", *flags]
        for p in ("f32", "bf16") for name, flags in SELECTIONS.items()
    }),
    Own("tasks", {
        f"{p} {method}": ["--shape", "base", "--precision", p, "--method", method, "--batch", "64", "--length", "32",
                          "--tasks", "1,64", "--steps", "9"]
        for p, method in [("f32", "bitfit"), ("bf16", "bitfit"), ("f32", "forward"), ("bf16", "forward"), ("int8", "forward")]
    }),
    Own("resident", {
        f"{p} {method}": ["--shape", "base", "--precision", p, "--method", method, "--batch", "1", "--length", "8", "--steps", "1"]
        for p, method in [("f32", "forward"), ("bf16", "forward"), ("int8", "forward"), ("f32", "bitfit"), ("bf16", "bitfit")]
    }),
]  # fmt: skip

F32 = ("pytorch f32", "onnxruntime f32", "openvino f32")
ONE = (*F32, "onnxruntime int8", "openvino bf16")
# title, group, our precisions (the fastest counts), the others (the fastest counts), figure and aim on AVX2 alone, with
# AVX-512 bf16 and VNNI
ROWS = [
    (f"BitFit step, {title}, {precision}{beside}", f"{shape}-bitfit{group}", (precision,), others, narrow, wide)
    for shape, title, figures in [
        ("base", "BERT-base", {"f32": [(1.3, 1.45), (1.3, 1.5)], "bf16": [(1.2, 1.35), (1.6, 2.0)]}),
        ("minilm", "MiniLM-L6", {"f32": [(1.9, 2.2), (1.9, 2.4)], "bf16": [(1.8, None), (1.8, 2.8)]}),
    ]
    for precision, (narrow, wide) in figures.items()
    for group, beside, all_others in [("", "", EAGER), ("-compiled", ", beside torch.compile", COMPILED)]
    for others in [all_others[:1] if precision == "f32" else all_others]
] + [
    ("forward, BERT-base, f32", "base-forward", ("f32",), F32, (1.15, 1.25), (1.15, 1.35)),
    ("forward, BERT-base, bf16", "base-forward", ("bf16",), ("openvino bf16", "openvino f32"), (1.1, None), (1.1, 1.25)),
    ("forward, BERT-base, int8", "base-forward", ("int8",), ("onnxruntime int8",), (1.1, 1.3), (1.3, 2.0)),
    *(
        (f"an epoch of {title} (2,048 rows), MiniLM-L6, beside the authors' recipe", f"epoch-{title.lower()}", ("bf16 epoch", "f32 epoch"),
         ("pytorch f32 epoch",), narrow, wide)
        for title, narrow, wide in [("RTE", (3.0, 4), (6.0, 10)), ("CoLA", (12.0, 20), (20.0, 40))]
    ),
    ("one text of 32 tokens", "base-one-text", ("f32", "bf16", "int8"), ONE, (1.1, 1.3), (1.1, 1.5)),
]
# our precision, MB over the model at most, MB aimed at
MEMORY = [("f32", 1450, 1360), ("bf16", 800, 700)]


# Measuring ------------------------------------------------------------------------------------------------------------


def run(command):
    """A command's JSON lines."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode} from: {' '.join(command)}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def measure(group, binary, backwards):
    """One round: {who: {"step_s", "peak_over_model_mb"}}."""
    found = {}
    # Ours and theirs in turn, so that a slow minute falls on both.
    ours = [(f"bitfit {p}", group.our_command(binary, p)) for p in group.ours]
    others = [(other, group.other_command(other)) for other in group.turns]
    turns = [turn for pair in zip(ours, others) for turn in pair]
    turns += ours[len(others) :] + others[len(ours) :]
    for name, command in reversed(turns) if backwards else turns:
        began = time.monotonic()
        results = run(command)
        if isinstance(group, Epoch):
            whole = time.monotonic() - began
            results = [{"step_s": whole if name.startswith("bitfit") else results[0]["train_s"], "whole_s": whole}]
        for result in results:
            if result.get("path", facts()["kind"]) != facts()["kind"]:
                sys.exit(f"bitfit ran by {result['path']}, and this script takes the processor for {facts()['kind']}")
            who = result.get("engine", name)
            found[who] = {
                "step_s": result.get("step_s", result.get("seconds")),
                "peak_over_model_mb": result.get("peak_over_model_mb"),
            }
            if isinstance(group, Own):
                found[who]["model_mb"] = result["model_mb"]
                # Step by step in one process, so nearer than two processes' medians.
                found[who]["tasks"] = result["tasks"]
            if "whole_s" in result:
                found[who]["whole_s"] = result["whole_s"]
            print(f"  {who:24} {found[who]['step_s']:.4f} s", file=sys.stderr, flush=True)
    return found


def path_of(group):
    return SPEED / f"{group.name}-{facts()['kind']}.json"


def run_group(group, binary, rounds):
    if commit().endswith("changes"):
        sys.exit("src/ or Cargo.* has changes: commit them, so that a figure belongs to a commit")
    path = path_of(group)
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    typed = [group.our_command("bitfit", p) for p in group.ours]
    typed += [["python3", *group.other_command(other)[1:]] for other in group.turns]
    fresh = {
        "group": group.name, **facts(), "threads": int(THREADS), "commit": commit(),
        "libraries": {of: metadata.version(of) for of in ("torch", "transformers", "onnxruntime", "openvino")},
        "commands": [" ".join(command).replace(BASE, "BASE").replace(GLUE, "GLUE").replace(RUN, "RUN") for command in typed], "rounds": [],
    }  # fmt: skip
    stored = stored or fresh
    for key in fresh:
        if key != "rounds" and stored.get(key) != fresh[key]:
            sys.exit(
                f"{path.relative_to(ROOT)} was measured with {key} {stored.get(key)}, this is {fresh[key]}: delete it to "
                "measure anew"
            )
    while len(stored["rounds"]) < rounds:
        print(f"{group.name}, round {len(stored['rounds']) + 1} of {rounds}", file=sys.stderr, flush=True)
        # Every other round the other way about.
        stored["rounds"].append(measure(group, binary, backwards=len(stored["rounds"]) % 2 == 1))
        write_aside(path, json.dumps(stored, indent=1) + "\n")


# The report -----------------------------------------------------------------------------------------------------------


def fastest(rounds, names, measure="step_s"):
    """Of several contenders the one with the lowest median, and that median."""
    known = {n: [r[n][measure] for r in rounds if n in r and r[n][measure] is not None] for n in names}
    medians = {n: statistics.median(values) for n, values in known.items() if values}
    if not medians:
        return "none", float("nan")
    name = min(medians, key=medians.get)
    return name, medians[name]


def ratio(rounds, above, below, measure="step_s"):
    """The median of the fastest of `above` over that of the fastest of `below`, and its 90 % interval."""
    draw = random.Random(0)
    of = lambda some: fastest(some, above, measure)[1] / fastest(some, below, measure)[1]  # noqa: E731
    again = sorted(of(draw.choices(rounds, k=len(rounds))) for _ in range(2000))
    return of(rounds), (again[100], again[-101])


def saved(shape, length):
    """The share of a step's operations that the short last layer leaves out."""
    layers, h, i = LAYERS[shape]
    whole = 2 * (4 * h * h + 2 * h * i) + 4 * length * h
    # Keys and values of every token stay; all else runs for one token a sequence.
    short = 2 * 2 * h * h + (2 * (2 * h * h + 2 * h * i) + 4 * length * h) / length
    return (whole - short) / (layers * whole)


def table(kind):
    groups = {g.name: (g, json.loads((SPEED / f"{g.name}-{kind}.json").read_text(encoding="utf-8")))
              for g in GROUPS if (SPEED / f"{g.name}-{kind}.json").exists()}  # fmt: skip
    if not groups:
        return []
    first = next(iter(groups.values()))[1]
    lines = [
        f"## {first['processor']}, {kind}", "",
        f"{first['threads']} threads of {first['cores']} cores; "
        + ", ".join(f"{of} {version}" for of, version in first["libraries"].items()) + "; a commit a group: "
        + ", ".join(f"{name} {stored['commit']}" for name, (_, stored) in groups.items()) + ".", "",
        "| work | ours | fastest of the others | ratio (90 %) | without the short last layer, estimated | at least (aim) | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for title, name, precisions, others, narrow, wide in ROWS:
        figure, aim = wide if kind.startswith("avx512-bf16") else narrow
        wanted = f"{figure} x" + (f" ({aim})" if aim else "")
        if name not in groups:
            lines.append(f"| {title} | not run | | | | {wanted} | |")
            continue
        group, stored = groups[name]
        rounds, ours = stored["rounds"], [f"bitfit {p}" for p in precisions]
        (who, mine), (other, theirs) = fastest(rounds, ours), fastest(rounds, others)
        value, (low, high) = ratio(rounds, others, ours)
        whole = f"{value * (1 - saved(group.shape, group.length)):.2f}" if isinstance(group, Group) else ""
        verdict = "met" if low >= 0.95 * figure else "**below**"
        if len(rounds) < 7:
            verdict += " (too few rounds to tell)"
        lines.append(
            f"| {title} | {who.split()[1]} {mine:.4g} s | {other} {theirs:.4g} s | {value:.2f} ({low:.2f} to {high:.2f}) "
            f"| {whole} | {wanted} | {verdict}, {len(rounds)} rounds |"
        )
    if "base-bitfit" in groups:
        value, (low, high) = ratio(groups["base-bitfit"][1]["rounds"], ["bitfit f32"], ["bitfit full f32"])
        lines += ["", f"A BitFit step takes {value:.2f} ({low:.2f} to {high:.2f}) of a `full` one of this engine, f32."]
    for group, stored in groups.values():
        if isinstance(group, Epoch):
            # Whichever precision was the best on the processor that measured it.
            ours = [name for name in stored["rounds"][0] if name.startswith("bitfit")]
            value, (low, high) = ratio(stored["rounds"], group.others, ours, "whole_s")
            lines += ["", f"{group.name}: the row compares our whole command with their training loop; of whole commands, "
                      f"start and evaluation of dev in both, the ratio is {value:.2f} ({low:.2f} to {high:.2f})."]  # fmt: skip
    if "base-bitfit-32" in groups:
        rounds = groups["base-bitfit-32"][1]["rounds"]
        lines += ["", "| peak memory over the model, BitFit step, BERT-base, 32 x 128 | ours | PyTorch | at most (aim) | |",
                  "| --- | --- | --- | --- | --- |"]  # fmt: skip
        for precision, most, aim in MEMORY:
            _, mine = fastest(rounds, [f"bitfit {precision}"], "peak_over_model_mb")
            theirs_in = f"pytorch {precision}" if f"pytorch {precision}" in rounds[0] else "pytorch f32"
            _, theirs = fastest(rounds, [theirs_in], "peak_over_model_mb")
            # The bench counts 2^20 bytes to a MB; the figures are of 10^6.
            mine, theirs = mine * 1.048576, theirs * 1.048576
            verdict = "met" if mine <= most else "**over**"
            lines.append(f"| {precision} | {mine:.0f} MB | {theirs:.0f} MB | {most} MB ({aim}) | {verdict} |")
    for name, of in [("growth", growth), ("selections", selections), ("tasks", tasks), ("resident", resident)]:
        if name in groups:
            group, stored = groups[name]
            lines += ["", *of([f"bitfit {variant}" for variant in group.ours], stored["rounds"])]
    return [*lines, ""]


def spread(values):
    """The median and the ends of what rounds found."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def growth(names, rounds):
    """The time of a token in larger batches over that of one in the smallest, of a round."""
    lines = ["| BitFit step, BERT-base, length 128 | tokens | s a step | of the time a token takes at 512 (rounds) |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        _, precision, tokens = name.split()
        first = f"bitfit {precision} 512"
        times = [r[name]["step_s"] for r in rounds]
        shares = [r[name]["step_s"] / r[first]["step_s"] * 512 / int(tokens) for r in rounds]
        lines.append(f"| {precision} | {int(tokens):,} | {statistics.median(times):.4g} | {spread(shares)} |")
    return lines


def selections(names, rounds):
    """The time of a step that trains a part, over that of all biases, of a round."""
    lines = ["| BitFit step, BERT-base, 16 x 128 | s a step | of the step that trains every bias (rounds) |", "| --- | --- | --- |"]
    for name in names:
        precision = name.split()[1]
        times = [r[name]["step_s"] for r in rounds]
        shares = [r[name]["step_s"] / r[f"bitfit {precision}"]["step_s"] for r in rounds]
        lines.append(f"| {name.removeprefix('bitfit ')} | {statistics.median(times):.4g} | {spread(shares)} |")
    return lines


def tasks(names, rounds):
    """A batch of 64 tasks over one of a single task: the medians of paired steps, a round each."""
    lines = ["| BERT-base, 64 x 32 tokens | 64 tasks over one, step by step (rounds) |", "| --- | --- |"]
    for name in names:
        lines.append(f"| {name.removeprefix('bitfit ')} | {spread([r[name]['tasks'][1]['ratio'] for r in rounds])} |")
    return lines


def resident(names, rounds):
    """What is resident once the base is loaded and laid out, over its parameters in that precision."""
    width = {"f32": 4, "bf16": 2, "int8": 1}
    lines = ["| BERT-base | resident | of the model in that precision | at most |", "| --- | --- | --- | --- |"]
    for name in names:
        _, precision, method = name.split()
        most = 1.2 if method == "forward" else 2.2
        # The bench counts 2^20 bytes to a MB.
        found = statistics.median(r[name]["model_mb"] for r in rounds) * 2**20
        share = found / (PARAMETERS * width[precision])
        verdict = "met" if share <= most else "**over**"
        lines.append(f"| {name.removeprefix('bitfit ')} | {found / 1e6:.0f} MB | {share:.2f} | {most} {verdict} |")
    return lines


def report():
    kinds = sorted({json.loads(p.read_text(encoding="utf-8"))["kind"] for p in SPEED.glob("*.json")})
    head = [
        "# Speed and memory", "",
        "Both sides in turn in one run, by `scripts/bench_vs_pytorch.sh`; every round is in `results/speed/`. Random tokens, "
        "every sequence of full length, 16 x 128 unless said. A ratio is the fastest of the others over ours, of medians, with "
        "the 90 % interval of 2,000 resamplings of the rounds; a row is met where its lower end is at least 0.95 of the "
        "figure. Our last layer is computed for the first token of each sequence alone, which is all that the head reads; the "
        "ratio without that is estimated by the operations it saves.", "",
    ]  # fmt: skip
    notes = ROOT / "benches" / "NOTES.md"
    tail = [notes.read_text(encoding="utf-8").rstrip(), ""] if notes.exists() else []
    write_aside(REPORT, "\n".join([*head, *(line for kind in kinds for line in table(kind)), *tail]))
    print(f"written to {REPORT.relative_to(ROOT)}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", nargs="?")
    parser.add_argument("rounds", nargs="?", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    a = parser.parse_args()
    by_name = {g.name: g for g in GROUPS}
    names = a.only.split(",") if a.only else list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"no group {unknown[0]}; there are {', '.join(by_name)}")
    groups = [by_name[name] for name in names]
    if a.list:
        print("\n".join(g.name for g in groups))
    elif a.table:
        report()
    elif a.binary is None or a.rounds < 1:
        parser.error("name the bitfit binary and a number of rounds from 1")
    elif os.environ.get("BITFIT_CPU"):
        sys.exit("BITFIT_CPU forces an instruction set: unset it")
    else:
        for group in groups:
            run_group(group, a.binary, a.rounds)
        report()


main()
