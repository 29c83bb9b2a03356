"""Tokens of a Megatron corpus: `NAME.bin` holds them, `NAME.idx` where each sequence begins.

Source of the format: `megatron/core/datasets/indexed_dataset.py` of Megatron-LM. The index is, little-endian:

    9 bytes   MMIDIDX and two zeros          8 bytes   version, 1           1 byte   code of the tokens' dtype
    8 bytes   sequences n                    8 bytes   documents and one d
    n int32   tokens of each sequence        n int64   its first byte in .bin
    d int64   first sequence of each document, and n
    n int8    only in multimodal corpora: mode of each sequence, 0 for text
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import DataError

__all__ = ["read_megatron_tokens"]

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Codes of integers; 6 and 7 are floating."""
TOKENS_AT_ONCE = 1 << 20


def read_megatron_tokens(index: Path) -> Iterator[IntArray]:
    """Read all tokens in their order, int64, about a million at a time.

    Raises:
        DataError: The index is none, is cut off, or does not belong to the data.
    """
    data = index.with_suffix(".bin")
    if not data.is_file():
        raise DataError(f"{index} has no {data.name} beside it, which holds its tokens; put the two together")
    dtype, total = _read_index(index)
    if data.stat().st_size != total * np.dtype(dtype).itemsize:
        expected = total * np.dtype(dtype).itemsize
        raise DataError(
            f"{data} has {data.stat().st_size:,} bytes, and {index.name} lists {expected:,}: one of the two is of "
            "another corpus or cut off; copy both again"
        )
    if total:
        tokens = np.memmap(data, dtype=dtype, mode="r")
        for start in range(0, total, TOKENS_AT_ONCE):
            yield tokens[start : start + TOKENS_AT_ONCE].astype(np.int64)


def _read_index(path: Path) -> tuple[Any, int]:
    """The dtype of the tokens, and their number."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise DataError(f"{path} is no index of a Megatron corpus: it does not begin with MMIDIDX")
        _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise DataError(f"{path} has version {version} and tokens of type {code}; version 1 with integers is known")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):
        raise DataError(f"{path} has {size:,} bytes, and its header lists {expected:,}: it is cut off; copy it again")
    if not sequences:
        return DTYPES[code], 0
    lengths = np.memmap(path, np.int32, "r", HEADER.size, (sequences,)).astype(np.int64)
    starts = np.memmap(path, np.int64, "r", HEADER.size + 4 * sequences, (sequences,))
    if size == expected + sequences and np.memmap(path, np.int8, "r", expected, (sequences,)).any():
        raise DataError(f"{path} is of a multimodal corpus; only text can be read")
    # Writers put sequences one behind the other; then the file is one stream of tokens, and needs no list of pieces.
    ends = np.cumsum(lengths) * np.dtype(DTYPES[code]).itemsize
    if (lengths < 0).any() or starts[0] != 0 or not np.array_equal(starts[1:], ends[:-1]):
        raise DataError(f"{path} lists sequences that do not follow each other; write the corpus again")
    return DTYPES[code], int(lengths.sum())
