"""Samples of MDS shards, which mosaicml-streaming writes.

Source of the format: `streaming/base/format/mds` of that library, which itself wants the clients of five clouds and
torchvision to be installed. `index.json` lists the shards. A shard is, little-endian:

    uint32          samples n
    n + 1 uint32    first byte of each sample, and the end
    ...             columns as JSON, which index.json has, too
    samples         uint32 size of each column of variable size, then the values of all columns
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rehearsal_plugin.checkpoint.convert.compressed import open_binary
from rehearsal_plugin.checkpoint.convert.sources import name_unreadable
from rehearsal_plugin.errors import DataError

__all__ = ["read_mds_samples"]

SHAPE_DTYPES = ("uint8", "uint16", "uint32", "uint64")
SCALARS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
ARRAY_DTYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
"""Codes of arrays that carry their dtype."""
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "str": lambda data: data.decode("utf-8"),
    "int": lambda data: int(np.frombuffer(data, np.int64)[0]),
    "str_int": lambda data: int(data),
    "str_float": lambda data: float(data),
    "json": lambda data: json.loads(data),
    **{name: lambda data, name=name: np.frombuffer(data, name)[0] for name in SCALARS},  # type: ignore[misc]
}
ENDINGS = {"zstd": ".zstd", "gz": ".gz", "bz2": ".bz2"}


def read_mds_samples(folder: Path, names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Read the samples of all shards; columns of images, pickles and bytes are left out.

    Args:
        folder: Folder with an `index.json`.
        names: Columns to read; None takes all.

    Raises:
        DataError: A shard is missing, does not fit the index, or is compressed in a way that is not known.
        MissingDependencyError: Shards are compressed with Zstandard, and zstandard is not installed.
    """
    with name_unreadable(folder / "index.json"):
        shards = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
    for shard in shards:
        if shard.get("format") != "mds" or shard.get("version") != 2:
            raise DataError(f"{folder / 'index.json'} lists shards of format {shard.get('format')}; 'mds' 2 is known")
        path = _file_of(folder, shard)
        with name_unreadable(path):
            yield from _read_samples(path, shard, names)


def _file_of(folder: Path, shard: dict[str, Any]) -> Path:
    """The file of a shard, compressed or not."""
    raw = folder / str(shard["raw_data"]["basename"])
    zipped = shard.get("zip_data")
    if raw.is_file() or zipped is None:
        return raw
    path = folder / str(zipped["basename"])
    method = str(shard["compression"]).partition(":")[0]
    if path.suffix != ENDINGS.get(method):
        raise DataError(
            f"{path} is compressed with {method}; decompress the shards, or write them with zstd, gz or bz2"
        )
    return path


def _read_samples(path: Path, shard: dict[str, Any], names: Collection[str] | None) -> Iterator[dict[str, Any]]:
    columns = list(zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True))
    with open_binary(path) as file:
        count = int.from_bytes(file.read(4), "little")
        bounds = np.frombuffer(file.read(4 * count + 4), np.uint32).astype(np.int64)
        if count != shard["samples"] or len(bounds) != count + 1:
            raise DataError(
                f"{path} does not fit its index.json, which lists {shard['samples']} samples; copy both again"
            )
        file.read(int(bounds[0]) - 4 * count - 8)
        for size in np.diff(bounds):
            sample = file.read(int(size))
            if len(sample) < size:
                raise DataError(f"{path} is cut off; copy it again")
            yield dict(_decode_columns(sample, columns, names))


def _decode_columns(
    sample: bytes, columns: list[tuple[str, str, int | None]], names: Collection[str] | None
) -> Iterator[tuple[str, Any]]:
    variable = sum(not size for _, _, size in columns)
    sizes, at = iter(np.frombuffer(sample, np.uint32, variable).tolist()), 4 * variable
    for name, encoding, fixed in columns:
        size = fixed or next(sizes)
        decode = _decoder(encoding)
        if decode is not None and (names is None or name in names):
            yield name, decode(sample[at : at + size])
        at += size


def _decoder(encoding: str) -> Callable[[bytes], Any] | None:
    kind, _, form = encoding.partition(":")
    if kind == "ndarray":
        return lambda data: _decode_array(data, form)
    return DECODERS.get(kind)


def _decode_array(data: bytes, form: str) -> Any:
    """An array: `form` may fix the dtype, or dtype and shape; what it does not fix stands before the values."""
    dtype, _, fixed = form.partition(":")
    at = 0
    if not dtype:
        dtype, at = ARRAY_DTYPES[data[0]], 1
    if fixed:
        return np.frombuffer(data[at:], dtype).reshape([int(size) for size in fixed.split(",")])
    dimensions, kind = data[at] >> 2, SHAPE_DTYPES[data[at] & 3]
    shape = np.frombuffer(data, kind, dimensions, at + 1)
    at += 1 + shape.nbytes
    return np.frombuffer(data[at:], dtype).reshape(shape.astype(np.int64))
