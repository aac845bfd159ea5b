#!/usr/bin/env bash
# The programs that tests hold the server against, none of which the project needs to build or run: Triton's client, an
# S3 server, a fuzzer of APIs, a headless browser.
#
# usage: scripts/oracles.sh DIR
#
# Makes a virtual environment in DIR and prints two lines: its Python, and a browser. Where there is no browser and
# apt can bring one, it does; else the second line is empty.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${1:?"usage: scripts/oracles.sh DIR"}

stamp=$dir/oracles.txt
if ! cmp -s "$here/oracles.txt" "$stamp"; then
  if [ -e "$dir" ] && [ ! -e "$dir/pyvenv.cfg" ]; then
    echo "oracles: $dir is there and is no virtual environment: give a new folder" >&2
    exit 2
  fi
  rm -rf "$dir"
  python3 -m venv "$dir" >&2
  "$dir/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --only-binary=:all: -r "$here/oracles.txt" >&2
  cp "$here/oracles.txt" "$stamp"
fi
printf '%s\n' "$(cd "$dir" && pwd)/bin/python"

browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if ! browser >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
    >&2 || true
fi
browser || echo
