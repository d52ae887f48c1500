# What the tests need beside Rust; sourced by tests/run and tests/cluster/run, which say
# who they are in $0. Everything goes below target/, except that root installs Debian's
# packages: PostgreSQL refuses root, and another user may not be able to read target/.

missing() { echo "$0: $1" >&2; exit 1; }

target=${CARGO_TARGET_DIR:-target}
case $target in /*) ;; *) target=$(pwd)/$target ;; esac
python=$target/python
debian=$target/debian
postgres_minimum=14

# The Python packages of tests/python/requirements.txt in $python.
prepare_python() {
  command -v python3 >/dev/null || missing "python3 is missing: install Python 3.9 or newer"
  python3 -c 'import ensurepip, venv' 2>/dev/null \
    || missing "Python's venv is missing: install your system's python3-venv package"
  local wanted
  wanted=$(cksum <tests/python/requirements.txt)
  if [ "$(cat "$python/installed" 2>/dev/null)" != "$wanted" ]; then
    python3 -m venv --clear "$python"
    "$python/bin/pip" install --quiet --disable-pip-version-check \
      -r tests/python/requirements.txt \
      || missing "pip could not install tests/python/requirements.txt"
    echo "$wanted" >"$python/installed"
  fi
}

# The Python code of proto/, in $python/generated.
generate_stubs() {
  rm -rf "$python/generated"
  mkdir -p "$python/generated"
  "$python/bin/python" -m grpc_tools.protoc -I proto \
    --python_out="$python/generated" --grpc_python_out="$python/generated" \
    proto/jebbit/segmentrelay/v1/*.proto
}

# debian_packages NAME...: installs them as root; else unpacks them, with the packages
# that they depend on and that are not installed, below $debian.
debian_packages() {
  command -v apt-get >/dev/null || return 1
  mkdir -p "$debian/download"
  if [ "$(id -u)" = 0 ]; then
    local install="apt-get install --yes --no-install-recommends $*"
    DEBIAN_FRONTEND=noninteractive $install >"$debian/log" 2>&1 \
      || { apt-get update && DEBIAN_FRONTEND=noninteractive $install; } >"$debian/log" 2>&1
    return
  fi
  local names
  names=$(apt-get install --simulate --no-install-recommends "$@" | awk '/^Inst/ {print $2}')
  [ -n "$names" ] || names=$*
  (cd "$debian/download" && apt-get download $names) >"$debian/log" 2>&1 || return 1
  local package
  for package in "$debian"/download/*.deb; do dpkg -x "$package" "$debian" || return 1; done
  rm -r "$debian/download"
}

# Whether the folder $1 has PostgreSQL's programs in a version that is new enough.
is_postgres() {
  [ -x "$1/postgres" ] && [ -x "$1/initdb" ] && [ -x "$1/psql" ] || return 1
  local version
  version=$("$1/postgres" --version 2>/dev/null | grep -o '[0-9][0-9]*' | head -n 1)
  [ "${version:-0}" -ge "$postgres_minimum" ]
}

# The folder of PostgreSQL's programs: what is installed, the newest first.
find_postgres() {
  local folder path
  path=$(command -v postgres || true)
  for folder in "${SEGMENT_RELAY_POSTGRES_BIN:-}" \
    $(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -rV) \
    "${path%/*}" "$debian/postgres"; do
    if [ -n "$folder" ] && is_postgres "$folder"; then
      echo "$folder"
      return
    fi
  done
  return 1
}

# Unpacked programs need the libraries that were unpacked with them.
wrap_postgres() {
  local real libraries program
  real=$(ls -d "$debian"/usr/lib/postgresql/*/bin 2>/dev/null | sort -rV | head -n 1) || true
  [ -n "$real" ] || return 0
  libraries=$(find "$debian/usr/lib" "$debian/lib" -name 'lib*.so*' -printf '%h\n' 2>/dev/null \
    | sort -u | paste -sd:)
  mkdir -p "$debian/postgres"
  for program in "$real"/*; do
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$program" \
      >"$debian/postgres/${program##*/}"
    chmod +x "$debian/postgres/${program##*/}"
  done
}

prepare_postgres() {
  if ! SEGMENT_RELAY_POSTGRES_BIN=$(find_postgres); then
    debian_packages postgresql && wrap_postgres || true
    SEGMENT_RELAY_POSTGRES_BIN=$(find_postgres) || missing "PostgreSQL $postgres_minimum or \
newer is missing: install your system's postgresql package"
  fi
  export SEGMENT_RELAY_POSTGRES_BIN SEGMENT_RELAY_NEEDS_POSTGRES=1
}

# strace for the test of power losses, which skips itself where a process may not trace another.
prepare_strace() {
  local traces="strace -o /dev/null true"
  command -v strace >/dev/null || debian_packages strace || true
  [ -x "$debian/usr/bin/strace" ] && PATH=$PATH:$debian/usr/bin
  command -v strace >/dev/null || missing "strace is missing: install your system's strace package"
  if $traces 2>/dev/null; then
    export SEGMENT_RELAY_NEEDS_STRACE=1
  else
    echo "$0: strace may not trace here, so that power losses are not tested" >&2
    export SEGMENT_RELAY_STRACE=off
  fi
}

# Patroni, etcd and libfaketime for tests/cluster.
prepare_cluster() {
  prepare_postgres
  SEGMENT_RELAY_ETCD=$(command -v etcd || ls "$debian/usr/bin/etcd" 2>/dev/null || true)
  if [ -z "$SEGMENT_RELAY_ETCD" ]; then
    debian_packages etcd-server || true
    SEGMENT_RELAY_ETCD=$(command -v etcd || ls "$debian/usr/bin/etcd" 2>/dev/null) \
      || missing "etcd is missing: install your system's etcd-server package"
  fi
  SEGMENT_RELAY_PATRONI=$(command -v patroni || true)
  if [ -z "$SEGMENT_RELAY_PATRONI" ] && [ "$(id -u)" = 0 ]; then
    debian_packages patroni || true
    SEGMENT_RELAY_PATRONI=$(command -v patroni) \
      || missing "patroni is missing: install your system's patroni package"
  elif [ -z "$SEGMENT_RELAY_PATRONI" ]; then
    SEGMENT_RELAY_PATRONI=$target/patroni/bin/patroni
    [ -x "$SEGMENT_RELAY_PATRONI" ] || { python3 -m venv --clear "$target/patroni" \
      && "$target/patroni/bin/pip" install --quiet --disable-pip-version-check \
        -r tests/cluster/requirements.txt; } \
      || missing "pip could not install tests/cluster/requirements.txt"
  fi
  SEGMENT_RELAY_FAKETIME=$(find_faketime)
  if [ -z "$SEGMENT_RELAY_FAKETIME" ]; then
    debian_packages libfaketime || true
    SEGMENT_RELAY_FAKETIME=$(find_faketime)
    [ -n "$SEGMENT_RELAY_FAKETIME" ] \
      || missing "libfaketime is missing: install your system's libfaketime package"
  fi
  export SEGMENT_RELAY_ETCD SEGMENT_RELAY_PATRONI SEGMENT_RELAY_FAKETIME
}

find_faketime() {
  local file
  for file in /usr/lib/*/faketime/libfaketime.so.1 \
    "$debian"/usr/lib/*/faketime/libfaketime.so.1; do
    if [ -e "$file" ]; then echo "$file"; return; fi
  done
}
