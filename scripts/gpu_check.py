"""What scripts/gpu_check.sh runs: see there for what it is for.

Every stage leaves one JSON file, DIR/STAGE@CARD.json: when it ran, on which code and card, and what it found or why it
did not run; the benchmark's is written after each of its parts. `--table` writes RESULTS-cuda.md from what is there, as
every run does at its end. Results of a bundle are copied to benches/results/cuda of a checkout, where `--table` makes the
page of all of them.
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
import sysconfig
import tempfile
import time
import traceback
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


def libraries():
    """Where this Python's packages keep NVRTC and cuBLASLt, as PyTorch brings them along; added to what the user named."""
    homes = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = [str(folder) for home in homes if home for folder in sorted(Path(home).glob("nvidia/*/lib"))]
    return os.pathsep.join([*filter(None, [os.environ.get("BITFIT_CUDA_LIBS")]), *found])


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
    env = {**os.environ, "BITFIT_CUDA_LIBS": libraries(), **(env or {})}
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
    # The first line of a test stands behind its name.
    printed = re.findall(r"on the card: (.*)", process.stdout)
    if "skipped: " in process.stdout:
        raise NotRun("the tests found no card named in their environment")
    passed = process.returncode == 0 and summary is not None and bool(printed)
    errors = re.findall(r"^.*FAILED$", process.stdout, re.M)
    errors += re.findall(r"panicked at .*\n.*", process.stdout + process.stderr)
    return {
        "ok": passed,
        "stopped": process.returncode == 124,
        "passed": int(summary[1]) if summary else 0,
        "failed": int(summary[2]) if summary else 0,
        "printed": printed,
        "errors": [] if passed else errors[:20],
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
            patch = (out / "patch.safetensors").read_bytes()
            return {"found": found, "losses": losses, "patch": patch, "seconds": time.time() - began}

        first, again = trained("first", device), trained("again", device)
        rounded = trained("rounded", device, "bf16")
        host = trained("host", "cpu")
        off = [abs(a / b - 1) for a, b in zip(first["losses"], host["losses"])]
        if not off:
            raise NotRun("training wrote no losses")
        runs = {"cuda f32": first, "cuda bf16": rounded, "cpu f32": host}
        return {
            # The first losses are held to the CPU's. Later ones part: Adam turns the noise of tiny gradients into steps.
            "ok": first["patch"] == again["patch"] and off[0] < 1e-3 and off[-1] < 0.1,
            "same_patch_twice": first["patch"] == again["patch"],
            "differences_of_losses": off,
            "metrics": {name: of["found"]["metrics"] for name, of in runs.items()},
            "tokens_per_s": {name: of["found"]["tokens_per_s"] for name, of in runs.items()},
        }


def bench(tools, device, end, keep):
    # Both sides on the same card, by whatever number.
    only = {"CUDA_VISIBLE_DEVICES": device.partition(":")[2] or os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    probe = [sys.executable, "-c", "import torch, transformers; print(torch.cuda.is_available())"]
    with_torch = "True" in run(probe, 120, only).stdout
    found = {"ok": True, "rows": [], "groups": None, "missing": []}
    if not with_torch:
        found["missing"].append("PyTorch and transformers with CUDA are not there: nothing to compare with")

    def ours(batch, *more):
        command = [tools.bitfit, "bench", "--shape", "base", "--batch", batch, "--length", 128, "--precision", "bf16"]
        command += ["--device", "cuda", "--steps", 20, "--json", *more]
        return last_json(run(command, min(90, end - time.time()), only), "bitfit bench")

    def theirs(batch, *more):
        command = [sys.executable, tools.step, "--shape", "base", "--batch", batch, "--length", 128, "--dtype", "bf16"]
        command += ["--device", "cuda", "--steps", 20, *more]
        return last_json(run(command, min(100, end - time.time()), only), "pytorch_step.py")

    def groups():
        found["groups"] = ours(GROUPS * EACH, "--tasks", GROUPS)

    def row(side, ask, batch):
        return lambda: found["rows"].append({"batch": batch, "side": side, **ask(batch)})

    # What is wanted most comes first, then the others in turn, as long as there is time.
    sides = {"ours": ours, "eager": theirs, "compiled": lambda batch: theirs(batch, "--compile")}
    sides = sides if with_torch else {"ours": ours}
    of = lambda side: [(f"{side} at {batch} x 128", row(side, sides[side], batch)) for batch in BATCHES if side in sides]  # noqa: E731
    turns = [pair for pairs in zip(of("ours"), of("eager") or of("ours")) for pair in pairs]
    parts = [*of("ours"), (f"{GROUPS} groups", groups), *(of("eager") if with_torch else [])]
    parts += [*(of("compiled") if with_torch else []), *turns, *turns]
    for i, (name, part) in enumerate(parts):
        if time.time() > end - 20:
            late = [name for name, _ in parts[i:] if name not in {name for name, _ in parts[:i]}]
            found["missing"] += [f"{name}: no time was left" for name in dict.fromkeys(late)]
            break
        try:
            part()
        except NotRun as why:
            found["missing"].append(f"{name}: {why}")
            found["ok"] &= not name.startswith(("ours", str(GROUPS)))
        keep(found)
    return found


def sanitize(tools, device, end):
    homes = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"])
    places = [None, *(f"{home}/bin" for home in homes)]
    tool = next(filter(None, (shutil.which("compute-sanitizer", path=place) for place in places)), None)
    if tool is None:
        raise NotRun("compute-sanitizer is not there: it comes with the CUDA toolkit")
    found, checks = {}, ["memcheck", "racecheck", "synccheck", "initcheck"]
    for i, check in enumerate(checks):
        wrapper = [tool, "--tool", check, "--error-exitcode", "9"]
        # A graph hides which kernel is at fault.
        env = {"BITFIT_CUDA_GRAPHS": "0", "BITFIT_TEST_TINY": "1"}
        share = (end - time.time()) / (len(checks) - i)
        found[check] = of_tests(tools, device, "cuda::tests::on_a_card", share, wrapper, env)
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
    return None if above is None or below is None else above / below


def judged(value, least=None, most=None):
    """A ratio in a table, and whether it is what was asked for."""
    if value is None:
        return "not run"
    met = (least is None or value >= least) and (most is None or value <= most)
    return f"{value:.2f}" if met else f"{value:.2f} **below**" if least is not None else f"{value:.2f} **above**"


def bench_table(found):
    rows = found["rows"]
    lines = ["BERT-base BitFit step in bf16, 128 tokens a sequence; ratios are of medians.", ""]
    lines += ["| batch | ours | eager / ours (at least 1.5) | compiled / ours (at least 1.1) | share of the card's bf16 rate "
              "| memory over the model, ours / eager's (at most 0.5) |", "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for batch in BATCHES:
        own, eager = ([row for row in rows if (row["batch"], row["side"]) == (batch, side)] for side in ("ours", "eager"))
        step = median(rows, batch, "ours")
        if step is None:
            lines += [f"| {batch} | not run | | | | |"]
            continue
        share = own[0].get("share_of_peak")
        share = "" if share is None else f"{100 * share:.0f} % of {own[0]['peak_gflops'] / 1e3:.0f} TFLOP/s"
        memory = ratio(own[0].get("peak_over_model_mb"), eager[0]["peak_over_model_mb"]) if eager else None
        cells = [judged(ratio(median(rows, batch, side), step), least) for side, least in [("eager", 1.5), ("compiled", 1.1)]]
        lines += [f"| {batch} | {1e3 * step:.2f} ms | {cells[0]} | {cells[1]} | {share} | {judged(memory, most=0.5)} |"]
    if found["groups"]:
        whole = found["groups"]["step_s"]
        after = [(median(rows, EACH, side), name, least) for side, name, least in [("ours", "here", 2), ("eager", "in PyTorch eager", 10)]]
        after = [f"{judged(ratio(one and GROUPS * one, whole), least)} times that {name} (at least {least})" for one, name, least in after]
        lines += ["", f"{GROUPS} runs of {EACH} x 128 tokens as groups of one step: {1e3 * whole:.1f} ms; one after another they "
                  f"take {', '.join(after)}."]  # fmt: skip
    return lines + ["", *(f"- not run: {why}" for why in found["missing"])]


def table(results):
    """RESULTS-cuda.md, from a list of result files."""
    lines = ["# On NVIDIA GPUs", ""]
    lines += ["Written by `scripts/gpu_check.sh`; every figure lies in a file of its stage and card, in `results/`."]
    ran = {result["stage"] for result in results if "found" in result}
    never = [stage for stage in STAGES if stage not in ran]
    if never:
        what = {
            "ops": "every op against f64 on a card (1e-5 in f32, 2e-2 in bf16): kernels as machine code, `mma` and "
            "`ldmatrix` by the card's own lane layout, products by cuBLASLt",
            "encoder": "a whole step of BERT-base against the CPU (gradients within 1e-4 in f32); runs alone, beside others "
            "and twice to the same bits, by cuBLASLt's choice of algorithms; graphs captured and replayed",
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
        if "found" not in result:
            continue
        found = result["found"]
        if stage in ("ops", "encoder"):
            lines += [f"{found['passed']} passed, {found['failed']} failed.", ""]
            lines += [f"- {line}" for line in found["printed"] + found["errors"]]
        elif stage == "sanitize":
            words = lambda of: "clean" if of["ok"] else "stopped, out of time" if of["stopped"] else "found something, see the file"  # noqa: E731
            lines += ["| check | |", "| --- | --- |"]
            lines += [f"| {name} | {words(of)} |" for name, of in found["checks"].items()]
        elif stage == "train":
            twice, off = found["same_patch_twice"], found["differences_of_losses"]
            lines += [f"The same patch twice: {'yes' if twice else '**no**'}. Losses differ from the CPU's by {off[0]:.1e} "
                      f"at first, {off[-1]:.1e} at the end.", ""]  # fmt: skip
            lines += ["| | metrics on dev | tokens a second |", "| --- | --- | --- |"]
            for name, metrics in found["metrics"].items():
                metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
                lines += [f"| {name} | {metrics} | {found['tokens_per_s'][name]:.0f} |"]
        else:
            lines += bench_table(found)
    return "\n".join(lines) + "\n"


def checked(tools, device, stage, result, path):
    """Runs a stage and keeps what it found, or why it did not run; gives whether it failed."""
    began = time.time()
    say(f"gpu_check: {stage} ..")

    def keep(found=None, **more):
        result.update(more, seconds=round(time.time() - began, 1))
        if found is not None:
            result["found"] = found
        write_aside(path, json.dumps(result, indent=1) + "\n")

    stages = {"ops": ops, "encoder": encoder, "train": train, "sanitize": sanitize}
    try:
        if stage == "bench":
            keep(bench(tools, device, began + LIMIT, keep))
        else:
            keep(stages[stage](tools, device, began + LIMIT))
        word = "ok" if result["found"]["ok"] else "FAILED"
    except NotRun as why:
        keep(not_run=str(why))
        word = f"not run: {why}"
    except Exception:  # The stages behind it still have their say.
        keep(not_run="the check itself failed: " + traceback.format_exc()[-600:])
        word = "FAILED: " + traceback.format_exc()[-600:]
    say(f"gpu_check: {stage}: {word}, {result['seconds']} s")
    return word.startswith("FAILED")


def kept(folder):
    """The results of a folder; a file that is none is named and left out."""
    results = []
    for path in sorted(folder.glob("*@*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["stage"] not in STAGES:
                raise ValueError(f"no stage {result['stage']}")
            table([result])
            results.append(result)
        except (ValueError, KeyError, TypeError, IndexError) as why:
            say(f"gpu_check: {path} is left out: {why!r}")
    return sorted(results, key=lambda result: (result["card"], STAGES.index(result["stage"])))


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
    if not re.fullmatch(r"cuda(:\d+)?", args.device):
        parser.error(f"--device: expected cuda or cuda:N, found {args.device}")
    page = (ROOT if BUNDLED else ROOT / "benches") / "RESULTS-cuda.md"
    failed = []
    if not args.table:
        tools = Tools()
        try:
            at = card(tools, args.device)
        except NotRun as why:
            say(f"gpu_check: nothing was run: {why}")
            return 1
        say(f"gpu_check: {at}")
        name = re.sub(r"[^a-z0-9]+", "-", at.split("(")[0].strip().lower())
        for stage in stages:
            when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            result = {"stage": stage, "card": at, "commit": tools.commit, "when": when}
            if checked(tools, args.device, stage, result, args.out / f"{stage}@{name}.json"):
                failed.append(stage)
    write_aside(page, table(kept(args.out)))
    say(f"gpu_check: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
