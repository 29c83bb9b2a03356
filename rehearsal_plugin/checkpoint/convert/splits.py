"""Splits of data sets, such as `train` and `test`: by the file that lists them, else by the names of the files.

Folders of Hugging Face's `save_to_disk` hold more than the data set: `cache-*.arrow` are results of earlier calls of
`map` and `filter`. `state.json` lists the data set's own files, `dataset_dict.json` the splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rehearsal_plugin.errors import DataError

__all__ = ["chosen_entries", "is_cache", "is_mds_folder", "listed_parts"]

SPLIT = re.compile(r"(?:.*-)?((?:train|training|test|testing|val|valid|validation|dev|eval)(?:_\w+)?)")
"""Name without endings: `train`, `train_sft`, `wiki-train`."""
SHARD = re.compile(r"[.-]\d+(-of-\d+)?$")
CACHE = re.compile(r"cache-[0-9a-z]+(_\d+_of_\d+)?\.arrow")


def listed_parts(folder: Path, split: str | None, chosen: list[str]) -> list[Path] | None:
    """Arrow files of a folder that `save_to_disk` wrote; None for any other folder.

    Args:
        folder: The folder.
        split: Split to take where there are several.
        chosen: Takes note of the split.

    Raises:
        DataError: No split was chosen, it does not exist, or a listed file is missing.
    """
    splits = _read_object(folder / "dataset_dict.json").get("splits")
    if splits is not None:
        chosen.append(_checked_split(folder, splits, split))
        folder = folder / chosen[-1]
    state = _read_object(folder / "state.json")
    if "_data_files" not in state:
        if splits is not None:
            raise DataError(f"{folder} has no state.json that lists its files; save the data set again")
        return None
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder} holds a selection of rows (_indices_files); save it again with flatten_indices()")
    if split is not None and state.get("_split") == split:
        chosen.append(split)
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}, which its state.json lists; copy the folder again")
    return files


def is_mds_folder(folder: Path) -> bool:
    """Whether a folder holds shards of mosaicml-streaming."""
    return (folder / "index.json").is_file() and "shards" in _read_object(folder / "index.json")


def is_cache(path: Path) -> bool:
    """Whether a file is the result of an earlier `map` or `filter`, beside the data set of Hugging Face."""
    beside = ("state.json", "dataset_info.json")
    return CACHE.fullmatch(path.name) is not None and any((path.parent / name).is_file() for name in beside)


def chosen_entries(folder: Path, split: str | None, chosen: list[str]) -> tuple[list[Path], str | None]:
    """Entries of a plain folder, sorted, and the split to look for below them.

    Hidden files, caches of Hugging Face and links to folders are left out. Where the names are those of splits, such as
    `train-00000-of-00002.parquet` and `test/`, the entries are those of one split.

    Raises:
        DataError: There are several splits and none was chosen, or not this one.
    """
    entries = [
        entry
        for entry in sorted(folder.iterdir())
        if not (entry.name.startswith(".") or CACHE.fullmatch(entry.name) or (entry.is_symlink() and entry.is_dir()))
    ]
    by_split: dict[str, list[Path]] = {}
    for entry in entries:
        if (entry.is_dir() or entry.suffix) and (name := _split_name(entry)):
            by_split.setdefault(name, []).append(entry)
    if not by_split or (split is None and len(by_split) == 1):
        return entries, split
    chosen.append(_checked_split(folder, by_split, split))
    return by_split[chosen[-1]], None


def _split_name(entry: Path) -> str | None:
    stem = entry.name
    while (ending := Path(stem).suffix) and not re.fullmatch(r"\.\d.*", ending):
        stem = Path(stem).stem
    match = SPLIT.fullmatch(SHARD.sub("", stem))
    return match[1] if match else None


def _checked_split(folder: Path, splits: Collection[str], split: str | None) -> str:
    names = ", ".join(sorted(splits))
    if split is None and len(splits) != 1:
        raise DataError(
            f"{folder} has the splits {names}; choose one with --split, such as --split {sorted(splits)[-1]}"
        )
    if split is not None and split not in splits:
        raise DataError(f"{folder} has no split '{split}'; it has {names}")
    return split or next(iter(splits))


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file, or it is not one."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
