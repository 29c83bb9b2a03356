"""Writes checkpoints, at once or in the background, one at a time."""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import Future
from pathlib import Path

from rehearsal_plugin.checkpoint.format import Content, Place, places
from rehearsal_plugin.checkpoint.increments import Chain, Increment, Whole, remove_unused
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.background_thread import BackgroundThread
from rehearsal_plugin.errors import CheckpointError

__all__ = ["Saver"]

KEPT = 3
"""Checkpoints of a rank that stay in one folder. While one is written in the background, another rank may be one ahead;
if the job dies then, the one before both is whole."""


class Saver:
    """The files of one rank.

    Args:
        timeout_s: How long to wait for a save in the background.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._worker: BackgroundThread[Chain | None] | None = None
        self._job: Future[Chain | None] | None = None
        self._last: Chain | None = None

    def save(
        self, folder: Path, place: Place, content: Content, changed: IntArray | None, *, asynchronous: bool
    ) -> None:
        """Write the checkpoint, and remove this rank's files of earlier ones but the last.

        Args:
            folder: Where.
            place: Which.
            content: What.
            changed: `[n]` int64, the slots that changed since the last call; None writes all rows into one file.
            asynchronous: Copy the content and write it in the background; errors are raised by the next call.

        Raises:
            CheckpointError: This or the save before it failed.
        """
        self.wait()
        last, self._last = self._last, None  # whatever fails from here on, the next save writes all rows
        save: Whole | Increment = Whole(folder, place, content)
        if changed is not None:
            save = Increment.of(folder, place, content, changed, last)
        if not asynchronous:
            self._last = _write(save)
            return
        copied = save.copied()
        self._worker = self._worker or BackgroundThread(f"rehearsal-save-rank{place.rank}")
        self._job = self._worker.submit(lambda: _write(copied))

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            CheckpointError: It failed, or takes too long.
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
        """Wait, and end the background.

        Raises:
            CheckpointError: As for `wait`.
        """
        try:
            self.wait()
        finally:
            if self._worker is not None:
                self._worker.close(0.0)


def _write(save: Whole | Increment) -> Chain | None:
    folder, place, chain = save.folder, save.place, save.write()
    # Those of ranks that are no more, too; never the new one, which a job that went back writes before later ones.
    own = [old for old in places(folder) if old.rank % place.size == place.rank and old != place]
    steps = sorted({old.step for old in own})
    for old in own:
        if old.step in steps[: 1 - KEPT]:
            (folder / old.name).unlink(missing_ok=True)
    remove_unused(folder, place)
    return chain
