"""The buffer and everything that the next steps depend on, in files; see `docs/guides/checkpoints.md`."""

from __future__ import annotations

from rehearsal_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of
from rehearsal_plugin.checkpoint.resume import content_of, preload, resume
from rehearsal_plugin.checkpoint.saver import Saver

__all__ = ["Fingerprint", "Saver", "content_of", "fingerprint_of", "preload", "resume"]
