"""Small data sets on disk in the formats of other tools, written as these write them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["save_to_disk", "write_mds", "write_megatron", "write_tar"]


def save_to_disk(folder: Path, columns: Mapping[str, Sequence[Any]], files: int = 2, split: str | None = None) -> None:
    """As `datasets.Dataset.save_to_disk` does, with a cache of `map` beside it."""
    folder.mkdir(parents=True)
    whole = pa.table(dict(columns))
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    size = -(-len(whole) // files)
    for number, name in enumerate(names):
        _write_stream(folder / name, whole.slice(number * size, size))
    _write_stream(folder / "cache-1f2e3d4c5b6a7980.arrow", whole)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def _write_stream(path: Path, table: Any) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_megatron(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16, code: int = 8) -> Path:
    """As `IndexedDatasetBuilder` of Megatron-LM does; returns the index."""
    lengths = np.array([len(document) for document in documents], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))[:-1]]) * np.dtype(dtype).itemsize
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(document, dtype).tobytes() for document in documents))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    ends = np.arange(len(documents) + 1, dtype=np.int64)
    index = prefix.with_suffix(".idx")
    index.write_bytes(header + lengths.tobytes() + starts.astype(np.int64).tobytes() + ends.tobytes())
    return index


def write_mds(
    folder: Path, samples: Sequence[Mapping[str, bytes]], encodings: Mapping[str, str], shards: int = 2
) -> None:
    """As `MDSWriter` of mosaicml-streaming does; values are encoded already, all of variable size."""
    folder.mkdir(parents=True)
    size = -(-len(samples) // shards)
    listed: list[dict[str, Any]] = []
    for number in range(shards):
        part = samples[number * size : (number + 1) * size]
        about: dict[str, Any] = {"column_names": list(encodings), "column_encodings": list(encodings.values())}
        about |= {"column_sizes": [None] * len(encodings), "format": "mds", "version": 2, "compression": None}
        packed = [_pack_sample([sample[name] for name in encodings]) for sample in part]
        config = json.dumps(about).encode()
        first = 4 + 4 * (len(part) + 1) + len(config)
        bounds = first + np.concatenate([[0], np.cumsum([len(one) for one in packed])])
        name = f"shard.{number:05}.mds"
        (folder / name).write_bytes(
            struct.pack("<I", len(part)) + bounds.astype(np.uint32).tobytes() + config + b"".join(packed)
        )
        listed.append(about | {"samples": len(part), "raw_data": {"basename": name}, "zip_data": None, "hashes": []})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": listed}))


def _pack_sample(values: Sequence[bytes]) -> bytes:
    return np.array([len(value) for value in values], np.uint32).tobytes() + b"".join(values)


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """As `webdataset.TarWriter` does."""
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
