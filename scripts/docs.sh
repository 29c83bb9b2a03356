#!/usr/bin/env bash
# Build the site of the documentation into out/site; every warning is an error:
#
#     bash scripts/docs.sh [argument of mkdocs build ...]
#
# Then `python -m http.server -d out/site` shows it; the search needs a server, the pages do not. The pages of the
# reference that come from the code are built first.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${VENV:-$ROOT/.venv}
export NO_MKDOCS_2_WARNING=1
cd "$ROOT"

bash scripts/setup.sh docs
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
"$VENV/bin/python" -m scripts.reference.page
"$VENV/bin/python" -m mkdocs build --strict --clean "$@"
