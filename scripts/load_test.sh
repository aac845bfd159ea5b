#!/usr/bin/env bash
# Load on `bitfit serve`, on loopback and bounded: 64 random tasks over the default base, asked by oha, a public load
# generator. It prints what oha saw and what the server counted, and fails where a request was not answered with 200.
#
# usage: scripts/load_test.sh [--seconds N (default 20, at most 120)] [--connections N (default 32, at most 256)]
#                             [--rate REQUESTS_A_SECOND (default: as fast as it goes)] [-- SERVE_FLAGS..]
# $OHA names oha; else the one on the PATH, else cargo builds it into the target folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "load_test: $*" >&2; exit 2; }
command -v cargo >/dev/null || fail "cargo is missing: install a Rust toolchain (rustup)"
for tool in curl python3; do
  command -v "$tool" >/dev/null || fail "$tool is missing: install it"
done

OHA_VERSION=1.16.0
seconds=20 connections=32 rate=
number() { # FLAG VALUE MOST
  [[ $2 =~ ^[1-9][0-9]*$ ]] && [ "$2" -le "$3" ] || fail "$1: expected 1 to $3, found '$2'"
}
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) number "$1" "${2:-}" 120; seconds=$2; shift 2 ;;
    --connections) number "$1" "${2:-}" 256; connections=$2; shift 2 ;;
    --rate) number "$1" "${2:-}" 100000; rate=$2; shift 2 ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; its first lines say what there is" ;;
  esac
done

target=${CARGO_TARGET_DIR:-target}
oha=${OHA:-$(command -v oha || echo "$target/tools/bin/oha")}
if ! command -v "$oha" >/dev/null; then
  echo "building oha (some minutes)" >&2
  cargo install oha --locked --version "$OHA_VERSION" --no-default-features --features rustls --root "$target/tools" --quiet
fi
scripts/fetch-base.sh >&2
cargo build --release --locked --quiet --bin bitfit --example many_tasks
work=$(mktemp -d)
trap '[ -z "${server:-}" ] || { kill "$server" && wait "$server"; } 2>/dev/null; rm -rf "$work"' EXIT
base=${BITFIT_BASE:-${XDG_CACHE_HOME:-$HOME/.cache}/bitfit/all-MiniLM-L6-v2}
"$target/release/examples/many_tasks" "$work" "$base" 64

"$target/release/bitfit" serve --base "$work/base" --patches "$work/patches" --listen 127.0.0.1:0 --preload --log warn \
  "$@" >"$work/started" &
server=$!
for _ in $(seq 300); do
  url=$(sed -n 's/.* at \(http:.*\)/\1/p' "$work/started")
  [ -z "$url" ] || break
  kill -0 "$server" 2>/dev/null || fail "the server did not start"
  sleep 0.2
done
[ -n "$url" ] || fail "the server was not ready within a minute"

body='{"inputs": [{"text": "The lid was cracked when it arrived, and nobody answered my letters."}]}'
"$oha" --no-tui --output-format json -z "${seconds}s" -c "$connections" ${rate:+-q "$rate" --latency-correction} -w -m POST \
  -T application/json -d "$body" --rand-regex-url "$url/v1/tasks/t0([0-5][0-9]|6[0-3])/predict" >"$work/oha"
curl -fsS "$url/metrics" | grep -E '^bitfit_(questions|tokens|questions_dropped)_total '
python3 - "$work/oha" <<'EOF'
import json, sys
found = json.load(open(sys.argv[1]))
latency = ", ".join(f"{name} {1000 * found['latencyPercentiles'][name]:.1f} ms" for name in ("p50", "p95", "p99"))
print(f"{found['summary']['requestsPerSec']:.1f} requests/s; {latency}; statuses {found['statusCodeDistribution']}")
if set(found["statusCodeDistribution"]) != {"200"} or found["errorDistribution"]:
    sys.exit(f"load_test: not every request was answered with 200: {found['errorDistribution']}")
EOF
