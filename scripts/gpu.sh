#!/usr/bin/env bash
# Check and measure all that wants a GPU, in at most eight minutes and without a network:
#
#     bash scripts/gpu.sh [--out FOLDER] [--minutes N]
#
# PYTHON has to have torch (python3 when not set). What else is needed comes from the folder of wheels that
# scripts/gpu_wheels.sh collects (WHEELS, by default out/gpu_wheels), into an environment that sees the torch of PYTHON.
# Writes report.json and log.txt into FOLDER (out/gpu). Without a GPU each part that wants one says that it was skipped.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-$ROOT/out/gpu_wheels}
NEEDED='import torch, deepspeed, hypothesis, optree, pydantic, pytest, pytest_timeout, safetensors, typer, yaml'
cd "$ROOT"

if ! "$PYTHON" -c "$NEEDED" 2>/dev/null; then
  "$PYTHON" -c 'import torch' || { echo "gpu: $PYTHON has no torch; install it, or name another Python in PYTHON" >&2; exit 1; }
  [ -d "$WHEELS" ] || { echo "gpu: no folder $WHEELS; run scripts/gpu_wheels.sh where there is a network" >&2; exit 1; }
  "$PYTHON" -m venv --system-site-packages "$ROOT/out/gpu_venv"
  PYTHON=$ROOT/out/gpu_venv/bin/python
  "$PYTHON" -m pip install -q --no-index --no-deps --find-links "$WHEELS" -r "$ROOT/scripts/gpu/requirements.txt"
fi
export PATH="$(dirname "$PYTHON"):$PATH" PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" -m scripts.gpu.run "$@"
