#!/usr/bin/env bash
# Speed and memory beside PyTorch, ONNX Runtime and OpenVINO, both sides in turn: benches/RESULTS.md. Stop it whenever
# you like: it goes on where it was. This is a measurement, not a test: no ratio makes it fail.
#
# usage: scripts/bench_vs_pytorch.sh [ROUNDS (default 7)] [--only GROUP[,GROUP..]] [--list | --table]
# Epochs need GLUE in $BITFIT_GLUE_DIR and the default base (scripts/fetch-base.sh).
# Needs a Python with torch, transformers, onnx, onnxscript, onnxruntime, openvino, scipy and scikit-learn: $BITFIT_PYTHON,
# else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${BITFIT_PYTHON:-python3}
command -v cargo >/dev/null || { echo "bench_vs_pytorch: cargo is missing: install a Rust toolchain (rustup)" >&2; exit 1; }
command -v "$python" >/dev/null || { echo "bench_vs_pytorch: $python is missing: install Python 3 or set BITFIT_PYTHON" >&2; exit 1; }
needs=(torch transformers onnx onnxscript onnxruntime openvino scipy scikit-learn)
for package in "${needs[@]}"; do
  "$python" -c "from importlib import metadata; metadata.version('$package')" 2>/dev/null || {
    echo "bench_vs_pytorch: $python has no $package: $python -m pip install ${needs[*]}" >&2
    echo "  or set BITFIT_PYTHON to a Python that has them" >&2
    exit 1
  }
done
cargo build --release --locked
exec "$python" scripts/bench_vs_pytorch.py "${CARGO_TARGET_DIR:-target}/release/bitfit" "$@"
