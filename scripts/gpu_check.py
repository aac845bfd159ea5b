"""What scripts/gpu_check.sh runs: see there for what it is for.

Every stage leaves one JSON file, DIR/STAGE@CARD.json: when it ran, on which code and card, and what it found or why it
did not run. A stage that has its file is run again only where it is named. `--table` writes RESULTS-cuda.md from what is
there, as every run does at its end.
"""

import argparse
import array
import datetime
import json
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In a bundle the binary lies beside this file; in a checkout this is scripts/.
BUNDLED = (HERE / "bitfit").exists()
ROOT = HERE if BUNDLED else HERE.parent
STAGES = ["ops", "encoder", "train", "bench", "sanitize"]
# The most seconds of a stage.
LIMIT = 300
# Sequences a batch of the benchmark, each of 128 tokens; and runs that are trained as groups of one step.
BATCHES, GROUPS, EACH = [32, 8, 256], 64, 8


def say(*words):
    print(*words, file=sys.stderr, flush=True)


class Tools:
    """The binary, and the library's tests as a program."""

    def __init__(self):
        if BUNDLED:
            self.bitfit, self.tests = HERE / "bitfit", HERE / "tests"
            self.step, self.tokenizer, self.mrpc = HERE / "pytorch_step.py", HERE / "tokenizer", HERE
            self.commit = (HERE / "commit").read_text(encoding="utf-8").strip()
            return
        cargo = ["cargo", "test", "--release", "--locked", "--no-run", "--lib", "--message-format", "json"]
        subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
        built = subprocess.run(cargo, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        named = [json.loads(line).get("executable") for line in built.splitlines() if line.startswith("{")]
        self.tests = Path([name for name in named if name][-1])
        self.bitfit = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "bitfit"
        self.step = ROOT / "benches" / "reference" / "pytorch_step.py"
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        self.tokenizer = cache / "bitfit" / "all-MiniLM-L6-v2"
        self.mrpc = Path(os.environ.get("BITFIT_GLUE_DIR", "none"))
        git = ["git", "describe", "--always", "--dirty"]
        self.commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


class NotRun(Exception):
    """Why a stage, or a part of one, could not run."""


def run(command, seconds, env=None):
    """A finished process; one that takes too long counts as failed."""
    env = {**os.environ, **(env or {})}
    try:
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=max(seconds, 1), env=env)
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return subprocess.CompletedProcess(command, 124, text, f"stopped after {seconds:.0f} s")


def last_json(process, what):
    """The JSON object on the last line of standard output."""
    for line in reversed(process.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise NotRun(f"{what} failed ({process.returncode}): {process.stderr.strip()[-400:]}")


def of_tests(tools, device, which, seconds, wrapper=(), env=None):
    """The library's tests of a name on the card: how many passed, and what they printed."""
    command = [*wrapper, tools.tests, which, "--nocapture", "--test-threads", "1"]
    process = run(command, seconds, {"BITFIT_TEST_DEVICE": device, **(env or {})})
    summary = re.search(r"(\d+) passed; (\d+) failed", process.stdout)
    printed = [line for line in process.stdout.splitlines() if line.startswith("on the card: ")]
    failed = [line for line in process.stdout.splitlines() if line.endswith("FAILED")]
    if "panicked" in process.stderr:
        failed += [line for line in process.stderr.splitlines() if "panicked" in line or ": " in line][-20:]
    passed = process.returncode == 0 and summary is not None and int(summary[1]) > 0
    return {
        "ok": passed,
        "passed": int(summary[1]) if summary else 0,
        "failed": int(summary[2]) if summary else None,
        "printed": [line.removeprefix("on the card: ") for line in printed],
        "errors": failed if not passed else [],
        "stderr": "" if passed else process.stderr.strip()[-3000:],
    }


def ops(tools, device, end):
    return of_tests(tools, device, "cuda::tests::on_a_card", end - time.time())


def encoder(tools, device, end):
    return of_tests(tools, device, "encoder::tests_on_a_grid::on_a_card", end - time.time())


def random_base(tools, folder):
    """A base of the default's shape with random weights, and the default's tokenizer."""
    source = tools.tokenizer
    if not (source / "tokenizer.json").exists():
        raise NotRun(f"{source} has no tokenizer: scripts/fetch-base.sh brings it")
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder)
    shutil.copy(source / "config.json", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    h, i, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    vectors = {"weight": 1.0, "bias": 0.0}
    tensors = {}
    embeddings = {
        "word": config["vocab_size"],
        "position": config["max_position_embeddings"],
        "token_type": config["type_vocab_size"],
    }
    for name, rows in embeddings.items():
        tensors[f"embeddings.{name}_embeddings.weight"] = ([rows, h], None)
    norms = ["embeddings"]
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        linear = {"attention.self.query": (h, h), "attention.self.key": (h, h), "attention.self.value": (h, h)}
        linear |= {"attention.output.dense": (h, h), "intermediate.dense": (i, h), "output.dense": (h, i)}
        for name, shape in linear.items():
            tensors[f"{at}.{name}.weight"] = (list(shape), None)
            tensors[f"{at}.{name}.bias"] = ([shape[0]], None)
        norms += [f"{at}.attention.output", f"{at}.output"]
    for at in norms:
        for name, value in vectors.items():
            tensors[f"{at}.LayerNorm.{name}"] = ([h], value)
    tensors["pooler.dense.weight"] = ([h, h], None)
    tensors["pooler.dense.bias"] = ([h], None)
    # Uniform, of the spread that BERT starts with.
    draw, width = random.Random(0), 0.02 * 12**0.5
    steps = [((byte + 0.5) / 256 - 0.5) * width for byte in range(256)]
    header, data, offset = {}, [], 0
    for name, (shape, value) in sorted(tensors.items()):
        n = 1
        for size in shape:
            n *= size
        numbers = [value] * n if value is not None else map(steps.__getitem__, draw.randbytes(n))
        data.append(array.array("f", numbers).tobytes())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + 4 * n]}
        offset += 4 * n
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        out.writelines(data)


def train(tools, device, end):
    if not (tools.mrpc / "MRPC" / "train.tsv").exists():
        raise NotRun("MRPC is not at hand: BITFIT_GLUE_DIR names GLUE's folder")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        base = work / "base"
        random_base(tools, base)

        def trained(name, where, precision="f32"):
            out = work / name
            command = [tools.bitfit, "train", "--task", "mrpc", "--data", tools.mrpc, "--base", base, "--out", out]
            command += ["--epochs", "1", "--seed", "7", "--device", where, "--precision", precision, "--json"]
            began = time.time()
            found = last_json(run(command, end - time.time()), f"training on {where}")
            lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
            return {"found": found, "losses": losses, "patch": (out / "patch.safetensors").read_bytes(), "seconds": time.time() - began}

        first, again = trained("first", device), trained("again", device)
        rounded = trained("rounded", device, "bf16")
        host = trained("host", "cpu")
        off = [abs(a / b - 1) for a, b in zip(first["losses"], host["losses"])]
        return {
            "ok": first["patch"] == again["patch"] and max(off) < 1e-3,
            "same_patch_twice": first["patch"] == again["patch"],
            "largest_difference_of_losses": max(off),
            "metrics": {name: run["found"]["metrics"] for name, run in [("cuda f32", first), ("cuda bf16", rounded), ("cpu f32", host)]},
            "tokens_per_s": {name: run["found"]["tokens_per_s"] for name, run in [("cuda f32", first), ("cuda bf16", rounded), ("cpu f32", host)]},
        }


def bench(tools, device, end):
    torch = run([sys.executable, "-c", "import torch, transformers; print(torch.cuda.is_available())"], 120)
    with_torch = "True" in torch.stdout

    def ours(batch, *more):
        command = [tools.bitfit, "bench", "--shape", "base", "--batch", batch, "--length", 128, "--precision", "bf16"]
        command += ["--device", device, "--steps", 20, "--json", *more]
        return last_json(run(command, min(90, end - time.time())), "bitfit bench")

    def theirs(batch, *more):
        command = [sys.executable, tools.step, "--shape", "base", "--batch", batch, "--length", 128, "--dtype", "bf16"]
        command += ["--device", "cuda", "--steps", 20, *more]
        return last_json(run(command, min(120, end - time.time())), "pytorch_step.py")

    rows, missing = [], [] if with_torch else ["PyTorch and transformers with CUDA are not there"]
    sides = {"ours": ours}
    if with_torch:
        sides |= {"eager": theirs, "compiled": lambda batch: theirs(batch, "--compile")}
    # What a step costs is asked in turn, as long as there is time; every batch at least once.
    for turn in range(3):
        for batch in BATCHES:
            for side, ask in sides.items():
                if turn > 0 and (time.time() > end - 90 or side == "compiled"):
                    continue
                try:
                    rows.append({"batch": batch, "side": side, "turn": turn, **ask(batch)})
                except NotRun as why:
                    missing.append(f"{side} at {batch} x 128: {why}")
    groups = None
    try:
        groups = ours(GROUPS * EACH, "--tasks", GROUPS)
    except NotRun as why:
        missing.append(f"{GROUPS} groups: {why}")
    return {"ok": not missing, "rows": rows, "groups": groups, "missing": missing}


def sanitize(tools, device, end):
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        raise NotRun("compute-sanitizer is not there: it comes with the CUDA toolkit")
    found = {}
    for check in ["memcheck", "initcheck", "racecheck", "synccheck"]:
        wrapper = [tool, "--tool", check, "--error-exitcode", "9"]
        # A graph hides which kernel is at fault.
        env = {"BITFIT_CUDA_GRAPHS": "0", "BITFIT_TEST_TINY": "1"}
        of_check = of_tests(tools, device, "cuda::tests::on_a_card", end - time.time(), wrapper, env)
        found[check] = of_check
    return {"ok": all(of["ok"] for of in found.values()), "checks": found}


def card(tools, device):
    """The card and its libraries, as the binary tells."""
    command = [tools.bitfit, "bench", "--shape", "minilm", "--batch", 1, "--length", 16, "--steps", 1, "--device", device, "--json"]
    return last_json(run(command, 240), "bitfit bench")["path"]


def write_aside(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, path)


def median(rows, batch, side):
    times = [row["step_s"] for row in rows if row["batch"] == batch and row["side"] == side]
    return statistics.median(times) if times else None


def ratio(above, below):
    return "not run" if above is None or below is None else f"{above / below:.2f}"


def table(results):
    """RESULTS-cuda.md, from a list of result files."""
    lines = ["# On NVIDIA GPUs", ""]
    lines += ["Written by `scripts/gpu_check.sh`; every figure lies in `results/cuda/`."]
    ran = {stage for result in results for stage in [result["stage"]] if "not_run" not in result}
    never = [stage for stage in STAGES if stage not in ran]
    if never:
        what = {
            "ops": "every op against the CPU on a card: kernels as machine code, `mma` and `ldmatrix` by the card's own "
            "lane layout, products by cuBLASLt",
            "encoder": "whole steps and groups on a card, the same bits alone and beside others among them",
            "train": "MRPC for an epoch on a card and on the CPU; the same patch twice",
            "bench": "speed and memory beside PyTorch; the card's share of its bf16 rate; 64 runs as groups",
            "sanitize": "compute-sanitizer",
        }
        lines += ["", "**Has never run on a GPU**", ""]
        lines += [f"- `--stage {stage}`: {what[stage]}." for stage in never]
        lines += ["", "What stands in for them until then, without a GPU and in every run of the tests: the same kernel"]
        lines += ["sources and the same launch code on an emulated grid, against f64 references and whole steps of the CPU;"]
        lines += ["all kernels compiled to machine code for sm_80, sm_90a and sm_100a without spills or stack."]
    for result in results:
        stage, at = result["stage"], result["card"]
        lines += ["", f"## {stage}, {at}", "", f"commit {result['commit']}, {result['when']}.", ""]
        if "not_run" in result:
            lines += [f"Not run: {result['not_run']}."]
            continue
        found = result["found"]
        if stage in ("ops", "encoder"):
            lines += [f"{found['passed']} passed, {found['failed']} failed.", ""]
            lines += [f"- {line}" for line in found["printed"] + found["errors"]]
        elif stage == "sanitize":
            lines += ["| check | |", "| --- | --- |"]
            lines += [f"| {name} | {'clean' if of['ok'] else 'found something, see the file'} |" for name, of in found["checks"].items()]
        elif stage == "train":
            lines += [f"The same patch twice: {'yes' if found['same_patch_twice'] else 'NO'}. Largest difference of a loss "
                      f"to the CPU's: {found['largest_difference_of_losses']:.1e}.", ""]
            lines += ["| | metrics on dev | tokens a second |", "| --- | --- | --- |"]
            lines += [f"| {name} | {metrics} | {found['tokens_per_s'][name]:.0f} |" for name, metrics in found["metrics"].items()]
        else:
            rows = found["rows"]
            lines += ["BERT-base BitFit step in bf16, 128 tokens a sequence; ratios are of medians.", ""]
            lines += ["| batch | ours | eager / ours (at least 1.5) | compiled / ours (at least 1.1) | share of the card's bf16 rate | memory over the model, ours / eager's (at most 0.5) |", "| --- | --- | --- | --- | --- | --- |"]
            for batch in BATCHES:
                own = [row for row in rows if row["batch"] == batch and row["side"] == "ours"]
                eager = [row for row in rows if row["batch"] == batch and row["side"] == "eager"]
                step = median(rows, batch, "ours")
                if step is None:
                    lines += [f"| {batch} | not run | | | | |"]
                    continue
                share = own[0].get("share_of_peak")
                share = "" if share is None else f"{100 * share:.0f} % of {own[0]['peak_gflops'] / 1e3:.0f} TFLOP/s"
                memory = ratio(own[0].get("peak_over_model_mb"), eager[0]["peak_over_model_mb"]) if eager else "not run"
                lines += [f"| {batch} | {1e3 * step:.2f} ms | {ratio(median(rows, batch, 'eager'), step)} | {ratio(median(rows, batch, 'compiled'), step)} | {share} | {memory} |"]
            if found["groups"]:
                whole = found["groups"]["step_s"]
                alone, eager = median(rows, EACH, "ours"), median(rows, EACH, "eager")
                after = lambda one: None if one is None else GROUPS * one  # noqa: E731
                lines += ["", f"{GROUPS} runs of {EACH} x 128 tokens as groups of one step: {1e3 * whole:.1f} ms; one after another "
                          f"they take {ratio(after(alone), whole)} times that here (at least 2), {ratio(after(eager), whole)} times in PyTorch eager (at least 10)."]
            lines += [f"- not run: {why}" for why in found["missing"]]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default=",".join(STAGES))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=ROOT / ("results" if BUNDLED else "benches/results/cuda"))
    parser.add_argument("--table", action="store_true", help="write RESULTS-cuda.md from what is there, and run nothing")
    args = parser.parse_args()
    stages = args.stage.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"--stage: expected {', '.join(STAGES)}, found {unknown[0]}")
    page = (ROOT if BUNDLED else ROOT / "benches") / "RESULTS-cuda.md"
    failed = []
    if not args.table:
        tools = Tools()
        try:
            at = card(tools, args.device)
        except NotRun as why:
            say(f"gpu_check: {why}")
            return 1
        say(f"gpu_check: {at}")
        name = re.sub(r"[^a-z0-9]+", "-", at.split("(")[0].strip().lower())
        for stage in stages:
            began = time.time()
            when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            result = {"stage": stage, "card": at, "commit": tools.commit, "when": when}
            try:
                result["found"] = {"ops": ops, "encoder": encoder, "train": train, "bench": bench, "sanitize": sanitize}[stage](
                    tools, args.device, began + LIMIT
                )
                if not result["found"]["ok"]:
                    failed.append(stage)
            except NotRun as why:
                result["not_run"] = str(why)
            result["seconds"] = round(time.time() - began, 1)
            say(f"gpu_check: {stage}: {result.get('not_run') or ('ok' if stage not in failed else 'FAILED')}, {result['seconds']} s")
            write_aside(args.out / f"{stage}@{name}.json", json.dumps(result, indent=1) + "\n")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.out.glob("*@*.json"))]
    results.sort(key=lambda result: (result["card"], STAGES.index(result["stage"])))
    write_aside(page, table(results))
    say(f"gpu_check: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
