#!/usr/bin/env bash
# Test on several hosts, which are network namespaces of this machine with an address, a name and a disk each:
#
#     bash scripts/test_hosts.sh [argument of pytest ...]
#
# torchrun, the deepspeed launcher (pdsh and a hostfile) and horovodrun over ssh; checkpoints on the disks of the hosts;
# links with delay, loss and a rate, and links that are cut. It needs root and Linux; apt-get installs what is missing.
# Where namespaces are not allowed, as in most containers, it says so and tests nothing. Ten minutes on two cores.
# Horovod's test is skipped unless scripts/install_horovod.sh has built it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${VENV:-$ROOT/.venv}
cd "$ROOT"

if [ "$(id -u)" != 0 ]; then
  echo "hosts: skipped, they need root" >&2
  exit 0
fi
declare -A PACKAGES=([ip]=iproute2 [unshare]=util-linux [ssh]=openssh-client [/usr/sbin/sshd]=openssh-server [pdsh]=pdsh)
MISSING=()
for TOOL in "${!PACKAGES[@]}"; do
  command -v "$TOOL" >/dev/null || MISSING+=("${PACKAGES[$TOOL]}")
done
if [ ${#MISSING[@]} != 0 ]; then
  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${MISSING[@]}"
fi
TRY=rehearsal-try$$
if ! ip netns add "$TRY" 2>/dev/null; then
  echo "hosts: skipped, this machine allows no network namespaces" >&2
  exit 0
fi
ip netns del "$TRY"

[ -n "${SKIP_SETUP:-}" ] || bash scripts/setup.sh dev deepspeed
REHEARSAL_HOSTS=1 OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu exec "$VENV/bin/python" -m pytest tests/hosts "$@"
