"""Trainers whose collators make several rows of an example: refused, or replayed whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from rehearsal_plugin import LocalTransport, Rehearsal, RehearsalCallback
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.integrations.transformers.trainer import augment_batch
from tests.helpers.trainer_jobs import BatchRecorder, Rows, model, number_of

SECTION: dict[str, Any] = {"buffer": {"capacity": 50}, "representatives": 2}


def pairs(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Chosen rows, then rejected ones: of each example twice the same row."""
    rows = [*examples, *examples]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def train(folder: Path, collator: Any = pairs, **keys: Any) -> list[list[int]]:
    """Numbers of the rows of each micro-batch that the model saw."""
    network = model()
    recorder = BatchRecorder(network)
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True
    )
    callbacks = [RehearsalCallback({**SECTION, **keys}), recorder]
    Trainer(network, arguments, data_collator=collator, train_dataset=Rows(64), callbacks=callbacks).train()
    return [[number_of(ids) for ids in batch["input_ids"]] for batch in recorder.batches]


def test_batches_of_several_rows_an_example_are_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=r"8 rows of 4 examples .* set rehearsal\.rows_per_sample to 2"):
        train(tmp_path)


@pytest.mark.parametrize(("examples", "found", "rows"), [(4, 4, 6), (8, 4, 8)], ids=["few examples", "size found"])
def test_pairs_are_found_whatever_the_batch_has_of_examples(examples: int, found: int, rows: int) -> None:
    trainer = SimpleNamespace(
        args=SimpleNamespace(train_batch_size=examples, remove_unused_columns=True), _train_batch_size=found
    )
    with (
        Rehearsal(SECTION, LocalTransport()) as rehearsal,
        pytest.raises(BatchError, match=rf"{rows} rows of {found} examples .* set rehearsal\.rows_per_sample to 2"),
    ):
        augment_batch(trainer, rehearsal, {"input_ids": torch.zeros(rows, 3)})


def test_pairs_are_replayed_whole(tmp_path: Path) -> None:
    seen = train(tmp_path, rows_per_sample=2)
    assert [len(batch) for batch in seen[-3:]] == [12, 12, 12]
    assert all(batch[: len(batch) // 2] == batch[len(batch) // 2 :] for batch in seen)


def test_rows_that_stand_alone_are_replayed_if_the_section_says_so(tmp_path: Path) -> None:
    assert [len(batch) for batch in train(tmp_path, rows_per_sample=1)[-3:]] == [10, 10, 10]
