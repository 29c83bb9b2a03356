"""Trainers whose collators make several rows of an example: refused, or replayed whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments, default_data_collator

from rehearsal_plugin import LocalTransport, Rehearsal, RehearsalCallback
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.integrations.transformers.trainer import augment_batch
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import BatchRecorder, Row, Rows, model, number_of

SECTION: dict[str, Any] = {"buffer": {"capacity": 50}, "representatives": 2}


def pairs(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Chosen rows, then rejected ones: of each example twice the same row."""
    rows = [*examples, *examples]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Stream(IterableDataset[Row]):
    """The rows of a data set whose length nobody knows."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        return (self._rows[index] for index in range(len(self._rows)))


class OwnLoader(Trainer):
    """Trainer whose batches are twice as large as its arguments say."""

    def get_train_dataloader(self) -> DataLoader[Row]:
        assert isinstance(self.train_dataset, Rows)
        return DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)


def train(
    folder: Path,
    collator: Any = pairs,
    *,
    data: Any = None,
    kind: type[Trainer] = Trainer,
    arguments: dict[str, Any] | None = None,
    **keys: Any,
) -> list[list[int]]:
    """Numbers of the rows of each micro-batch that the model saw."""
    network = model()
    recorder = BatchRecorder(network)
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, **(arguments or {})}
    job = kind(
        network,
        TrainingArguments(str(folder), report_to=[], save_strategy="no", use_cpu=True, **settings),
        data_collator=collator,
        train_dataset=data or Rows(64),
        callbacks=[RehearsalCallback({**SECTION, **keys}), recorder],
    )
    job.train()
    return [[number_of(ids) for ids in batch["input_ids"]] for batch in recorder.batches]


def refused(rows: int, examples: int) -> Any:
    return pytest.raises(BatchError, match=rf"{rows} rows of {examples} examples, .* rehearsal\.rows_per_sample to 2")


def test_batches_of_several_rows_an_example_are_refused_with_the_cure(tmp_path: Path) -> None:
    with refused(8, 4):
        train(tmp_path)


@pytest.mark.parametrize("examples", [1, 2, 3])
@pytest.mark.parametrize("made", [Rows, lambda count: Stream(Rows(count))], ids=["rows", "stream"])
def test_pairs_are_found_in_a_first_batch_of_few_examples(tmp_path: Path, examples: int, made: Any) -> None:
    with refused(2 * examples, examples):
        train(tmp_path, data=made(examples))


def test_pairs_are_found_by_the_workers_of_a_loader(tmp_path: Path) -> None:
    with refused(4, 2):
        train(tmp_path, data=Rows(2), arguments={"dataloader_num_workers": 1})


def test_pairs_are_found_where_ranks_split_a_batch(tmp_path: Path) -> None:
    run_ranks(train_with_split_batches, 2, tmp_path)


def train_with_split_batches(folder: Path) -> None:
    with refused(4, 2):
        train(folder, arguments={"accelerator_config": {"split_batches": True}})


def test_pairs_are_found_in_a_loader_of_the_trainer_itself(tmp_path: Path) -> None:
    with refused(16, 8):
        train(tmp_path, kind=OwnLoader)


@pytest.mark.parametrize(
    ("examples", "searched", "rows"), [(4, 4, 6), (8, 4, 8)], ids=["few examples", "size searched"]
)
def test_without_a_data_loader_the_batch_size_tells(examples: int, searched: int, rows: int) -> None:
    trainer = SimpleNamespace(
        args=SimpleNamespace(train_batch_size=examples, remove_unused_columns=True), _train_batch_size=searched
    )
    with Rehearsal(SECTION, LocalTransport()) as rehearsal, refused(rows, searched):
        augment_batch(trainer, rehearsal, {"input_ids": torch.zeros(rows, 3)}, counted=False)


def test_a_loader_of_larger_batches_than_the_arguments_say_is_no_sign_of_pairs(tmp_path: Path) -> None:
    sizes = [len(batch) for batch in train(tmp_path, default_data_collator, kind=OwnLoader)]
    assert sizes == [8, 8, 8, 10, 10, 10, 10, 10]


def test_a_first_batch_of_few_rows_is_no_sign_of_pairs(tmp_path: Path) -> None:
    assert len(train(tmp_path, default_data_collator, data=Rows(2))[0]) == 2


def test_pairs_are_replayed_whole(tmp_path: Path) -> None:
    seen = train(tmp_path, rows_per_sample=2)
    assert [len(batch) for batch in seen[-3:]] == [12, 12, 12]
    assert all(batch[: len(batch) // 2] == batch[len(batch) // 2 :] for batch in seen)


def test_rows_that_stand_alone_are_replayed_if_the_section_says_so(tmp_path: Path) -> None:
    assert [len(batch) for batch in train(tmp_path, rows_per_sample=1)[-3:]] == [10, 10, 10]
