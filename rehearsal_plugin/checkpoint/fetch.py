"""Files of a checkpoint that lie on disks of other hosts, brought here for the time of a load.

All ranks know who has which file and who needs which, so they go through the same list of transfers, a piece at a time.
In a round a rank sends one piece to at most one rank and receives at most one, so it holds no more than two pieces::

    transfers          file 0: rank 0 -> 2     file 0: rank 0 -> 3     file 1: rank 1 -> 3
    rounds             0 -> 2 and 1 -> 3, until one of them is through; then 0 -> 3

An error of a disk waits until all transfers are over, so that no other rank is left waiting.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rehearsal_plugin.checkpoint.disks import SpreadCheckpoint
from rehearsal_plugin.checkpoint.format import NAME
from rehearsal_plugin.checkpoint.increments import ROWS_NAME
from rehearsal_plugin.checkpoint.saved_file import SavedFile
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator

__all__ = ["Copies", "Transfer", "fetched_files", "plan_transfers", "schedule_rounds"]

PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Transfer:
    """A file that goes from one rank to another.

    Attributes:
        name: Its name.
        length: Its bytes.
        holder: The rank that has it.
        reader: The rank that gets it.
    """

    name: str
    length: int
    holder: int
    reader: int


Piece: TypeAlias = tuple[Transfer, int, int]
"""Bytes `start` to `stop - 1` of a file: `(transfer, start, stop)`."""


def plan_transfers(checkpoint: SpreadCheckpoint, needed: Sequence[Sequence[int]]) -> list[Transfer]:
    """The transfers that bring every rank the files that it needs and does not have.

    Args:
        checkpoint: Files and holders.
        needed: Numbers of the files that each rank needs, by rank.
    """
    return [
        Transfer(name, length, checkpoint.holders[number][0], reader)
        for reader, numbers in enumerate(needed)
        for number in numbers
        if reader not in checkpoint.holders[number]
        for name, length in checkpoint.files[number].files
    ]


def schedule_rounds(transfers: Sequence[Transfer], piece: int = PIECE_BYTES) -> Iterator[list[Piece]]:
    """Pieces of each round, in which a rank sends one and receives one at most.

    >>> for round in schedule_rounds([Transfer("a", 3, 0, 1), Transfer("b", 2, 0, 2)], 2):
    ...     print([(transfer.name, start, stop) for transfer, start, stop in round])
    [('a', 0, 2)]
    [('a', 2, 3)]
    [('b', 0, 2)]
    """
    queues: dict[int, list[Transfer]] = {}
    for transfer in reversed(transfers):
        queues.setdefault(transfer.holder, []).append(transfer)  # the next one is last
    sent: dict[Transfer, int] = {}
    while queues:
        pieces, readers = [], set()
        for holder, queue in list(queues.items()):
            free = [transfer for transfer in queue if transfer.reader not in readers]
            if not free:
                continue
            transfer = free[-1]
            readers.add(transfer.reader)
            start = sent.get(transfer, 0)
            sent[transfer] = stop = min(start + piece, transfer.length)
            pieces.append((transfer, start, stop))
            if stop == transfer.length:
                queue.remove(transfer)
            if not queue:
                del queues[holder]
        yield pieces


@contextmanager
def fetched_files(
    folder: Path, checkpoint: SpreadCheckpoint, needed: Sequence[Sequence[int]], coordinator: ReplayCoordinator
) -> Iterator[list[SavedFile]]:
    """The files of a checkpoint, those that this rank needs where it can read them; copies are removed at the end.

    All ranks make this call. Copies lie in a folder within this rank's own, or where temporary files go.

    Args:
        folder: This rank's folder of checkpoints.
        checkpoint: Files and holders.
        needed: Numbers of the files that each rank needs, by rank.
        coordinator: It reaches the other ranks.

    Raises:
        CheckpointError: A file cannot be read here, or its copy cannot be written.
        ExchangeError: A rank does not answer.
    """
    rank, copies = coordinator.lifecycle.rank, Copies(folder, coordinator.lifecycle.rank)
    try:
        for pieces in schedule_rounds(plan_transfers(checkpoint, needed)):
            sent = {piece[0].reader: copies.read(*piece) for piece in pieces if piece[0].holder == rank}
            coming = {piece[0].holder: piece for piece in pieces if piece[0].reader == rank}
            lengths = {holder: stop - start for holder, (_, start, stop) in coming.items()}
            for holder, data in coordinator.lifecycle.swap_bytes(sent, lengths).items():
                copies.append(coming[holder][0].name, data)
        if copies.failure is not None:
            raise CheckpointError(
                f"files of the checkpoint in {folder} cannot be brought to the ranks that need them: {copies.failure}; "
                "make room, or copy the files of all ranks into one folder"
            ) from copies.failure
        held = zip(checkpoint.files, checkpoint.holders, strict=True)
        yield [(folder if rank in holders else copies.folder, file.rank_file) for file, holders in held]
    finally:
        copies.remove()


class Copies:
    """Reads pieces of this rank's files, and writes copies of others; the first error is kept, none is raised.

    Args:
        folder: This rank's folder of checkpoints.
        rank: This rank.

    Attributes:
        folder: Folder of the copies, made with the first one.
        failure: The first error.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._source, self.folder = folder, folder / f"rehearsal-rank{rank}.fetched"
        self._made: list[Path] = []
        self.failure: OSError | ValueError | None = None

    def read(self, transfer: Transfer, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop - 1` of a file; zeros after an error, as its reader waits for so many."""
        data = b""
        try:
            with (self._source / transfer.name).open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
            if len(data) < stop - start:
                raise OSError(f"{self._source / transfer.name} has become shorter")
        except OSError as error:
            self.failure = self.failure or error
        return data.ljust(stop - start, b"\0")

    def append(self, name: str, data: bytes) -> None:
        """Add a piece to the copy of a file."""
        if self.failure is not None:
            return
        try:
            if not (NAME.fullmatch(name) or ROWS_NAME.fullmatch(name)):
                raise ValueError(f"{name!r} is no file of a checkpoint")
            if not self._made:
                self._make_folder()
            with (self.folder / name).open("ab") as file:
                file.write(data)
        except (OSError, ValueError) as error:
            self.failure = error

    def remove(self) -> None:
        """Remove the copies, and the folders that were made for them."""
        for made in self._made:
            if made == self.folder:
                shutil.rmtree(made, ignore_errors=True)
            else:
                with suppress(OSError):  # something else is in it by now
                    made.rmdir()

    def _make_folder(self) -> None:
        missing = [path for path in (self._source, *self._source.parents) if not path.exists()]
        try:
            shutil.rmtree(self.folder, ignore_errors=True)  # remains of a job that died
            self.folder.mkdir(parents=True, mode=0o700)
        except OSError:  # a folder that is only read
            self.folder, missing = Path(tempfile.mkdtemp(prefix="rehearsal-")), []
        self._made = [self.folder, *missing]
