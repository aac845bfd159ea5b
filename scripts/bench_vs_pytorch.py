"""Runs the steps of scripts/bench_vs_pytorch.sh in turn and compares them: medians, and ratios within each round.

usage: bench_vs_pytorch.py BITFIT_BINARY ROUNDS
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

STEP = ["--shape", "base", "--batch", "16", "--length", "128", "--threads", "2"]
MEASURES = ["step_s", "peak_over_model_mb"]
RATIOS = [  # of, over, measure, what is wanted of it
    ("bitfit", "full", "step_s", 0.72),
    ("bitfit", "pytorch", "step_s", 1.0),
    ("bitfit", "pytorch", "peak_over_model_mb", 0.5),
]
OUT = "benches/results/cost.json"


def commands(binary):
    """What runs in each round, by name, in this order."""
    return {
        "bitfit": [binary, "bench", "--method", "bitfit", *STEP, "--json"],
        "pytorch": [sys.executable, "benches/reference/pytorch_step.py", "--method", "bitfit", *STEP],
        "full": [binary, "bench", "--method", "full", *STEP, "--json"],
    }


def processor():
    """Its name and the widest vectors it has, which decide a step's speed more than the name does."""
    try:
        with open("/proc/cpuinfo") as info:
            fields = dict(line.split(":", 1) for line in info if ":" in line)
        known = {name.strip(): value.strip() for name, value in fields.items()}
        has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known["flags"].split()]
        return f"{known['model name']} ({', '.join(has)})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def commit():
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or None


def measure(command):
    """Runs a command and reads the JSON object on the last line of its standard output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"bench_vs_pytorch: exit code {done.returncode} from: {' '.join(command)}")
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
        for name in MEASURES:
            float(result[name])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"bench_vs_pytorch: no JSON object with {', '.join(MEASURES)} ({error!r}) from: {' '.join(command)}")
    return result


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_aside(path, text):
    """A reader finds the old file or the new one, never half of one."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path), suffix=".tmp", delete=False) as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.chmod(out.name, 0o644)
    os.replace(out.name, path)


def main():
    binary, rounds = sys.argv[1], int(sys.argv[2])
    todo = commands(binary)
    runs = {name: [] for name in todo}
    for number in range(1, rounds + 1):
        for name, command in todo.items():
            result = measure(command)
            runs[name].append(result)
            print(f"round {number}: {name:8} {result['step_s']:.3f} s a step, "
                  f"{result['peak_over_model_mb']:.0f} MB over the model", file=sys.stderr, flush=True)

    medians = {name: {m: spread([run[m] for run in of]) for m in MEASURES} for name, of in runs.items()}
    ratios = []
    for of, over, m, wanted in RATIOS:
        paired = [a[m] / b[m] for a, b in zip(runs[of], runs[over]) if b[m]]
        if not paired:
            sys.exit(f"bench_vs_pytorch: {over} reports 0 for {m}: no ratio can be made")
        ratios.append({"of": of, "over": over, "measure": m, "wanted_at_most": wanted, **spread(paired)})

    print(f"\n{processor()}, two threads, BERT-base shape, f32, 16 x 128 tokens, {rounds} rounds\n")
    print(f"{'':8}  {'step, s':>24}  {'peak over model, MB':>26}")
    for name, of in medians.items():
        s, p = of["step_s"], of["peak_over_model_mb"]
        print(f"{name:8}  {s['median']:8.3f} ({s['min']:.3f}..{s['max']:.3f})"
              f"  {p['median']:10.0f} ({p['min']:.0f}..{p['max']:.0f})")
    print()
    for r in ratios:
        print(f"{r['of']} / {r['over']}, {r['measure']}: {r['median']:.3f} ({r['min']:.3f}..{r['max']:.3f}),"
              f" wanted at most {r['wanted_at_most']}")

    # The command as anybody would type it: neither the interpreter's place nor the build folder's matters.
    typed = {name: " ".join([os.path.basename(c[0]), *c[1:]]) for name, c in todo.items()}
    write_aside(OUT, json.dumps({
        "command": f"scripts/bench_vs_pytorch.sh {rounds}", "commit": commit(), "processor": processor(),
        "commands": typed, "medians": medians, "ratios": ratios, "runs": runs,
    }, indent=1) + "\n")
    print(f"\nwritten to {OUT}")


main()
