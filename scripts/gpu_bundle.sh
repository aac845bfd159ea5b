#!/usr/bin/env bash
# Packs what scripts/gpu_check.sh needs on a GPU machine that has neither Rust nor a network, in under 60 MB: the binary
# and the tests of the library, stripped; the tokenizer of the default base (its weights are made there, at random); the
# PyTorch yardstick; MRPC, where $BITFIT_GLUE_DIR holds it.
#
# usage: scripts/gpu_bundle.sh [FILE (default bitfit-gpu.tar.xz)]
# There: tar xf FILE && bitfit-gpu/gpu_check.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
file=${1:-bitfit-gpu.tar.xz}
most=$((60 * 1000 * 1000))

for tool in cargo strip tar xz; do
  command -v "$tool" >/dev/null || { echo "gpu_bundle: $tool is missing" >&2; exit 1; }
done
base=${XDG_CACHE_HOME:-$HOME/.cache}/bitfit/all-MiniLM-L6-v2
[ -e "$base/tokenizer.json" ] || { echo "gpu_bundle: $base has no tokenizer: run scripts/fetch-base.sh" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=$work/bitfit-gpu
mkdir -p "$bundle"

cargo build --release --locked
cargo test --release --locked --no-run --lib --message-format json >"$work/built"
tests=$(sed -n 's/.*"executable":"\([^"]*\/bitfit-[0-9a-f]*\)".*/\1/p' "$work/built" | tail -n 1)
[ -x "$tests" ] || { echo "gpu_bundle: cargo names no test executable" >&2; exit 1; }
strip -o "$bundle/bitfit" "${CARGO_TARGET_DIR:-target}/release/bitfit"
strip -o "$bundle/tests" "$tests"
cp scripts/gpu_check.sh scripts/gpu_check.py benches/reference/pytorch_step.py "$bundle/"
mkdir "$bundle/tokenizer"
cp "$base"/{tokenizer.json,config.json} "$bundle/tokenizer/"
if [ -d "${BITFIT_GLUE_DIR:-}/MRPC" ]; then
  mkdir "$bundle/MRPC"
  cp "$BITFIT_GLUE_DIR"/MRPC/{train,dev}.tsv "$bundle/MRPC/"
else
  echo "gpu_bundle: without MRPC, as BITFIT_GLUE_DIR does not hold it: the stage train will not run" >&2
fi
git describe --always --dirty >"$bundle/commit" 2>/dev/null || echo unknown >"$bundle/commit"

tar -C "$work" -cf - bitfit-gpu | xz -6 -T0 >"$work/packed"
size=$(wc -c <"$work/packed")
[ "$size" -lt "$most" ] || { echo "gpu_bundle: $size bytes, more than $most" >&2; exit 1; }
mv "$work/packed" "$file"
echo "$file: $size bytes"
