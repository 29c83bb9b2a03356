"""Writes checkpoints, at once or in the background, one at a time."""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import Future
from pathlib import Path

from rehearsal_plugin.checkpoint.files import Content, Place, places, write
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.worker import Worker

__all__ = ["Saver"]

KEPT = 2
"""Checkpoints of a rank that stay in one folder: the newest, and one for a job that dies before all have saved."""


class Saver:
    """The files of one rank.

    Args:
        timeout_s: How long to wait for a save in the background.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._worker: Worker[None] | None = None
        self._job: Future[None] | None = None

    def save(self, folder: Path, place: Place, content: Content, *, asynchronous: bool) -> None:
        """Write the file, and remove this rank's files of checkpoints before the last two.

        Args:
            folder: Where.
            place: Which.
            content: What.
            asynchronous: Copy the content and write it in the background; errors are raised by the next call.

        Raises:
            CheckpointError: This or the save before it failed.
        """
        self.wait()
        if not asynchronous:
            _write(folder, place, content)
            return
        tensors = {name: tensor.clone() for name, tensor in content.tensors.items()}
        copied = Content(content.meta, tensors)
        self._worker = self._worker or Worker(f"rehearsal-save-rank{place.rank}")
        self._job = self._worker.submit(lambda: _write(folder, place, copied))

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            CheckpointError: It failed, or takes too long.
        """
        job, self._job = self._job, None
        if job is None:
            return
        try:
            job.result(self._timeout_s)
        except concurrent.futures.TimeoutError as error:
            raise CheckpointError(
                f"a checkpoint could not be written within {self._timeout_s:.0f} s; is the disk reachable?"
            ) from error

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


def _write(folder: Path, place: Place, content: Content) -> None:
    write(folder, place, content)
    others = [old for old in places(folder) if old.rank == place.rank and old != place]
    for old in others[: 1 - KEPT]:  # never the new one, which a job that went back has written before later ones
        (folder / old.name).unlink(missing_ok=True)
