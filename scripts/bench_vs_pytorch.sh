#!/usr/bin/env bash
# One fine-tuning step beside PyTorch's, and beside full fine-tuning in this engine: BERT-base shape, f32, 16 x 128
# tokens, two threads. The three run in turn, N times, so that all see the same machine.
#
# usage: scripts/bench_vs_pytorch.sh [N (default 3)]
# Prints medians and ratios with their spread, and writes benches/results/cost.json. Needs a Python with torch and
# transformers: $BITFIT_PYTHON, else python3. This is a measurement, not a test: no ratio makes it fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs=${1:-3}
[[ $runs =~ ^[1-9][0-9]*$ ]] || { echo "bench_vs_pytorch: N: expected a count from 1, found $runs" >&2; exit 2; }
python=${BITFIT_PYTHON:-python3}
command -v cargo >/dev/null || { echo "bench_vs_pytorch: cargo is missing: install a Rust toolchain (rustup)" >&2; exit 1; }
command -v "$python" >/dev/null || { echo "bench_vs_pytorch: $python is missing: install Python 3 or set BITFIT_PYTHON" >&2; exit 1; }
"$python" -c 'import torch, transformers' 2>/dev/null || {
  echo "bench_vs_pytorch: $python has no torch and transformers: $python -m pip install torch transformers" >&2
  echo "  or set BITFIT_PYTHON to a Python that has them" >&2
  exit 1
}
cargo build --release --locked
exec "$python" scripts/bench_vs_pytorch.py "${CARGO_TARGET_DIR:-target}/release/bitfit" "$runs"
