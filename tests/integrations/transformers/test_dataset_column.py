"""A column of the dataset that goes past the collator: domains from an unchanged script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import DataCollatorWithFlattening, Trainer

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.errors import BatchError
from tests.helpers.trainer_jobs import Rows, model, row, trainer

SECTION: dict[str, Any] = {"buffer": {"capacity": 60, "partition_by": "domain"}, "representatives": 2}
FIELDS = {"input_ids", "attention_mask", "position_ids", "labels"}


def stack(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator that knows its fields, and drops all others."""
    return {name: torch.stack([example[name] for example in examples]) for name in FIELDS}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ({**row(number), "domain": number % 3} for number in range(400))


def run(folder: Path, section: dict[str, Any] = SECTION, **keys: Any) -> tuple[Trainer, dict[str, float], set[str]]:
    callback = RehearsalCallback(section)
    collator = keys.pop("collator", stack)
    job, _ = trainer(folder, callbacks=[callback], **keys)
    job.data_collator = collator
    job.eval_dataset = Rows(20, 10_000, domain=True)
    given: set[str] = set()
    assert job.model is not None
    job.model.register_forward_pre_hook(lambda _, __, fields: given.update(fields), with_kwargs=True)
    job.train()
    assert callback.rehearsal is not None
    metrics = callback.rehearsal.metrics()
    callback.close()
    return job, metrics, given


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"remove_unused_columns": False},
        {"dataloader_num_workers": 2},
        {"data": Stream()},
        {"eval_strategy": "steps", "eval_steps": 4},
    ],
    ids=["", "all columns kept", "workers", "stream", "evaluation"],
)
def test_rows_are_counted_by_a_column_that_the_collator_drops(keys: dict[str, Any], tmp_path: Path) -> None:
    if keys.get("remove_unused_columns") is False:
        keys = {**keys, "collator": lambda examples: {**stack(examples), "domain": torch.tensor([0] * len(examples))}}
        section = {**SECTION, "hidden": ["domain"]}
    else:
        section = SECTION
    _, metrics, given = run(tmp_path, section, **{"data": Rows(domain=True), **keys})
    assert sum(metrics.get(f"rows_stored/{key}", 0) for key in range(3)) == metrics["rows_stored"] == 32
    assert metrics["rows_replayed"] > 0
    assert "domain" not in given
    if "collator" not in keys:
        assert all(metrics[f"rows_stored/{key}"] > 5 for key in range(3))


def test_evaluation_after_training_sees_no_column(tmp_path: Path) -> None:
    job, _, given = run(tmp_path, data=Rows(domain=True))
    job.evaluate()
    job.predict(job.eval_dataset)  # type: ignore[arg-type]
    assert "domain" not in given
    job.train()  # and the column is still carried by a second call


def test_documents_of_a_flat_row_have_their_domains(tmp_path: Path) -> None:
    flatten: Any = DataCollatorWithFlattening

    class Texts(Rows):
        def __getitem__(self, index: int) -> Any:
            ids = row(index)["input_ids"][: 4 + index % 8].tolist()
            return {"input_ids": ids, "labels": ids, "domain": index % 2}

    _, metrics, given = run(tmp_path, data=Texts(), collator=flatten())
    assert {key for key in range(3) if metrics.get(f"rows_stored/{key}")} == {0, 1}
    assert metrics["rows_replayed"] > 0
    assert "domain" not in given


def test_a_column_of_words_is_refused_with_the_cure(tmp_path: Path) -> None:
    class Named(Rows):
        def __getitem__(self, index: int) -> Any:
            return {**row(index), "domain": "law"}

    with pytest.raises(BatchError, match=r"column 'domain', which holds 'law'.*class_encode_column"):
        run(tmp_path, data=Named())


def test_a_column_that_the_model_takes_stays_where_it_is(tmp_path: Path) -> None:
    section = {"buffer": {"capacity": 60, "partition_by": "kind"}, "representatives": 2}

    class Takes(type(model())):  # type: ignore[misc]
        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, labels: Any, kind: Any = None) -> Any:
            assert kind is not None
            return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels)

    class Kinds(Rows):
        def __getitem__(self, index: int) -> Any:
            return {**row(index), "kind": torch.tensor(index % 2)}

    network = model()
    network.__class__ = Takes
    callback = RehearsalCallback(section)
    job, _ = trainer(tmp_path, callbacks=[callback], data=Kinds(), network=network)
    job.train()
    callback.close()
