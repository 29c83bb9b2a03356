#!/usr/bin/env bash
# Make the virtual environment, or bring it up to date:
#
#     bash scripts/setup.sh [extra ...]        # extras of pyproject.toml, such as: dev deepspeed
#
# Into .venv of this repository, or into the folder named by VENV. Does nothing, and says nothing, when nothing has
# changed since it last installed these extras. An environment made by other means is used as it is.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
EXTRAS=$(printf '%s\n' "$@" | tr ', ' '\n\n' | sed '/^$/d' | sort -u | paste -sd, -)

# The stamps of one state of the project lie in one folder, so that another state makes all of them invalid.
STATE=$( (echo "$ROOT"; cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/rehearsal_plugin/buffer/rows/"*.c) | sha256sum | cut -d' ' -f1)
STAMP=$VENV/.setup/$STATE/${EXTRAS:-none}
if [ -x "$VENV/bin/python" ] && [ -e "$STAMP" ]; then exit 0; fi
if [ ! -d "$VENV/.setup/$STATE" ]; then rm -rf "$VENV/.setup"; fi

fail() { echo "setup: $*" >&2; exit 1; }
pip_install() { "$VENV/bin/python" -m pip install -q -c "$ROOT/constraints.txt" "$@"; }

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "python3 is $(python3 -V 2>&1); install Python 3.10 or newer, or put it first in PATH"
  python3 -m venv "$VENV" || fail "python3 cannot make $VENV; install its venv module (Debian, Ubuntu: python3-venv)"
fi

# Without them the package works, too: numpy copies then.
command -v "${CC:-cc}" >/dev/null ||
  echo "setup: no C compiler, so copies take longer; install one (Debian, Ubuntu: gcc), or name it in CC" >&2
"$VENV/bin/python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  echo "setup: no headers of $(python3 -V), so copies take longer; install them (Debian, Ubuntu: python3-dev)" >&2
rm -f "$ROOT"/rehearsal_plugin/buffer/rows/_copies.cpython-*.so  # of an earlier build, which would go first

echo "setup: installing${EXTRAS:+ $EXTRAS} into $VENV; this can take some minutes"
# torch first and by its exact pin: left to the others' ranges, pip may choose another build of several gigabytes.
pip_install "$(grep '^torch==' "$ROOT/constraints.txt")"
pip_install -e "$ROOT${EXTRAS:+[$EXTRAS]}"
mkdir -p "$(dirname "$STAMP")"
touch "$STAMP"
