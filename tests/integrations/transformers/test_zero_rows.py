"""Micro-batches of no rows under a Trainer, as of a collator that drops what it cannot use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from rehearsal_plugin import RehearsalCallback
from tests.helpers.sparse_jobs import SparseModel, batches, criterion, section_of
from tests.unit.runtime.test_zero_rows import PHASES, SECTIONS, STATEFUL, offered

NAMES = [name for name in SECTIONS if "retrieval" not in SECTIONS[name] or find_spec("faiss")]
FED = [phase for phase in PHASES if phase != "steps without a batch"]


class Collator:
    """Gives the micro-batches of a phase in their order, whatever the examples."""

    def __init__(self, name: str, phase: str) -> None:
        self.batches = list(itertools.chain.from_iterable(batches(name, phase)))
        self.read = iter(self.batches)

    def __call__(self, _: Sequence[int]) -> dict[str, Tensor]:
        return next(self.read)


def train(folder: Path, name: str, phase: str, amount: dict[str, Any]) -> dict[str, float]:
    section = {**section_of(name, amount), "rows_per_sample": 1}
    callback, collator = RehearsalCallback(section), Collator(name, phase)
    job = Trainer(
        model=SparseModel(),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=1000,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=list(range(len(collator.batches))),
        data_collator=collator,
        callbacks=[callback],
        compute_loss_func=callback.loss(criterion),
    )
    job.train()
    assert callback.rehearsal is not None
    with callback.rehearsal as rehearsal:
        assert all(parameter.isfinite().all() for parameter in job.model.parameters())  # type: ignore[union-attr]
        metrics: dict[str, float] = rehearsal.metrics()
        return metrics


CASES = [(name, "empty micro-batches beside others", "append") for name in NAMES]
CASES += [("der", phase, mode) for phase in FED for mode in ("append", "replace")]


@pytest.mark.parametrize(("name", "phase", "mode"), CASES)
def test_no_rows_are_a_micro_batch_like_any_other(tmp_path: Path, name: str, phase: str, mode: str) -> None:
    torch.manual_seed(0)
    metrics = train(tmp_path, name, phase, {"ratio": 0.3, "mode": mode})
    unseen = metrics["rows_displaced"] if name in STATEFUL else 0
    assert metrics["rows_offered"] + metrics["rows_duplicate"] == offered(name, PHASES[phase]) - unseen
