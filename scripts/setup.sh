#!/usr/bin/env bash
# Installs the Debian packages that are missing and builds build/release/bin/bitwright.
#   scripts/setup.sh [--packages-only]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
  '' | --packages-only) ;;
  *) echo "usage: scripts/setup.sh [--packages-only]" >&2; exit 2 ;;
esac

missing=()
while read -r package; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) || true
  [ "$status" = installed ] || missing+=("$package")
done < <(grep -v '^#' scripts/packages.txt)

if ((${#missing[@]})); then
  if ! command -v apt-get >/dev/null; then
    echo "error: this is not Debian; install the equivalents of: ${missing[*]}" >&2
    exit 1
  fi
  install="apt-get install -y --no-install-recommends ${missing[*]}"
  as_root=()
  if [ "$(id -u)" != 0 ]; then
    # asking for a password needs a terminal
    if ! command -v sudo >/dev/null || ! { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
      echo "error: cannot install packages: not root and no sudo; as root, run: apt-get update && $install" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  echo "== installing Debian packages${as_root:+ (with sudo)}: ${missing[*]}"
  "${as_root[@]}" apt-get update -q
  # shellcheck disable=SC2086  # one word for each package
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive $install -q
fi
[ "${1:-}" != --packages-only ] || exit 0

echo "== building build/release/bin/bitwright"
cmake --preset release
cmake --build --preset release --target bitwright
