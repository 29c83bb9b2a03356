"""Data sets at paths: files by their ending, folders by the file that lists their parts."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from rehearsal_plugin.checkpoint.convert.splits import chosen_entries, is_cache, is_mds_folder, listed_parts
from rehearsal_plugin.errors import DataError

__all__ = ["Source", "find_sources", "name_unreadable"]

FORMS = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".arrow": "arrow",
    ".parquet": "parquet",
    ".txt": "text",
    ".jsonl": "lines",
    ".json": "json",
    ".tar": "tar",
    ".tgz": "tar",
    ".idx": "megatron",
}
COMPRESSIBLE = {"text", "lines", "json", "tar"}


@dataclass(frozen=True)
class Source:
    """A data set, or a part of one.

    Attributes:
        path: A file; the folder of the shards for `mds`, and the index for `megatron`.
        form: A value of `FORMS`, or `mds`.
    """

    path: Path
    form: str


def find_sources(
    paths: Sequence[Path], forms: Collection[str], split: str | None = None, asides: Collection[str] = ()
) -> list[Source]:
    """The data sets at `paths`; those in folders in the order of their names.

    Args:
        paths: Files, or folders of them.
        forms: Forms that can be read.
        split: Name of the split to take from data sets that have several.
        asides: Forms that a folder's files have only where it has none of another one: `.json` is mostly a description.

    Raises:
        DataError: A path is no such data set, or has several splits and none was chosen.
    """
    sources: list[Source] = []
    chosen: list[str] = []  # filled by the folders that have splits
    for path in paths:
        if is_cache(path):
            raise DataError(f"{path} is a cache of map() or filter(), and no part of the data set; give its folder")
        inside = list(_walk(path, split, chosen)) if path.is_dir() else [_source_of(path)]
        known = [source for source in inside if source is not None and source.form in forms]
        sources += [source for source in known if source.form not in asides or not path.is_dir()] or known
        if not known:
            endings = ", ".join(sorted(ending for ending, form in FORMS.items() if form in forms))
            raise DataError(f"{path} is no file that ends in {endings}, and no folder of such files")
    if split is not None and not chosen:
        raise DataError(f"there is no split '{split}': the data has none; leave out --split")
    # A shell's `*` gives both files of a Megatron corpus.
    return [source for at, source in enumerate(sources) if source.form != "megatron" or source not in sources[:at]]


@contextmanager
def name_unreadable(path: Path) -> Iterator[None]:
    """Turn any error while a file is read into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        RuntimeError,
        BadZipFile,
        zlib.error,
        tarfile.TarError,
    ) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _walk(folder: Path, split: str | None, chosen: list[str]) -> Iterator[Source]:
    """The data sets in a folder and in those below it."""
    with name_unreadable(folder):
        parts = listed_parts(folder, split, chosen)
    if parts is not None:
        yield from (Source(part, "arrow") for part in parts)
    elif is_mds_folder(folder):
        yield Source(folder, "mds")
    else:
        entries, below = chosen_entries(folder, split, chosen)
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry, below, chosen)
            elif (source := _source_of(entry)) is not None and entry.suffix != ".bin":
                yield source


def _source_of(path: Path) -> Source | None:
    """A file by its ending; either file of a Megatron corpus, or the name that they share, stands for both."""
    ending = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    form = FORMS.get(ending)
    if ending == path.suffix or form in COMPRESSIBLE:
        if form is not None:
            return Source(path, form)
        index = path.with_suffix(".idx") if path.suffix == ".bin" else Path(f"{path}.idx")
        if path.suffix == ".bin" or index.is_file():
            return Source(index, "megatron")
    return None
