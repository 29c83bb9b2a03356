"""`python -m rehearsal_plugin.doctor`, and under a launcher `torchrun ... -m rehearsal_plugin.doctor`.

It is `rehearsal doctor`.
"""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "doctor")
    runpy.run_module("rehearsal_plugin.cli", run_name="__main__", alter_sys=True)
