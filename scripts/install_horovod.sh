#!/usr/bin/env bash
# Install Horovod 0.28.1 (Gloo, CPU, PyTorch only) beside the torch that is already there:
#
#     bash scripts/install_horovod.sh [python]      # default: .venv/bin/python of this repository, else python
#
# Needs a C++17 compiler and make (Debian: build-essential); no MPI, no ssh, no root. Safe to run again: does nothing
# when Horovod already works. A Horovod wheel fits only the torch it was built against, so the built wheel is kept in
# $HOROVOD_WHEEL_DIR (default ~/.cache/rehearsal_plugin/horovod), in a folder named after torch, Python and machine.
set -euo pipefail

HVD_VERSION=0.28.1
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WHEEL_DIR=${HOROVOD_WHEEL_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/rehearsal_plugin/horovod}
COMPILER=${CXX:-g++}

PY=${1:-}
if [ -z "$PY" ]; then
  PY=python
  if [ -x "$ROOT/.venv/bin/python" ]; then PY=$ROOT/.venv/bin/python; fi
fi

fail() { echo "install_horovod: $*" >&2; exit 1; }

# The constraints hold torch where it is: nothing installed here may replace it.
pip_install() {
  local constraints=()
  if [ -f "$ROOT/constraints.txt" ]; then constraints=(-c "$ROOT/constraints.txt"); fi
  "$PY" -m pip install -q ${constraints[@]+"${constraints[@]}"} "$@"
}

horovod_works() {
  "$PY" - "$HVD_VERSION" <<'PYTHON'
import json, pathlib, sys, torch, horovod, horovod.torch as hvd
built = json.loads((pathlib.Path(horovod.__file__).parent / "metadata.json").read_text())
if horovod.__version__ != sys.argv[1] or built["pytorch"] != torch.__version__ or not hvd.gloo_built():
    sys.exit(f"found Horovod {horovod.__version__} for torch {built['pytorch']}; torch is {torch.__version__}")
PYTHON
}

require_build_tools() {
  command -v "$COMPILER" >/dev/null ||
    fail "no C++ compiler ('$COMPILER' not found); install one (Debian, Ubuntu: apt-get install build-essential)" \
         "or name yours: CXX=/path/to/c++ bash scripts/install_horovod.sh"
  command -v make >/dev/null || fail "'make' not found; install it (Debian, Ubuntu: apt-get install build-essential)"
  "$PY" -c 'import sysconfig, pathlib, sys
sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())' ||
    fail "the headers of $PY (Python.h) are missing; install them (Debian, Ubuntu: apt-get install python3-dev)"
}

# Horovod's CMake files ask for C++14 (and its gloo for C++11) where torch's headers need C++17; -g only costs time.
write_compiler_wrapper() {
  cat >"$1" <<'WRAPPER'
#!/usr/bin/env bash
arguments=()
for argument in "$@"; do
  case "$argument" in
    -std=gnu++1[0-9] | -std=c++1[0-9]) arguments+=(-std=gnu++17) ;;
    -g) ;;
    *) arguments+=("$argument") ;;
  esac
done
exec "$HVD_REAL_CXX" "${arguments[@]}"
WRAPPER
  chmod +x "$1"
}

build_wheel() ( # build_wheel FOLDER, in a subshell so that its trap is its own
  require_build_tools
  scripts=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  write_compiler_wrapper "$work/cxx"
  pip_install 'setuptools>=70.1' wheel packaging
  if ! command -v cmake >/dev/null && [ ! -x "$scripts/cmake" ]; then pip_install cmake; fi
  echo "install_horovod: building Horovod $HVD_VERSION against torch; 2 to 4 minutes on two cores"
  # No pip cache: it does not know which torch a wheel was built against.
  PATH=$scripts:$PATH HVD_REAL_CXX=$COMPILER CXX=$work/cxx MAKEFLAGS=-j$(nproc) CMAKE_POLICY_VERSION_MINIMUM=3.5 \
  HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
  HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_CPU_OPERATIONS=GLOO \
    "$PY" -m pip wheel -q --no-cache-dir --no-deps --no-build-isolation --no-binary horovod \
    -w "$work/wheel" "horovod==$HVD_VERSION" >"$work/build.log" 2>&1 ||
    { tail -n 60 "$work/build.log" >&2; fail "the build failed; the end of its output is above"; }
  mkdir -p "$1"
  mv "$work/wheel" "$1/.partial.$$"  # on the same disk first, so that the wheel appears there whole or not at all
  mv "$1/.partial.$$"/horovod-*.whl "$1/"
  rmdir "$1/.partial.$$"
)

"$PY" -c 'import torch' 2>/dev/null || fail "torch is not installed in $PY; install the project there first"
if horovod_works 2>/dev/null; then
  echo "install_horovod: Horovod $HVD_VERSION is already there"
  exit 0
fi

KEY=$("$PY" -W ignore -c 'import platform, sys, torch
print(f"torch{torch.__version__}-{sys.implementation.cache_tag}-{platform.machine()}")')
find_wheel() { ls "$WHEEL_DIR/$KEY/horovod-$HVD_VERSION-"*.whl 2>/dev/null | head -n 1 || true; }

WHEEL=$(find_wheel)
if [ -z "$WHEEL" ]; then
  build_wheel "$WHEEL_DIR/$KEY"
  WHEEL=$(find_wheel)
fi
pip_install numpy cloudpickle psutil pyyaml packaging 'cffi>=1.4.0'
pip_install --no-deps --force-reinstall "$WHEEL"
horovod_works || fail "Horovod was installed from $WHEEL but does not work; delete that file and run this again"
echo "install_horovod: installed $WHEEL"
