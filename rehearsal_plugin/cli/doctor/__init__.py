"""`rehearsal doctor`: whether a job can run here, each finding with its cure."""

from __future__ import annotations

from rehearsal_plugin.cli.doctor.command import doctor

__all__ = ["doctor"]
