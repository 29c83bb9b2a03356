#!/usr/bin/env bash
# Set up what is missing, then train a small GPT on Python source and on C++ headers, with and without rehearsal:
#
#     bash scripts/quickstart.sh [argument of scripts/quickstart.py ...]
#
# Some three minutes on two cores after the set-up; the results are in out/quickstart.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${VENV:-$ROOT/.venv}

bash "$ROOT/scripts/setup.sh" deepspeed plot
exec "$VENV/bin/python" "$ROOT/scripts/quickstart.py" --ranks 2 "$@"
