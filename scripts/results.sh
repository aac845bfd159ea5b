#!/usr/bin/env bash
# Runs the training table (every cell that is not there yet) and prints it. Stop it whenever you like: it goes on where
# it was. Arguments go to scripts/results.py, whose head says what they are.
#
#   BITFIT_GLUE_DIR=glue scripts/results.sh                                      our side
#   BITFIT_GLUE_DIR=glue BITFIT_PYTHON=venv/bin/python scripts/results.sh --side both
set -euo pipefail
cd "$(dirname "$0")/.."

command -v python3 >/dev/null || { echo "results.sh needs python3" >&2; exit 1; }
command -v cargo >/dev/null || { echo "results.sh needs a Rust toolchain: https://rustup.rs" >&2; exit 1; }

cargo build --release --bin bitfit
python3 scripts/results.py "$@"
python3 scripts/results.py --table
