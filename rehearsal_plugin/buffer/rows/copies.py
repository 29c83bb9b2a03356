"""Copies of rows: compiled, or those of numpy where the package was installed without a compiler."""

from __future__ import annotations

import functools
import logging

__all__ = ["COMPILED", "copy_runs", "find_lengths", "gather", "pad_rows", "scatter", "trim_rows", "warn_of_numpy"]

LOG = logging.getLogger(__name__)

try:
    from rehearsal_plugin.buffer.rows._copies import copy_runs, find_lengths, gather, pad_rows, scatter, trim_rows

    COMPILED = True
except ImportError:
    from rehearsal_plugin.buffer.rows.numpy_copies import copy_runs, find_lengths, gather, pad_rows, scatter, trim_rows

    COMPILED = False


@functools.cache  # once in a process
def warn_of_numpy() -> None:
    """Say once that copies take longer here than they could."""
    if not COMPILED:
        LOG.warning(
            "rehearsal_plugin was installed without its compiled copies, so numpy copies rows: the same results, and "
            "more time in the background; install a C compiler (Debian, Ubuntu: gcc and python3-dev) and run "
            "'pip install --force-reinstall --no-deps --no-binary rehearsal_plugin rehearsal_plugin'"
        )
