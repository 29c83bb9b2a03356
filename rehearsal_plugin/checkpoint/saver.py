"""Writes the checkpoints of a rank one at a time, on the calling thread or in the background."""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import Future
from pathlib import Path

from rehearsal_plugin.checkpoint.format import Content, RankFile
from rehearsal_plugin.checkpoint.increments import FullSave, IncrementalSave, RowsChain
from rehearsal_plugin.checkpoint.retention import next_number, outlived_files, remove_unused_rows, stamps_of_rank
from rehearsal_plugin.checkpoint.shared_folder import LAST_LOOK_S, SharedFolderCheck
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.background_thread import BackgroundThread
from rehearsal_plugin.errors import CheckpointError

__all__ = ["Saver"]

KEPT = 3
"""Checkpoints of a run that stay in a folder. While one is written in the background, another rank may be one ahead.
If the job dies then, the checkpoint before both is complete."""


class Saver:
    """Writes and removes the checkpoint files of one rank.

    | call | calling thread | background thread |
    |---|---|---|
    | `save`, at once | waits for the save before, writes, removes old files | |
    | `save`, asynchronous | waits for the save before, links files, copies rows | writes, removes old files |
    | `wait` | waits; raises the error of the save before | |
    | `close` | as `wait`; ends the background thread | |

    All calls come from one thread, and at most one save is under way.

    Args:
        timeout_s: Seconds to wait for a save in the background.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._worker: BackgroundThread[RowsChain | None] | None = None
        self._job: Future[RowsChain | None] | None = None
        self._last: RowsChain | None = None
        self._after = 0  # a number that all later saves exceed
        self._check = SharedFolderCheck()

    def save(
        self, folder: Path, rank_file: RankFile, content: Content, changed: IntArray | None, *, asynchronous: bool
    ) -> None:
        """Write a checkpoint, and remove all but the last ones of this run and rank from the folder.

        Args:
            folder: Folder to write into.
            rank_file: Main file of the checkpoint.
            content: The checkpoint; it may share memory with the buffer.
            changed: `[n]` int64, the slots that changed since the last call; None writes all rows into one file.
            asynchronous: Copy the content and write it in the background; errors are raised by the next call.

        Raises:
            CheckpointError: This or the save before it failed.
        """
        self.wait()
        last, self._last = self._last, None  # after any error from here on, the next save writes all rows
        save: FullSave | IncrementalSave = FullSave(folder, rank_file, content)
        if changed is not None:
            save = IncrementalSave.of(folder, rank_file, content, changed, last)
        if not asynchronous:
            self._last = _write_and_prune(save, self._after)
            self._check.saved(folder, rank_file)
            return
        self._check.saved(folder, rank_file)
        copied, after = save.copied(), self._after
        self._worker = self._worker or BackgroundThread(f"rehearsal-save-rank{rank_file.rank}")
        self._job = self._worker.submit(lambda: _write_and_prune(copied, after))

    def go_on_from(self, number: int) -> None:
        """Give later saves higher numbers than this one, of a save that need not lie on this rank's disk."""
        self._after = number

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            CheckpointError: The save failed, or takes longer than the timeout.
        """
        if self._job is None:
            return
        done, _ = concurrent.futures.wait([self._job], self._timeout_s)
        if not done:
            raise CheckpointError(
                f"a checkpoint is still being written after {self._timeout_s:.0f} s; is the disk reachable? "
                "If it is slow, raise rehearsal.checkpoint.write_timeout_s"
            )
        job, self._job = self._job, None
        self._last = job.result()

    def close(self) -> None:
        """Wait, and end the background thread.

        Raises:
            CheckpointError: As for `wait`.
        """
        try:
            self.wait()
            self._check.look_again(LAST_LOOK_S)
        finally:
            if self._worker is not None:
                self._worker.close(0.0)


def _write_and_prune(save: FullSave | IncrementalSave, after: int) -> RowsChain | None:
    """Write a checkpoint with a number above `after`, then remove the oldest ones that this rank looks after."""
    folder, rank_file = save.folder, save.rank_file
    stamps = stamps_of_rank(folder, rank_file)
    chain = save.write(max(next_number(stamps), after + 1))
    for old in outlived_files(stamps, rank_file, save.run, KEPT):
        (folder / old.name).unlink(missing_ok=True)
    remove_unused_rows(folder, rank_file)
    return chain
