#!/usr/bin/env bash
# Test with the trainers that people start, TRL and LLaMA-Factory among them, on two CPU processes:
#
#     bash scripts/test_clients.sh [NAME [argument of pytest ...]]      # default: all
#
# NAME is trl, llamafactory, axolotl, ms_swift, transformers457 or transformers453. Each one is installed, by the pins
# in tests/clients, into an environment of its own: .venv-clients/<NAME> of this repository, or the folder named by
# CLIENTS. That of TRL has Lightning, too, and runs the tests of plain loops. The models are tiny and random, the data
# are generated; no network is used after the installation.
#
# Every command starts several processes with slow imports, so this is run by hand before a release. Without arguments
# of pytest the outcomes go to docs/results/clients.json; `python -m scripts.clients.page` builds docs/guides/trainers of them.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CLIENTS=$(realpath -m "${CLIENTS:-$ROOT/.venv-clients}")
ALL="trl llamafactory axolotl ms_swift transformers457 transformers453"
if [ $# -gt 0 ] && [[ " $ALL " == *" $1 "* ]]; then NAMES=$1; shift; else NAMES=$ALL; fi
cd "$ROOT"

pip_install() { "$VENV/bin/python" -m pip install -q "$@"; }

install_trl() {
  bash scripts/setup.sh dev deepspeed transformers
  pip_install -c constraints.txt -r tests/clients/trl.txt
}

# The pins of the others contradict constraints.txt, of which torch and the tools for tests hold for them, too.
install_pinned() {
  bash scripts/setup.sh deepspeed
  pip_install -c constraints.txt pytest pytest-timeout hypothesis
  pip_install -c <(grep '^torch==' constraints.txt) -r "$1"
}

install_llamafactory() {
  install_pinned <(grep -v '^llamafactory==' tests/clients/llamafactory.txt)
  pip_install --no-deps -r <(grep '^llamafactory==' tests/clients/llamafactory.txt)
  # It imports torchaudio, and calls it for sound alone.
  touch "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio.py"
}

folders_of() {
  case $1 in
    trl) echo tests/clients/trl tests/clients/loops tests/scripts/test_examples.py ;;
    transformers*) echo tests/clients/transformers tests/integrations/transformers ;;
    *) echo "tests/clients/$1" ;;
  esac
}

FAILED=0
for NAME in $NAMES; do
  export VENV=$CLIENTS/$NAME
  STAMP=$VENV/.setup/$(cat pyproject.toml constraints.txt scripts/test_clients.sh "tests/clients/$NAME.txt" | sha256sum | cut -d' ' -f1)
  if [ ! -e "$STAMP" ]; then
    if declare -F "install_$NAME" >/dev/null; then "install_$NAME"; else install_pinned "tests/clients/$NAME.txt"; fi
    touch "$STAMP"
  fi
  echo "clients: $NAME"
  if [ $# -eq 0 ]; then export CLIENT_NAME=$NAME CLIENT_RESULTS=$ROOT/docs/results/clients.json; fi
  # shellcheck disable=SC2046 # several folders
  PATH="$VENV/bin:$PATH" OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 \
    "$VENV/bin/python" -m pytest --timeout 900 $(folders_of "$NAME") "$@" || FAILED=1
done
exit $FAILED
