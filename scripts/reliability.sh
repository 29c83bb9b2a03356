#!/usr/bin/env bash
# Set up what is missing, then try what must not break a job: faults, malformed input, thousands of steps.
#
#     bash scripts/reliability.sh [--quick]
#
# With --quick under five minutes on two cores after the set-up; the report is in out/reliability.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${VENV:-$ROOT/.venv}

bash "$ROOT/scripts/setup.sh" dev deepspeed
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$VENV/bin/python" -m scripts.benchmarks.reliability "$@"
