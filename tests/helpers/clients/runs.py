"""A command of a real trainer, run with and without the plugin, and what its ranks trained on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.clients.tiny_llm import LONGEST, PAD
from tests.helpers.paths import ROOT
from tests.helpers.script_runs import run_command

__all__ = ["LEAD", "REPLAYED", "Run", "run_client", "section_file"]

LEAD = 3
"""Steps before the first replayed row."""

REPLAYED = 2
"""Replayed rows of a micro-batch."""

ABORT = "terminate called without an active exception"
WITNESS = Path(__file__).parent / "witness"
VALUES = {"input_ids": PAD, "attention_mask": 0, "labels": -100}


@dataclass(frozen=True)
class Run:
    """What a command did.

    Attributes:
        ranks: What the witness noted on each rank; see `witness/sitecustomize.py`.
        status: Exit status.
        printed: Both streams.
    """

    ranks: list[dict[str, Any]]
    status: int
    printed: str

    def rows(self, rank: int, part: str = "train") -> list[list[tuple[int, ...]]]:
        """The tokens of each row, or document of a flat row, of each micro-batch, without padding."""
        return [rows_of(batch) for batch in self.ranks[rank][part]]


def rows_of(batch: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """The tokens of each row, or document of a flat row, without padding."""
    count = len(batch["input_ids"])
    if "attention_mask" in batch:
        return [row_of(batch, number) for number in range(count)]
    return documents_of(batch) if count == 1 else [unmasked_row_of(batch, number) for number in range(count)]


def unmasked_row_of(batch: Mapping[str, Tensor], number: int) -> tuple[int, ...]:
    """The tokens of a row, their labels and their positions, without what both fields call padding."""
    counts = (batch["input_ids"][number] != PAD) | (batch["labels"][number] != -100)
    end = int(counts.nonzero().max()) + 1
    return tuple(torch.cat([batch[name][number][:end] for name in ("input_ids", "labels", "position_ids")]).tolist())


def documents_of(batch: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """The tokens of each document of a flat row, and its labels; all that tells boundaries is held to be right."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    ends = torch.cat([starts[1:], torch.tensor([batch["input_ids"].shape[1]])])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].tolist() == [0, *ends.tolist()]
    positions = torch.cat([torch.arange(int(length)) for length in ends - starts])
    assert torch.equal(batch["position_ids"][0], positions)
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    return [tuple(torch.cat([batch[n][0, a:b] for n in ("input_ids", "labels")]).tolist()) for a, b in pairs]


def row_of(batch: Mapping[str, Tensor], number: int) -> tuple[int, ...]:
    """The tokens of a row, and what its labels or masks say of them, without padding."""
    mask, others = batch["attention_mask"][number], list[Tensor]()
    if mask.ndim == 3:  # documents that do not see each other: 0 where a position sees another, [1, length, length]
        visible = mask[0] == 0
        mask, others = visible.diagonal(), [visible.sum(1)[visible.diagonal()]]
    mask = mask.bool()
    others += [batch[name][number][mask] for name in ("labels", "completion_mask") if name in batch]
    return tuple(torch.cat([batch["input_ids"][number][mask], *others]).tolist())


def section_file(folder: Path, *, padding: Mapping[str, int] | None = None, **keys: Any) -> Path:
    """A file with a section of two replayed rows a micro-batch; `padding` names further fields and their values."""
    section: dict[str, Any] = {"buffer": {"capacity": 200}, "representatives": REPLAYED, **keys}
    if padding is not None:
        section["padding"] = {"length": LONGEST, "values": dict(padding)}
    path = folder / "rehearsal.json"
    path.write_text(json.dumps(section))
    return path


def run_client(
    command: Sequence[object],
    folder: Path,
    *,
    section: Path | None = None,
    ranks: int = 2,
    environment: Mapping[str, str] | None = None,
    may_abort: bool = False,
    timeout_s: float = 420,
) -> Run:
    """Run `python <command>`, through `rehearsal_plugin.run --strict` where a section is given.

    Args:
        command: Arguments of Python: a script or `-m module`, and its arguments.
        folder: What the witness notes goes here; made anew.
        section: File of the rehearsal section; None runs the command alone.
        ranks: Ranks that are to train; 0 for a command that is to fail.
        environment: Added to that of the process.
        may_abort: Ranks may abort when all is done, as DeepSpeed's do now and then, without the plugin too.
        timeout_s: Time after which the processes are killed and the test fails.
    """
    folder.mkdir(parents=True)
    run = [] if section is None else ["-m", "rehearsal_plugin.run", "--strict", "--rehearsal-config", str(section)]
    given = {
        "PYTHONPATH": os.pathsep.join([str(WITNESS), str(ROOT)]),
        "CLIENT_WITNESS": str(folder),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        **(environment or {}),
    }
    line = [sys.executable, *run, *map(str, command)]
    status, printed = run_command(line, folder, os.environ | given, timeout_s)
    aborted_at_exit = ABORT in printed and all((folder / f"rank{rank}.pt").exists() for rank in range(ranks))
    assert status == 0 or not ranks or (may_abort and aborted_at_exit), printed
    notes = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
    return Run(notes, status, printed)
