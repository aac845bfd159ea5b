#!/usr/bin/env bash
# Runs the steps of deploy/Dockerfile without Docker: each stage in a clean Debian root of its own, by chroot, with what
# the file itself says (FROM, WORKDIR, COPY, RUN, ENV, USER, EXPOSE, ENTRYPOINT, CMD; any other instruction is a
# failure). Then the last stage's command is started there, as its user, on a root that cannot be written to, and asked
# for its health; SIGTERM must end it.
#
#   scripts/check_dockerfile.sh                 every stage; compiles everything, which takes minutes
#   scripts/check_dockerfile.sh --binary FILE   FILE stands in for what is copied from earlier stages, which are skipped
#     --base DIR       the base to serve (default: where scripts/fetch-base.sh puts it)
#     --patches DIR    patches to serve (default: none)
#     --keep           leave the roots there, and say where
#
# It wants root (chroot, namespaces), debootstrap, iproute2, curl, and apt with a Debian mirror, as is set up here.
# Exit codes: 0 all steps passed, 1 one failed, 2 it could not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dockerfile=deploy/Dockerfile

cannot() { printf 'check_dockerfile: skipped: %s\n' "$*" >&2; exit 2; }
usage() { sed -n '2,16s/^# \{0,1\}//p' scripts/check_dockerfile.sh; exit "$1"; }

binary='' patches='' keep='' work=''
base=${XDG_CACHE_HOME:-$HOME/.cache}/bitfit/all-MiniLM-L6-v2
given=("$@")
while [ $# -gt 0 ]; do
  case "$1" in
    --binary | --base | --patches | --inside)
      [ $# -ge 2 ] || usage 2
      path=$(realpath -e -- "$2") || cannot "$2 is not there"
      case "$1" in
        --binary) binary=$path ;;
        --base) base=$path ;;
        --patches) patches=$path ;;
        --inside) work=$path ;;
      esac
      shift 2 ;;
    --keep) keep=1; shift ;;
    -h | --help) usage 0 ;;
    *) usage 2 ;;
  esac
done

# Outside: what is needed, a folder, and a mount namespace. All mounts go with the namespace, so that nothing of this
# machine is mounted in the folder any more when it is removed.
if [ -z "$work" ]; then
  [ "$(id -u)" = 0 ] || cannot "it wants root, for chroot and namespaces"
  for tool in debootstrap unshare nsenter chroot ip curl apt-get; do
    command -v "$tool" >/dev/null || cannot "$tool is not installed"
  done
  [ -d "$base" ] || cannot "the base $base is not there (scripts/fetch-base.sh brings it)"
  work=$(mktemp -d)
  [ -n "$keep" ] && echo "check_dockerfile: roots and log in $work" || trap 'rm -rf --one-file-system "$work"' EXIT
  status=0
  unshare --mount --propagation private "$BASH" scripts/check_dockerfile.sh --inside "$work" "${given[@]}" || status=$?
  exit "$status"
fi

log=$work/log
# apt's first archive of component main: the mirror, as it is set up here.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' 'Created-By: Packages' |
  awk '$2 == "main" && !uri { uri = $1 } END { print uri }')
[ -n "$mirror" ] || cannot "apt has no archive set up"

step() { # WHAT COMMAND...: a line for a step, and its log's end where it fails
  local what=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$what" >>"$log"
  if "$@" >>"$log" 2>&1; then
    printf 'ok      %-6s %-100.100s %4d s\n' "$stage" "$what" $((SECONDS - start))
  else
    printf 'FAILED  %-6s %s\n' "$stage" "$what"
    tail -n 30 "$log"
    exit 1
  fi
}
skip() { printf 'skipped %-6s %s\n' "$stage" "$*"; }
fail() { printf 'FAILED  %-6s %s\n' "$stage" "$*"; exit 1; }

# The Dockerfile's instructions, one a line: comments go, continued lines are joined.
instructions() {
  sed -e '/^[[:space:]]*#/d' -e '/^[[:space:]]*$/d' "$dockerfile" |
    sed -e ':a' -e '/\\$/{N;s/[[:space:]]*\\\n[[:space:]]*/ /;ba' -e '}'
}

# The build context: what .dockerignore's allow-list lets through.
context() {
  mkdir "$work/context"
  local line first=1
  while IFS= read -r line; do
    case "$line" in
      '' | '#'*) continue ;;
      '*') first='' ;;
      '!'*) [ -z "$first" ] && cp -a --parents -- "${line#!}" "$work/context/" || return 1 ;;
      *) echo ".dockerignore: \`$line\` is neither \`*\` nor \`!path\`"; return 1 ;;
    esac
  done <.dockerignore
}

# What Docker mounts, or copies, into a container. apt gets this machine's settings for downloads.
furnish() { # ROOT
  mount -t proc proc "$1/proc"
  mount --rbind /dev "$1/dev"
  cp -L /etc/resolv.conf /etc/hosts "$1/etc/"
  apt-config dump | grep '^Acquire::' >"$1/etc/apt/apt.conf.d/99-of-this-machine" || true
}

debian() { # SUITE ROOT
  if [ ! -d "$work/debian-$1" ]; then
    debootstrap --variant=minbase "$1" "$work/debian-$1.part" "$mirror" && mv "$work/debian-$1.part" "$work/debian-$1"
  fi
  cp -a "$work/debian-$1" "$2" && furnish "$2"
}

in_root() { # COMMAND...: as the stage's user, in its folder, with its variables
  chroot --userspec="$user" --groups= "$root" /usr/bin/env -i -C "$workdir" "${variables[@]}" "$@"
}

# rust:X-slim is Debian with a C toolchain and Rust. The latter is this machine's, of the same version, read-only.
rust() { # SUITE ROOT
  debian "$1" "$2"
  chroot "$2" apt-get update
  chroot "$2" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    ca-certificates gcc libc6-dev
  mkdir -p "$2/usr/local/rustup/toolchain" "$2/usr/local/cargo"
  mount --bind "$sysroot" "$2/usr/local/rustup/toolchain"
  mount -o remount,bind,ro "$2/usr/local/rustup/toolchain"
  # Crates come over this machine's network, whose certificates it knows.
  mount --bind "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$2/etc/ssl/certs/ca-certificates.crt"
}

from() { # IMAGE [AS NAME]
  [ $# -eq 1 ] || [ "${2^^}" = AS ] || fail "FROM $*"
  stage=${3:-last} root=$work/root-${3:-last} workdir=/ user=0:0 entrypoint=() command=()
  variables=(HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
  left_out=
  if [ -n "$binary" ] && [ "$stage" != last ]; then
    left_out=1
    skip "FROM $* and its steps: --binary stands in for them"
    return
  fi
  case "$1" in
    debian:*-slim)
      local suite=${1#debian:}
      step "FROM $1, by debootstrap" debian "${suite%-slim}" "$root" ;;
    rust:*-slim-*)
      local version=${1#rust:}
      sysroot=$(rustc --print sysroot)
      [[ "$(rustc --version)" == "rustc ${version%%-*}."* ]] || fail "FROM $1, but Rust here is $(rustc --version)"
      grep -q "^rust-version = \"${version%%-*}\"" Cargo.toml || fail "FROM $1, but Cargo.toml has another rust-version"
      step "FROM $1, by debootstrap; $(rustc --version | cut -d' ' -f1,2) of this machine" rust "${1##*-}" "$root"
      variables=(HOME=/root CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup
        "PATH=/usr/local/cargo/bin:/usr/local/rustup/toolchain/bin:${variables[1]#PATH=}")
      step "rustc runs in it" in_root rustc --version ;;
    *) fail "FROM $1: no stand-in is known for this image" ;;
  esac
}

copy() { # [--from=STAGE] [--chown=USER:GROUP] SOURCE... TARGET
  local source_root=$work/context owner=0:0
  while [[ "$1" == --* ]]; do
    case "$1" in
      --from=*) source_root=$work/root-${1#--from=} ;;
      --chown=*) owner=${1#--chown=} ;;
      *) echo "COPY $1 is not known here"; return 1 ;;
    esac
    shift
  done
  local target=${*: -1} source
  [[ "$target" == /* ]] || target=${workdir%/}/$target
  for source in "${@:1:$#-1}"; do
    [[ "$source" == /* ]] || source=/$source
    if [ -n "$binary" ] && [ "$source_root" != "$work/context" ]; then
      install -D -o "${owner%:*}" -g "${owner#*:}" -m 755 "$binary" "$root$target" || return 1
    elif [ -d "$source_root$source" ]; then
      mkdir -p "$root$target" && cp -a --no-preserve=ownership "$source_root$source/." "$root$target/" || return 1
    elif [[ "$target" == */ || "$target" == */. || -d "$root$target" ]]; then
      install -D -o "${owner%:*}" -g "${owner#*:}" -p -t "$root$target" "$source_root$source" || return 1
    else
      mkdir -p "$root$(dirname "$target")" && cp -p "$source_root$source" "$root$target" &&
        chown "$owner" "$root$target" || return 1
    fi
  done
}

words() { # JSON-LIST: its strings, each ended by a NUL
  python3 -c 'import json, sys; sys.stdout.write("".join(word + "\0" for word in json.loads(sys.argv[1])))' "$1"
}

stage=context
step "what .dockerignore lets through" context
while IFS=' ' read -r instruction rest; do
  if [ "$instruction" != FROM ]; then
    [ -z "$left_out" ] || continue
  fi
  case "$instruction" in
    FROM) read -ra arguments <<<"$rest"; from "${arguments[@]}" ;;
    WORKDIR) workdir=$rest; step "WORKDIR $rest" mkdir -p "$root$rest" ;;
    COPY) read -ra arguments <<<"$rest"; step "COPY $rest" copy "${arguments[@]}" ;;
    RUN) [[ "$rest" != --* && "$rest" != '['* ]] || fail "RUN $rest: this form is not known here"
      step "RUN $rest" in_root /bin/sh -c "$rest" ;;
    ENV) [[ "$rest" != *[\"\'\\\$]* ]] || fail "ENV $rest: quotes and variables are not known here"
      read -ra arguments <<<"$rest"
      variables+=("${arguments[@]}") ;;
    USER) user=$rest; [[ "$rest" =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "USER $rest is no number, or root's" ;;
    EXPOSE) port=$rest ;;
    ENTRYPOINT) mapfile -d '' -t entrypoint < <(words "$rest") ;;
    CMD) mapfile -d '' -t command < <(words "$rest") ;;
    *) fail "$instruction is not known here" ;;
  esac
done < <(instructions)

[ "$user" != 0:0 ] || fail "the last stage runs as root"
[ "${#entrypoint[@]}" -gt 0 ] || fail "the last stage has no ENTRYPOINT"

# As Kubernetes runs it: a root that is read only, /cache the only place to write. The base lies where a volume would
# put it. In namespaces of its own the server is process 1, and EXPOSE's port is free whatever else runs here.
stage=run
prepare() {
  umount -l "$root/proc" "$root/dev"
  mount --bind "$root" "$root"
  mount --rbind /dev "$root/dev"
  mount -t tmpfs tmpfs "$root/cache"
  chown "$user" "$root/cache"
  mkdir -p "$root/cache/bitfit/all-MiniLM-L6-v2"
  mount --bind "$base" "$root/cache/bitfit/all-MiniLM-L6-v2"
  mount -o remount,bind,ro "$root/cache/bitfit/all-MiniLM-L6-v2"
  [ -z "$patches" ] || { mount --bind "$patches" "$root/patches" && mount -o remount,bind,ro "$root/patches"; }
  mount -o remount,bind,ro "$root"
}
step "root read only, /cache writable, the base as a volume" prepare

export root user workdir
unshare --net --pid --fork --kill-child --mount --propagation private "$BASH" -c '
  ip link set lo up && mount -t proc proc "$root/proc" &&
  exec chroot --userspec="$user" --groups= "$root" /usr/bin/env -i -C "$workdir" "$@"
' check_dockerfile "${variables[@]}" HF_HUB_OFFLINE=1 "${entrypoint[@]}" "${command[@]}" >"$work/server" 2>&1 &
outer=$!
trap 'kill -KILL "$outer" 2>/dev/null || true' EXIT

server() { cat "/proc/$outer/task/$outer/children" | tr -d ' '; }
ask() { nsenter --net --target "$(server)" curl --silent --show-error --fail --max-time 5 "http://127.0.0.1:$port$1"; }
answers() { # PATH: within a minute
  local _
  for _ in $(seq 120); do
    ask "$1" && return
    kill -0 "$outer" 2>/dev/null || break
    sleep 0.5
  done
  echo "the server's own output:"
  cat "$work/server"
  return 1
}
step "${entrypoint[*]} ${command[*]}: GET /v2/health/live" answers /v2/health/live
step "GET /v2/health/ready" answers /v2/health/ready
shows_queue() { ask /metrics | grep '^bitfit_queue_questions '; }
step "GET /metrics shows the queue" shows_queue
is_user() { awk -v id="${user%:*}" '/^Uid:/ { exit !($2 == id && $3 == id) }' "/proc/$(server)/status"; }
step "runs as user $user" is_user
resident=$(awk '/^VmRSS:/ { print int($2 / 1024) }' "/proc/$(server)/status")
size=$(($(stat -c %s "$root/usr/local/bin/bitfit") / 1048576))
printf 'info    %-6s resident memory %d MiB, binary %d MiB\n' "$stage" "$resident" "$size"
[ -z "$patches" ] || step "GET /v1/tasks" answers /v1/tasks
ends() {
  kill -TERM "$(server)"
  local _
  for _ in $(seq 40); do
    kill -0 "$outer" 2>/dev/null || { wait "$outer"; return; }
    sleep 0.25
  done
  cat "$work/server"
  return 1
}
step "SIGTERM ends it, as process 1, with exit code 0" ends

echo "not checked: the images themselves (Debian roots by debootstrap stand in), the rust image's toolchain (the one"
echo "here stands in), layers and caches, and Docker's own reading of the Dockerfile and of .dockerignore"
echo "check_dockerfile: all steps passed"
