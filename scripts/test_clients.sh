#!/usr/bin/env bash
# Test with the trainers that people start, TRL and LLaMA-Factory among them, on two CPU processes:
#
#     bash scripts/test_clients.sh [trl|llamafactory] [argument of pytest ...]      # default: both
#
# Each one is installed, by the pins in tests/clients, into an environment of its own: .venv-clients/<name> of this
# repository, or the folder named by CLIENTS. That of TRL has Lightning, too, and runs the tests of plain loops. The
# models are tiny and random, the data are generated; no network is used after the installation. Every command starts
# several processes with slow imports, so it is run by hand before a release; docs/trainers.md has the last result.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CLIENTS=$(realpath -m "${CLIENTS:-$ROOT/.venv-clients}")
case ${1:-} in
  trl | llamafactory) NAMES=$1; shift ;;
  *) NAMES="trl llamafactory" ;;
esac
cd "$ROOT"

pip_install() { "$VENV/bin/python" -m pip install -q "$@"; }

install_trl() {
  bash scripts/setup.sh dev deepspeed transformers
  pip_install -c constraints.txt -r tests/clients/trl.txt
}

# Its pins contradict constraints.txt, of which torch and the tools for tests hold here, too.
install_llamafactory() {
  bash scripts/setup.sh deepspeed
  pip_install -c constraints.txt pytest pytest-timeout hypothesis
  pip_install -c <(grep '^torch==' constraints.txt) -r <(grep -v '^llamafactory==' tests/clients/llamafactory.txt)
  pip_install --no-deps -r <(grep '^llamafactory==' tests/clients/llamafactory.txt)
  # It imports torchaudio, and calls it for sound alone.
  touch "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio.py"
}

folders_of() { if [ "$1" = trl ]; then echo tests/clients/trl tests/clients/loops; else echo "tests/clients/$1"; fi; }

FAILED=0
for NAME in $NAMES; do
  export VENV=$CLIENTS/$NAME
  STAMP=$VENV/.setup/$(cat pyproject.toml constraints.txt scripts/test_clients.sh "tests/clients/$NAME.txt" | sha256sum | cut -d' ' -f1)
  if [ ! -e "$STAMP" ]; then
    "install_$NAME"
    touch "$STAMP"
  fi
  echo "clients: $NAME"
  PATH="$VENV/bin:$PATH" OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 \
    "$VENV/bin/python" -m pytest $(folders_of "$NAME") "$@" || FAILED=1
done
exit $FAILED
