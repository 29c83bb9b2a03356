"""Rows of documents with a mask of all pairs of positions, as LLaMA-Factory's `neat_packing` gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import DataCollatorForSeq2Seq, Trainer

from rehearsal_plugin import RehearsalCallback
from tests.integrations.transformers.test_documents import (
    SECTION,
    STEPS,
    Seen,
    arguments,
    llama,
    texts,
    tokenizer,
)

LENGTH, PAD = 40, 1


def packed_rows() -> list[dict[str, list[int]]]:
    """Documents put into rows of one length, with the number of its document at each position."""
    rows: list[dict[str, list[int]]] = []
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for text in texts(300):
        if len(row["input_ids"]) + len(text["input_ids"]) > LENGTH:
            rows.append(row)
            row = {"input_ids": [], "labels": [], "attention_mask": []}
        number = max(row["attention_mask"], default=0) + 1
        row["input_ids"] += text["input_ids"]
        row["labels"] += [-100, *text["labels"][1:]]  # else the last token of a document predicts the next one
        row["attention_mask"] += [number] * len(text["input_ids"])
    for row in rows:
        missing = LENGTH + 1 - len(row["input_ids"])
        for name, value in (("input_ids", PAD), ("labels", -100), ("attention_mask", 0)):
            row[name] += [value] * missing
    return rows


class PackedCollator(DataCollatorForSeq2Seq):
    """Makes the mask `[rows, 1, length, length]` of the numbers."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        batch = super().__call__(features, return_tensors)  # type: ignore[no-untyped-call]
        index: Tensor = batch["attention_mask"]
        alike = (index[:, :, None] == index[:, None, :]) & (index != 0)[:, None, :]
        batch["attention_mask"] = torch.where(alike.tril(), 0.0, torch.finfo(torch.float32).min)[:, None]
        batch["position_ids"] = positions_of(index)
        return batch


def positions_of(index: Tensor) -> Tensor:
    """Positions that begin anew with each document."""
    places = torch.arange(index.shape[1]).expand_as(index)
    begins = torch.cat((torch.ones_like(index[:, :1]), index[:, 1:] != index[:, :-1]), dim=1).bool()
    return places - torch.where(begins, places, 0).cummax(1).values


def alone(model: Any, batch: dict[str, Any]) -> float:
    """The mean loss of a batch's tokens when each document is given by itself."""
    total, tokens = 0.0, 0
    for row, positions, mask in zip(batch["input_ids"], batch["position_ids"], batch["attention_mask"], strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            if mask[0, start, start] == 0 and end - start > 1:
                one = row[start:end]
                total += float(model(input_ids=one[None], labels=one[None]).loss) * (len(one) - 1)
                tokens += len(one) - 1
    return total / tokens


class SeenRows(Seen):
    """As `Seen`, for packed rows."""

    def _note(self, model: Any, _: Any, inputs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        given = {name: leaf for name, leaf in inputs.items() if name != "num_items_in_batch"}
        self.batches.append(given)
        with torch.no_grad():
            self.losses.append((float(model(**given).loss), alone(model, inputs)))


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_is_that_of_the_documents_alone(attention: str, mode: str, tmp_path: Path) -> None:
    model, callback, rows = llama(attention), RehearsalCallback({**SECTION, "mode": mode}), packed_rows()
    seen = SeenRows(model)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows,
        data_collator=PackedCollator(tokenizer()),
        callbacks=[seen, callback],
    )
    trainer.train()
    assert callback.rehearsal is not None
    assert callback.rehearsal.buffer is not None
    assert callback.rehearsal.metrics()["rows_replayed"] > 8
    assert callback.rehearsal.buffer.layout.field("attention_mask").dtype == torch.int32
    callback.close()
    assert len(seen.losses) == STEPS
    for whole, one_by_one in seen.losses:
        assert whole == pytest.approx(one_by_one, abs=1e-6)
    known = {tuple(row["input_ids"]) for row in rows}
    for batch in seen.batches:
        assert batch["attention_mask"].shape == (len(batch["input_ids"]), 1, LENGTH + 1, LENGTH + 1)
        assert {tuple(ids.tolist()) for ids in batch["input_ids"]} <= known
