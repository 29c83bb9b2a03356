#!/usr/bin/env bash
# Set up what is missing, then train a small GPT on Python source and on C++ headers, with and without rehearsal:
#
#     bash scripts/quickstart.sh [argument of scripts/quickstart/run.py ...]
#
# Some three minutes on two cores after the set-up; the results are in out/quickstart.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${VENV:-$ROOT/.venv}

bash "$ROOT/scripts/setup.sh" deepspeed plot
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$VENV/bin/python" -m scripts.quickstart.run --ranks 2 "$@"
