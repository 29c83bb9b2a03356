"""Real trainers with the plugin; `scripts/test_clients.sh` installs them and runs these tests."""

from __future__ import annotations
