"""Folder that `rehearsal_plugin.run` puts on the `PYTHONPATH` of child processes, for its `sitecustomize`."""

from __future__ import annotations
