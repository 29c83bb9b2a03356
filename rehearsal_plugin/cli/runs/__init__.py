"""`rehearsal watch` and `rehearsal report`: what a job does, from the files that it writes."""

from __future__ import annotations

from rehearsal_plugin.cli.runs.report import report
from rehearsal_plugin.cli.runs.watch import watch

__all__ = ["report", "watch"]
