"""How outputs and targets of a micro-batch fall apart into new rows and those of each draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin import RowLayout
from rehearsal_plugin.config import StrategyConfig
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.runtime.micro_batch import MicroBatch, no_criterion
from rehearsal_plugin.runtime.representatives import Share
from rehearsal_plugin.strategies import Part, make_strategy

LAYOUT = RowLayout.infer({"x": torch.zeros(1)}).with_state({"old": torch.zeros(1)})
ER = make_strategy(StrategyConfig())


def share(sizes: list[int]) -> Share:
    """Replayed rows whose state is their number."""
    total = sum(sizes)
    rows = torch.zeros((total, LAYOUT.row_bytes), dtype=torch.uint8)
    LAYOUT.pack([torch.zeros(total), torch.arange(total, dtype=torch.float32)], rows)
    return Share(rows, sizes, torch.arange(total), LAYOUT)


def micro_batch(new: int = 3, sizes: list[int] | None = None, keys: list[int] | None = None) -> MicroBatch:
    of_rows = None if keys is None else np.array(keys, dtype=np.int64)
    return MicroBatch([], new, None if sizes is None else share(sizes), len(sizes or [0]), of_rows)


def parts(batch: MicroBatch, outputs: Any, *targets: Tensor) -> list[Part]:
    return batch.parts(ER, outputs, targets, no_criterion)


def test_new_rows_come_first_then_those_of_each_draw() -> None:
    found = parts(micro_batch(3, [2, 1]), {"logits": torch.arange(6.0)}, torch.arange(6))
    assert [part.outputs["logits"].tolist() for part in found] == [[0, 1, 2], [3, 4], [5]]
    assert [part.targets[0].tolist() for part in found] == [[0, 1, 2], [3, 4], [5]]
    assert [part.size for part in found] == [3, 2, 1]


def test_replayed_rows_have_the_state_that_was_stored_with_them() -> None:
    new, first, second = parts(micro_batch(3, [2, 1]), torch.zeros(6))
    assert new.state == {}
    assert first.state["old"].tolist() == [0.0, 1.0]
    assert second.state["old"].tolist() == [2.0]


def test_without_replayed_rows_their_parts_are_empty() -> None:
    _, replayed = parts(micro_batch(3), torch.zeros(3, 2))
    assert (replayed.size, replayed.outputs.shape) == (0, (0, 2))


def test_leaves_without_the_batch_dimension_belong_to_every_part() -> None:
    found = parts(micro_batch(3, [2]), {"logits": torch.zeros(5), "loss": torch.tensor(7.0), "kind": "a"})
    assert [(float(part.outputs["loss"]), part.outputs["kind"]) for part in found] == [(7.0, "a")] * 2


@pytest.mark.parametrize("what", ["the model's output", "target"])
def test_tensors_of_other_rows_are_refused_by_name(what: str) -> None:
    outputs, target = (torch.zeros(4), torch.zeros(5)) if what != "target" else (torch.zeros(5), torch.zeros(4))
    with pytest.raises(BatchError, match=rf"{what} '.*' has 4 rows and the micro-batch has 5"):
        parts(micro_batch(3, [2]), {"logits": outputs}, target)


def test_keys_fall_apart_as_rows_do() -> None:
    keys = micro_batch(3, [2, 1], [5, 6, 7, 8, 9, 4]).keys_by_part()
    assert [None if part is None else part.tolist() for part in keys] == [[5, 6, 7], [8, 9], [4]]


def test_without_partitions_there_are_no_keys() -> None:
    assert micro_batch(3, [2, 1]).keys_by_part() == [None, None, None]


def test_a_loss_that_the_model_computed_cannot_be_computed_again() -> None:
    with pytest.raises(ConfigError, match=r"call rehearsal\.loss"):
        no_criterion(torch.zeros(3))
