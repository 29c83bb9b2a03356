"""Tensors that hold their numbers in another way, and a default device: refused in our words, or without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.masked import masked_tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import BatchError
from tests.helpers.samples import new_batch, same

SECTION: dict[str, Any] = {"buffer": {"capacity": 40}, "representatives": 2}


class Spread(Tensor):
    """As torch's DTensor, without a group of ranks."""

    def to_local(self) -> Tensor:
        return self.as_subclass(Tensor)


class Tagged(Tensor):
    """A tensor of a library that adds a name, and nothing else."""


KINDS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(8, 3), 0.1, 0, torch.quint8), "is quantised"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(3)] * 8), "is a nested tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.zeros(n + 1) for n in range(8)], layout=torch.jagged),
        "is a nested tensor",
    ),
    "spread": (lambda: torch.zeros(8, 3).as_subclass(Spread), "is a DTensor"),
    "masked": (lambda: masked_tensor(torch.zeros(8, 3), torch.ones(8, 3, dtype=torch.bool)), "is a MaskedTensor"),
    "sparse": (lambda: torch.eye(8, 3).to_sparse(), "is sparse"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_they_are_refused_by_name_in_the_first_batch_and_later(kind: str, first: bool) -> None:
    make, words = KINDS[kind]
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        if not first:
            rehearsal.update({"id": torch.arange(8), "x": torch.zeros(8, 3)})
        with pytest.raises(BatchError, match=f"batch field 'x' {words}"):
            rehearsal.update({"id": torch.arange(8), "x": make()})


def test_tensors_without_numbers_are_refused_by_name() -> None:
    with (
        Rehearsal(SECTION, LocalTransport()) as rehearsal,
        pytest.raises(BatchError, match="'x' is a Tensor on 'meta' without numbers"),
    ):
        rehearsal.update({"id": torch.arange(8), "x": torch.zeros(8, 3, device="meta")})


def test_a_subclass_that_is_an_ordinary_tensor_is_taken() -> None:
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        for _ in range(4):
            batch = rehearsal.update({"x": torch.ones(8, 3).as_subclass(Tagged)})
        assert len(batch["x"]) == 10


@pytest.fixture
def default_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "balanced": {"buffer": {"capacity": 40, "partition_by": "label", "policy": "balanced"}},
    "candidates": {"candidates": 3, "non_finite": "skip"},
    "replace": {"mode": "replace", "buffer": {"capacity": 40, "deduplicate": True}},
}


@pytest.mark.parametrize("name", JOBS)
def test_a_default_device_changes_nothing(name: str, default_device: None, tmp_path: Path) -> None:
    section = {**SECTION, **JOBS[name]}
    batches = [new_batch(0, step, 8) for step in range(10)]
    with Rehearsal(section, LocalTransport()) as rehearsal:
        expected = [rehearsal.update(batch) for batch in batches]
    torch.set_default_device("meta")  # whatever is made there has no numbers
    with Rehearsal(section, LocalTransport()) as rehearsal:
        replayed = [rehearsal.update(batch) for batch in batches[:6]]
        rehearsal.save(tmp_path)
    with Rehearsal(section, LocalTransport()) as rehearsal:
        rehearsal.load(tmp_path)
        replayed += [rehearsal.update(batch) for batch in batches[6:]]
    torch.set_default_device(None)
    assert all(same(a, b) for a, b in zip(expected, replayed, strict=True))
