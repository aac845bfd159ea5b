#!/usr/bin/env bash
# NVRTC, the compiler of kernels, from NVIDIA's wheel. Tests hold every kernel to compile with it, which needs neither a
# driver nor a card.
#
# usage: BITFIT_CUDA_LIBS=$(scripts/fetch_nvrtc.sh [DIR]) cargo test
#
# Unpacks some 110 MB to DIR, by default ${XDG_CACHE_HOME:-$HOME/.cache}/bitfit/nvrtc, and prints the folder that holds
# libnvrtc.so. The wheel is pinned by SHA-256. Where it is there already, nothing is downloaded.
set -euo pipefail
dir=${1:-${XDG_CACHE_HOME:-${HOME:?"usage: scripts/fetch_nvrtc.sh DIR"}/.cache}/bitfit/nvrtc}

# One line, as pip reads it: x86_64, then aarch64.
wheel="nvidia-cuda-nvrtc==13.0.88 \
--hash=sha256:ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575 \
--hash=sha256:d27f20a0ca67a4bb34268a5e951033496c5b74870b868bacd046b1b8e0c3267b"
stamp=$dir/wheel.txt

if ! printf '%s\n' "$wheel" | cmp -s - "$stamp"; then
  if [ -e "$dir" ] && [ ! -e "$stamp" ] && [ -n "$(ls -A "$dir")" ]; then
    echo "fetch_nvrtc: $dir is there and holds something else: give a new folder" >&2
    exit 2
  fi
  mkdir -p "$(dirname "$dir")"
  # Made aside and renamed: the folder is whole or not there.
  aside=$(mktemp -d "$dir.XXXXXX")
  trap 'rm -rf "$aside"' EXIT
  printf '%s\n' "$wheel" >"$aside/wheel.txt"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    -r "$aside/wheel.txt" -d "$aside/wheels" >&2
  # The wheel holds the compiler twice: `.alt` is another build of it.
  python3 - "$aside"/wheels/*.whl "$aside" <<'PY' >&2
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if ".alt.so" not in name])
PY
  rm -rf "$aside/wheels" "$dir"
  # What mktemp makes is its maker's alone.
  chmod 755 "$aside"
  mv "$aside" "$dir"
  trap - EXIT
fi
printf '%s\n' "$(cd "$dir" && pwd)/nvidia/cu13/lib"
