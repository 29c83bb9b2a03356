"""Memory, disk and paths of this machine, against what the section asks for."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from rehearsal_plugin.cli.doctor.finding import Finding, fine, problem, warning
from rehearsal_plugin.config import RehearsalConfig

__all__ = ["check_memory", "check_paths", "free_memory"]

TIGHT = 0.8
"""Share of what is free from which on a buffer leaves little for training."""

LIMITS = (  # of a container: the most bytes, and those in use
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory() -> int | None:
    """Bytes of host memory that a job can have, within the limit of a container; None where that is not known."""
    free = []
    with suppress(OSError):
        match = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free += [] if match is None else [1024 * int(match[1])]
    for limit, used in LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return min(free, default=None)


def check_memory(config: RehearsalConfig, ranks: int, row_bytes: int | None) -> Iterator[Finding]:
    """Whether the buffers of all ranks of this machine fit.

    Args:
        config: The section.
        ranks: Ranks of this machine.
        row_bytes: Bytes of a row; None where nobody told.
    """
    buffer = config.buffer
    wanted = buffer.capacity_bytes or (None if row_bytes is None else buffer.rows(row_bytes) * row_bytes)
    if wanted is None:
        yield warning(
            "memory",
            f"rehearsal.buffer.capacity is {buffer.capacity} rows, and nobody told how long a row is",
            "give --row-bytes BYTES, --field NAME=DTYPE[SHAPE] for each field, or --rows-of CHECKPOINT",
        )
        return
    where, free = _free_space(config)
    if free is None:
        yield warning("memory", f"how much of {where} is free cannot be told here", "see that the buffers fit")
        return
    text = f"{ranks} buffers of {_gib(wanted)} take {_gib(ranks * wanted)} of {where}, of which {_gib(free)} are free"
    cure = "lower rehearsal.buffer.capacity, start fewer ranks here, or set rehearsal.buffer.storage to 'mmap'"
    if ranks * wanted > free:
        yield problem("memory", text, cure)
    elif ranks * wanted > TIGHT * free:
        yield warning("memory", text, cure)
    else:
        yield fine("memory", text)


def check_paths(config: RehearsalConfig) -> Iterator[Finding]:
    """Whether files can be written and read where the section names them."""
    written = {"the folder for temporary files": tempfile.gettempdir()}
    if config.buffer.path is not None:
        written["rehearsal.buffer.path"] = config.buffer.path
    if config.metrics.file is not None:
        written["rehearsal.metrics.file"] = config.metrics.file
    yield from (_check_written(name, Path(path)) for name, path in written.items())
    read = {
        "rehearsal.buffer.preload": config.buffer.preload,
        "rehearsal.sampling.weights_file": config.sampling.weights_file,
    }
    yield from (_check_read(name, Path(path)) for name, path in read.items() if path is not None)


def _free_space(config: RehearsalConfig) -> tuple[str, int | None]:
    """Where the rows lie, and the bytes that are free there."""
    storage = config.buffer.storage
    if storage == "cuda":
        return "the GPU's memory", torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if storage == "mmap":
        folder = _existing(Path(config.buffer.path or "."))
        return f"the disk of {folder}", shutil.disk_usage(folder).free
    return "the memory", free_memory()


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _check_written(name: str, path: Path) -> Finding:
    there = _existing(path)
    if os.access(there, os.W_OK) and (there.is_dir() or there == path.absolute()):
        return fine("paths", f"{name} {path} can be written")
    return problem("paths", f"{name} {path} cannot be written", f"make {there} writable, or name another place")


def _check_read(name: str, path: Path) -> Finding:
    if os.access(path, os.R_OK):
        return fine("paths", f"{name} {path} can be read")
    return problem("paths", f"{name} {path} cannot be read", "correct the path, or make it readable for this user")


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
