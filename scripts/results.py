#!/usr/bin/env python3
"""The training table: `bitfit train` beside PyTorch + transformers, a committed JSON file a cell.

usage: results.py [--side bitfit|pytorch|both] [--only TEXT] [--glue DIR] [--base DIR] [--threads N] [--list]
       results.py --table | --precisions

Runs every cell of ROWS that has no file yet in benches/results/glue/ and writes it; one that exists is skipped, so a
stopped run goes on where it was (a cell's file is written aside and renamed: it is whole or absent). `--only mrpc-full`
takes the cells whose name contains that text. `--table` prints the Markdown table of what is there, every seed of it,
`--precisions` that of training in bf16 and of inference in bytes.

The side `bitfit` needs target/release/bitfit (scripts/results.sh builds it). The side `pytorch` needs an interpreter
with torch, transformers, scikit-learn and scipy, named by $BITFIT_PYTHON, and the base as a folder. It runs in bf16
autocast, as the cells that were there before this runner did; on a processor without bf16 that takes ten times longer.

A cell: {"task", "method", "seed", "side", "settings", "epoch", "split", "examples", "metrics": {NAME: 0 to 1},
"seconds", "command", "processor", "threads", "commit", "note"}; where training was in bf16 also "scored": {HOW: metrics},
the same patch on dev in every precision. In a command GLUE, BASE and RUN stand for folders.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from measured import cpu, write_aside

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "benches" / "results" / "glue"
RUNS = ROOT / "target" / "results"
SIDES = ("bitfit", "pytorch")


class Row(NamedTuple):
    """One line of the table: a task and method at one setting, over seeds that were fixed beforehand."""

    task: str
    method: str
    learning_rate: str
    epochs: int
    seeds: tuple
    variant: str = ""  # tells rows of one task and method apart, in the cells' names
    precision: str = "f32"  # what `bitfit` trains in


ROWS = [
    Row("mrpc", "bitfit", "3e-3", 6, (0, 1, 2)),
    Row("mrpc", "full", "5e-5", 3, (0, 1)),
    Row("mrpc", "frozen", "3e-3", 6, (0, 1)),
    Row("stsb", "bitfit", "3e-3", 3, (0, 1, 2)),
    Row("cola", "bitfit", "3e-3", 5, (0,)),
    Row("cola", "bitfit", "1e-3", 5, (0,), "lr1e-3"),
    Row("cola", "bitfit", "1e-2", 5, (0,), "lr1e-2"),
    Row("rte", "bitfit", "3e-3", 5, (0,)),
]
# The same runs in bf16, on our side alone; each patch is scored in every precision.
BF16_ROWS = [
    Row("mrpc", "bitfit", "3e-3", 6, (0, 1, 2), "bf16", "bf16"),
    Row("stsb", "bitfit", "3e-3", 3, (0, 1, 2), "bf16", "bf16"),
]
# How a bf16 cell's patch is scored: --precision and BITFIT_CPU. AVX2 multiplies bytes by weights of seven bits.
SCORED = {"f32": ("f32", ""), "bf16": ("bf16", ""), "int8": ("int8", ""), "int8 by avx2": ("int8", "avx2")}
# The same for every cell, on both sides. The last epoch counts: no choice is made on dev.
COMMON = {
    "batch_size": 16, "schedule": "linear", "warmup": 0.06, "max_length": 128, "epsilon": 1e-6, "max_grad_norm": 1.0,
    "weight_decay": 0.0, "keep": "last",
}  # fmt: skip
METRICS = {"mrpc": ("f1", "accuracy"), "stsb": ("spearman", "pearson"), "cola": ("matthews",), "rte": ("accuracy",)}
TITLES = {
    "mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA", "rte": "RTE", "f1": "F1", "accuracy": "accuracy",
    "spearman": "Spearman", "pearson": "Pearson", "matthews": "Matthews",
}  # fmt: skip


class Cell(NamedTuple):
    row: Row
    seed: int
    side: str

    @property
    def name(self):
        parts = [
            self.row.task,
            self.row.method,
            self.row.variant,
            f"s{self.seed}",
            "" if self.side == "bitfit" else self.side,
        ]
        return "-".join(part for part in parts if part)

    @property
    def path(self):
        return CELLS / f"{self.name}.json"

    def settings(self):
        precision = {} if self.row.precision == "f32" else {"precision": self.row.precision}
        return {"learning_rate": float(self.row.learning_rate), "epochs": self.row.epochs, **COMMON, **precision}

    def read(self):
        """What is on disk, or None. A file made with other settings than the table's is an error, not a result."""
        if not self.path.exists():
            return None
        found = json.loads(self.path.read_text(encoding="utf-8"))
        if found["settings"] != self.settings():
            sys.exit(
                f"{self.path.relative_to(ROOT)} was made with {found['settings']}, the table asks for "
                f"{self.settings()}: delete the file, or give the row a variant"
            )
        return found

    def command(self, places, threads):
        """The command line, with these values for GLUE, BASE and RUN."""
        row, same = self.row, ["--epochs", str(self.row.epochs), "--seed", str(self.seed), "--threads", str(threads)]
        if self.side == "bitfit":
            base = ["--base", places["BASE"]] if places["BASE"] else []
            precision = [] if row.precision == "f32" else ["--precision", row.precision]
            return [
                "target/release/bitfit", "train", *base, "--task", row.task, "--data", places["GLUE"],
                "--method", row.method, "--learning-rate", row.learning_rate, *same, "--batch-size", "16",
                "--schedule", "linear", "--warmup", "0.06", "--max-length", "128", "--keep", "last",
                "--out", places["RUN"], "--overwrite", *precision, "--json",
            ]  # fmt: skip
        return [
            places["PYTHON"], "benches/reference/pytorch_train.py", places["BASE"], places["GLUE"],
            row.task, row.method, "--lr", row.learning_rate, *same, "--batch", "16", "--max-len", "128",
            "--schedule", "linear", "--bf16",
        ]  # fmt: skip


def all_cells():
    both = [Cell(row, seed, side) for row in ROWS for seed in row.seeds for side in SIDES]
    return both + [Cell(row, seed, "bitfit") for row in BF16_ROWS for seed in row.seeds]


# Running --------------------------------------------------------------------------------------------------------------


def processor():
    """Its name and the widest arithmetic it has: cloud machines of different kinds share a name."""
    found = cpu()
    if found is None:
        return "unknown"
    name, flags = found
    known = {"avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
    return ", ".join([name, *[shown for flag, shown in known.items() if flag in flags][:1]])


def commit():
    """The commit that ran, marked where sources differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "src", "Cargo.toml", "Cargo.lock"], capture_output=True, text=True
    )
    return head + (" with changes" if changed.stdout.strip() else "")


def last_json(text):
    """The last line of a program's output that is a JSON object."""
    for line in reversed(text.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None


def metrics_of(cell, printed):
    """The task's metrics as printed by either side."""
    found = (
        printed["metrics"]
        if cell.side == "bitfit"
        else {"matthews" if k == "mcc" else k: v for k, v in printed.items()}
    )
    return {name: found[name] for name in METRICS[cell.row.task]}


def scored(cell, a, out):
    """The metrics of a run's patch on dev in every precision."""
    found = {}
    for how, (precision, path) in SCORED.items():
        command = ["target/release/bitfit", "eval", "--patch", str(out / "patch.safetensors"), "--data", str(a.glue)]
        command += ["--base", str(a.base)] if a.base else []
        environment = {**os.environ, "BITFIT_CPU": path} if path else None
        done = subprocess.run(
            [*command, "--precision", precision, "--threads", str(a.threads), "--json"], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found[how] = metrics_of(cell, last_json(done.stdout))
    return found


def dev_rows(glue, task):
    folder = {"mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA", "rte": "RTE"}[task]
    lines = (glue / folder / "dev.tsv").read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    return len(lines) - (0 if task == "cola" else 1)


def run(cell, a):
    """Runs one cell; an error message, or None."""
    out = RUNS / cell.name
    out.parent.mkdir(parents=True, exist_ok=True)
    places = {
        "GLUE": str(a.glue),
        "BASE": str(a.base or ""),
        "RUN": str(out),
        "PYTHON": os.environ.get("BITFIT_PYTHON", "python3"),
    }
    started = time.monotonic()
    done = subprocess.run(cell.command(places, a.threads), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - started
    if done.returncode in (130, -2):
        raise KeyboardInterrupt
    printed = last_json(done.stdout)
    if done.returncode != 0 or printed is None:
        return f"exit code {done.returncode}" + ("" if printed else ", and no JSON object on standard output")
    try:
        metrics = metrics_of(cell, printed)
    except KeyError as missing:
        return f"no metric {missing} in {json.dumps(printed)}"
    shown = cell.command(
        {"GLUE": "GLUE", "BASE": "BASE" if a.base else "", "RUN": "RUN", "PYTHON": "python3"}, a.threads
    )
    write_aside(cell.path, json.dumps({
        "task": cell.row.task, "method": cell.row.method, "seed": cell.seed, "side": cell.side,
        "settings": cell.settings(), "epoch": cell.row.epochs, "split": "dev",
        "examples": printed.get("examples") or dev_rows(a.glue, cell.row.task), "metrics": metrics,
        "seconds": round(seconds, 1), "command": shlex.join(shown), "processor": processor(), "threads": a.threads,
        "commit": commit(), "note": "",
        **({} if cell.row.precision == "f32" else {"scored": scored(cell, a, out)}),
    }, indent=1) + "\n")  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    print(f"  {metrics} in {seconds:.0f} s", file=sys.stderr)
    return None


def run_all(cells, a):
    """Runs what is missing; the exit code."""
    missing = [cell for cell in cells if cell.read() is None]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are there", file=sys.stderr)
    if not missing:
        return 0
    if a.glue is None or not a.glue.is_dir():
        sys.exit("name the folder that holds MRPC/, STS-B/ and so on: --glue DIR or BITFIT_GLUE_DIR")
    sides = {cell.side for cell in missing}
    if "bitfit" in sides and not (ROOT / "target/release/bitfit").exists():
        sys.exit("target/release/bitfit is not there: cargo build --release")
    if "pytorch" in sides and not (a.base and a.base.is_dir()):
        sys.exit("the pytorch side needs the base as a folder: scripts/fetch-base.sh, or --base DIR")
    failed = []
    for i, cell in enumerate(missing, 1):
        print(f"[{i}/{len(missing)}] {cell.name}", file=sys.stderr)
        error = run(cell, a)
        if error:
            print(f"  {cell.name} failed: {error}", file=sys.stderr)
            failed.append(cell.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


# The table ------------------------------------------------------------------------------------------------------------


def column(row, side, metric, notes):
    """Mean, range and every seed of one side: `86.1 (85.3 to 86.8; s0 86.0, s1 85.3, s2 86.8)`."""
    shown, values = [], []
    for seed in row.seeds:
        found = Cell(row, seed, side).read()
        if found is None:
            shown.append(f"s{seed} not run")
            continue
        value = 100 * found["metrics"][metric]
        mark = ""
        if found.get("note"):
            if found["note"] not in notes:
                notes.append(found["note"])
            mark = f"<sup>{notes.index(found['note']) + 1}</sup>"
        values.append(value)
        shown.append(f"s{seed} {value:.1f}{mark}")
    if not values:
        return "not run"
    if len(row.seeds) == 1:
        return shown[0]
    spread = f"{min(values):.1f} to {max(values):.1f}; " if len(values) > 1 else ""
    mean = f"{statistics.mean(values):.1f}" + (
        "" if len(values) == len(row.seeds) else f" of {len(values)} of {len(row.seeds)} seeds"
    )
    return f"{mean} ({spread}{', '.join(shown)})"


ABOUT = (
    "Dev set after the last epoch, times 100: mean (range; each seed s). Batch 16, linear schedule with warm-up over "
    "0.06 of the steps, length 128, AdamW with epsilon 1e-6 and no decay, clipping at 1.0, dropout on. The seeds were "
    "fixed beforehand and none is left out. Each cell is a file in `benches/results/glue/` with its command."
)
CLEAN = (
    "The base (all-MiniLM-L6-v2) was trained on sentence pairs that include AllNLI, Quora pairs and image captions: "
    "RTE and STS-B are not clean tests for it; MRPC and CoLA are. RTE's 277 dev rows carry a standard error of three "
    "points."
)


def table():
    notes, lines = [], []
    lines.append("| task | method | learning rate, epochs | metric | `bitfit` | PyTorch + transformers |")
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        for metric in METRICS[row.task]:
            cells = [column(row, side, metric, notes) for side in SIDES]
            start = f"| {TITLES[row.task]} | {row.method} | {row.learning_rate}, {row.epochs} | {TITLES[metric]} |"
            lines.append(f"{start} {cells[0]} | {cells[1]} |")
    lines += ["", ABOUT, "", CLEAN]
    found = [(cell, cell.read()) for cell in all_cells()]
    for side in SIDES:
        made = {(f["processor"], f["threads"]) for cell, f in found if f and cell.side == side and f["processor"]}
        if made:
            kinds = "; ".join(f"{p}, {t} thread{'s' * (t > 1)}" for p, t in sorted(made))
            lines += ["", f"{side} ran on {kinds}."]
    lines += [line for i, note in enumerate(notes, 1) for line in ("", f"<sup>{i}</sup> {note}")]
    print("\n".join(lines))


def precisions():
    """The table of runs trained in bf16, beside f32's."""
    # How a patch scores: the mean over the seeds, and the largest loss of one against itself in f32.
    shown = " | ".join(f"those patches in {how}" for how in SCORED)
    lines = [
        f"| task | metric | trained in f32 | trained in bf16 | {shown} |",
        "| --- | --- | --- | --- | " + " | ".join("---" for _ in SCORED) + " |",
    ]
    for row in BF16_ROWS:
        in_f32 = next(of for of in ROWS if (of.task, of.method, of.variant) == (row.task, row.method, ""))
        cells = [found for seed in row.seeds if (found := Cell(row, seed, "bitfit").read())]
        if not cells:
            continue
        for metric in METRICS[row.task]:
            means = []
            for how in SCORED:
                mean = statistics.mean(cell["scored"][how][metric] for cell in cells)
                loss = max(cell["scored"]["f32"][metric] - cell["scored"][how][metric] for cell in cells)
                means.append(f"{100 * mean:.2f}" + ("" if how == "f32" else f" ({100 * loss:.2f})"))
            columns = [column(of, "bitfit", metric, []) for of in (in_f32, row)]
            lines.append(f"| {TITLES[row.task]} | {TITLES[metric]} | {' | '.join(columns + means)} |")
    print("\n".join(lines))


def main():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitfit" / "all-MiniLM-L6-v2"
    glue = os.environ.get("BITFIT_GLUE_DIR")
    arguments = argparse.ArgumentParser(description="Runs and prints the training table.")
    arguments.add_argument("--table", action="store_true", help="print the Markdown table and stop")
    arguments.add_argument("--precisions", action="store_true", help="print the table of bf16 and int8 and stop")
    arguments.add_argument("--list", action="store_true", help="print the cells and whether each is there, and stop")
    arguments.add_argument("--side", choices=[*SIDES, "both"], default="bitfit")
    arguments.add_argument("--only", default="", help="cells whose name contains this")
    arguments.add_argument("--glue", type=Path, default=Path(glue) if glue else None)
    arguments.add_argument("--base", type=Path, default=cache if cache.is_dir() else None)
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    a = arguments.parse_args()
    # Programs run in the repository's root, wherever this one was called.
    a.glue, a.base = (path and path.resolve() for path in (a.glue, a.base))
    if a.table:
        return table()
    if a.precisions:
        return precisions()
    cells = [cell for cell in all_cells() if a.side in (cell.side, "both") and a.only in cell.name]
    if not cells:
        sys.exit(f"no cell's name contains `{a.only}`: see --list")
    if a.list:
        for cell in cells:
            print(f"{cell.name}: {'there' if cell.read() else 'missing'}")
        return 0
    try:
        return run_all(cells, a)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the cell that was running", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
