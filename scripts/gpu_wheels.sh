#!/usr/bin/env bash
# Collect the wheels that scripts/gpu.sh needs beside torch, for a machine without a network:
#
#     bash scripts/gpu_wheels.sh [FOLDER]
#
# For Python 3.10 to 3.13 on x86-64 Linux (PYTHONS names others), into out/gpu_wheels; some 40 MB.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FOLDER=${1:-$ROOT/out/gpu_wheels}
PYTHON=${PYTHON:-python3}
REQUIREMENTS=$ROOT/scripts/gpu/requirements.txt
mkdir -p "$FOLDER"

# Some have no wheel: one is built here, for any Python, as they hold no compiled code.
for package in deepspeed py-cpuinfo hjson; do
  DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w "$FOLDER" -c "$ROOT/constraints.txt" "$package"
done
for version in ${PYTHONS:-3.10 3.11 3.12 3.13}; do
  "$PYTHON" -m pip download -q --no-deps -d "$FOLDER" --find-links "$FOLDER" --only-binary :all: \
    --python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -r "$REQUIREMENTS"
done
du -sh "$FOLDER"
