"""Whether the folder of a job's checkpoints is one for all ranks; found out without a message between them."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from rehearsal_plugin.checkpoint.format import RankFile

__all__ = ["SharedFolderCheck"]

LOG = logging.getLogger(__name__)

LAST_LOOK_S = 1.0
"""How long the end of a job waits for a file of rank 0 to appear, which may be saving a moment later."""

LOOK_S = 0.05


class SharedFolderCheck:
    """The last rank looks for the file of rank 0 beside its own, and says once if each host has a folder of its own.

    It looks after its own save. If there is nothing, rank 0 may only be slower, so it looks again at the next save or
    at the end of the job.
    """

    def __init__(self) -> None:
        self._expected: tuple[Path, RankFile] | None = None
        self._known = False

    def saved(self, folder: Path, rank_file: RankFile) -> None:
        """Look for rank 0 in a folder into which this rank has just saved, and in that of the save before."""
        if self._known or rank_file.rank == 0 or rank_file.rank != rank_file.size - 1:
            return
        self.look_again()
        first = folder, replace(rank_file, rank=0)
        if _is_there(*first):
            self._known = True
        elif not self._known:
            self._expected = first

    def look_again(self, patience_s: float = 0.0) -> None:
        """Look for what an earlier save missed; if it is still missing, the folder is not shared."""
        expected, self._expected = self._expected, None
        if expected is None:
            return
        deadline = time.monotonic() + patience_s
        while not (seen := _is_there(*expected)) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        folder, first = expected
        if not seen and not (folder / replace(first, rank=first.size - 1).name).exists():
            return  # the save was removed meanwhile
        self._known = True
        if not seen:
            LOG.info(
                "rank %d does not see the files of rank 0 in %s, so each host has a folder of its own; a later job of "
                "any number of ranks can load this checkpoint if it runs on the hosts that have the files",
                first.size - 1,
                folder,
            )


def _is_there(folder: Path, rank_file: RankFile) -> bool:
    """Whether a file is written, or about to be."""
    return (folder / rank_file.name).exists() or (folder / rank_file.partial).exists()
