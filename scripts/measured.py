"""What the measuring scripts share: the processor, the code's commit, ratios, and files that are whole or absent."""

import os
import random
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cpu():
    """The processor's name and flags; None where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields or "flags" not in fields:
        return None
    return fields["model name"], fields["flags"].split()


def facts():
    """The processor by name and its widest arithmetic, and its cores."""
    found = cpu()
    if found is None:
        return {"processor": "unknown", "kind": "unknown", "cores": os.cpu_count()}
    model, flags = found
    # As the engine chooses; each set needs those before it.
    sets = [("avx2", ["avx2", "fma"]), ("avx512", ["avx512f", "avx512bw", "avx512dq", "avx512vl"]),
            ("avx512-vnni", ["avx512_vnni"]), ("avx512-bf16", ["avx512_bf16"])]  # fmt: skip
    kind = "portable"
    for name, needed in sets:
        if not set(needed) <= set(flags):
            break
        kind = name
    return {"processor": model, "kind": kind, "cores": os.cpu_count()}


def commit():
    """The commit that last changed what is measured, marked where it was changed since."""
    code = ["--", "src", "Cargo.toml", "Cargo.lock"]
    git = lambda *of: subprocess.run(["git", *of, *code], capture_output=True, text=True, cwd=ROOT).stdout.strip()  # noqa: E731
    return git("log", "-1", "--format=%h") + (" with changes" if git("status", "--porcelain") else "")


def ratio_of_medians(above, below):
    """Of two lists that were measured in turn: the ratio of their medians, and the 90 % interval of resampling pairs."""
    draw, pairs = random.Random(0), list(zip(above, below))
    of = lambda some: statistics.median(a for a, _ in some) / statistics.median(b for _, b in some)  # noqa: E731
    again = sorted(of(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return of(pairs), (again[100], again[-101])


def write_aside(path, text):
    """A reader finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.chmod(out.name, 0o644)
    os.replace(out.name, path)
