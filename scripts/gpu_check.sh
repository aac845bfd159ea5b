#!/usr/bin/env bash
# What cannot be checked without a GPU, checked on one: every op and the whole encoder against the CPU, an epoch of MRPC
# on both, the benchmark beside PyTorch, compute-sanitizer. Writes a JSON file a stage and the table RESULTS-cuda.md.
#
# usage: scripts/gpu_check.sh [--stage ops|encoder|train|bench|sanitize[,..]] [--device cuda:N] [--out DIR] [--table]
#
# Runs in a checkout, where it builds what it needs, or in what scripts/gpu_bundle.sh packs, which needs no network and
# no Rust: a driver, NVRTC and cuBLASLt (a toolkit, or the wheels that PyTorch brings along) and Python 3 are enough.
# The stage `bench` compares with PyTorch where that Python ($BITFIT_PYTHON, else python3) has torch and transformers,
# and `sanitize` needs compute-sanitizer; what cannot run is written down as not run, with its reason.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${BITFIT_PYTHON:-python3}
command -v "$python" >/dev/null || { echo "gpu_check: $python is missing: install Python 3 or set BITFIT_PYTHON" >&2; exit 1; }
exec "$python" "$here/gpu_check.py" "$@"
