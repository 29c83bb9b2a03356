#!/usr/bin/env bash
# Install the wheel, the sdist, and the sdist without a compiler, each into a bare environment, and train with it:
#
#     bash scripts/test_install.sh [python ...]      # default: python3; others such as python3.10 python3.13
#
# Dependencies come from the package index by constraints.txt: some minutes for each Python. KINDS names some of the three:
# wheel, sdist, no-compiler.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
if [ $# -eq 0 ]; then set -- python3; fi

make_bare() { # make_bare PYTHON NAME
  "$1" -m venv "$WORK/$2"
  "$WORK/$2/bin/python" -m pip install -q --upgrade pip
  # torch first and by its exact pin, as another build of it may be several gigabytes
  "$WORK/$2/bin/python" -m pip install -q "$(grep '^torch==' "$ROOT/constraints.txt")"
}
try() { # try NAME COMPILED FILE, away from the checkout
  "$WORK/$1/bin/python" -m pip install -q -c "$ROOT/constraints.txt" "$3"
  "$WORK/$1/bin/python" -m pip check
  (cd "$WORK" && "$WORK/$1/bin/python" "$ROOT/scripts/common/first_job.py" "$2")
  (cd "$WORK" && "$WORK/$1/bin/rehearsal" doctor)
}

"$1" -m venv "$WORK/build"
"$WORK/build/bin/python" -m pip install -q build
# From a copy, so that no file of an earlier build is taken.
(cd "$ROOT" && git ls-files -co --exclude-standard | tar cf - -T -) | (mkdir "$WORK/source" && tar xf - -C "$WORK/source")
"$WORK/build/bin/python" -m build -o "$WORK/dist" "$WORK/source"
(cd "$ROOT" && "$WORK/build/bin/python" -m scripts.common.check_wheel "$WORK/dist")
for PYTHON in "$@"; do
  NAME=$(basename "$PYTHON")
  for KIND in ${KINDS:-wheel sdist no-compiler}; do
    make_bare "$PYTHON" "$NAME-$KIND"
    case $KIND in
      wheel) try "$NAME-$KIND" compiled "$WORK"/dist/*.whl ;;
      sdist) try "$NAME-$KIND" compiled "$WORK"/dist/*.tar.gz ;;
      # No wheel that pip kept of the sdist before.
      no-compiler) CC=/nonexistent PIP_NO_CACHE_DIR=1 try "$NAME-$KIND" numpy "$WORK"/dist/*.tar.gz ;;
    esac
    rm -rf "${WORK:?}/$NAME-$KIND"
  done
done
echo "install: ${KINDS:-wheel sdist no-compiler} work with $*"
