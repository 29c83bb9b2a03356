#!/usr/bin/env bash
# Build the site of the documentation into out/site; every warning is an error:
#
#     bash scripts/docs.sh [argument of mkdocs build ...]
#
# Then open out/site/index.html. The pages that are generated come first: the config, the command line, the metrics.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${VENV:-$ROOT/.venv}
export NO_MKDOCS_2_WARNING=1
cd "$ROOT"

bash scripts/setup.sh docs
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
"$VENV/bin/python" -m scripts.reference.page
"$VENV/bin/python" -m mkdocs build --strict --clean "$@"
