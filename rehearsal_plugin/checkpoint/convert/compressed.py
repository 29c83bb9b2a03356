"""Files that may be compressed: the last ending says how."""

from __future__ import annotations

import bz2
import gzip
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.errors import DataError

__all__ = ["open_binary", "open_text"]

BYTES_AT_ONCE = 1 << 14
"""Compressed bytes: some ten times as many come out of text, and thousands of times out of repeated lines."""
BUFFER_BYTES = 1 << 20


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read its uncompressed bytes in order.

    Raises:
        DataError: The file is empty.
        EOFError: While it is read: the compressed file was cut off.
        MissingDependencyError: It is compressed with Zstandard, and zstandard is not installed.
    """
    if path.suffix in OPENERS and not path.stat().st_size:
        raise DataError(f"{path} is empty; copy it again")
    with OPENERS.get(path.suffix, Path.open)(path, "rb") as file:
        yield file


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a file to read its text, as `open_binary`; ends of lines stay, a byte order mark goes."""
    with open_binary(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


class _ZstdFile(io.RawIOBase):
    """Frames of Zstandard, one behind the other.

    The streams of the library take the end of a cut-off file for the end of its data; its plain decompressor tells
    them apart.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._new: Callable[[], Any]
        if sys.version_info >= (3, 14):
            from compression import zstd  # type: ignore[import-not-found,unused-ignore]

            self._new, self._error = zstd.ZstdDecompressor, zstd.ZstdError
        else:
            zstandard = optional_import("zstandard", extra="zstd", needed_by=str(path))
            self._new, self._error = lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
        self._frame, self._ready = self._new(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not len(self._ready):
            if not self._decompress_more():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress_more(self) -> bool:
        """Decompress the next bytes; False at the end of the file."""
        packed = self._frame.unused_data if self._frame.eof else b""
        packed = packed or self._file.read(BYTES_AT_ONCE)
        if not packed:
            if not self._frame.eof:
                raise EOFError("the compressed file ended before its end-of-stream marker; copy it again")
            return False
        if self._frame.eof:
            self._frame = self._new()
        try:
            self._ready = memoryview(self._frame.decompress(packed))
        except self._error as error:
            raise OSError(f"it is no Zstandard file, or damaged: {error}") from error
        return True


def _open_zstd(path: Path, _mode: str) -> io.BufferedReader:
    return io.BufferedReader(_ZstdFile(path), BUFFER_BYTES)


OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,  # as mosaicml-streaming calls it
}
