"""Batches, shares, partitions, ranks, queries and steps of no rows: each is a step like any other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin import Rehearsal
from tests.helpers.ranks import run_ranks

CLASSES, WIDTH = 3, 4

BUFFER: dict[str, Any] = {"capacity": 20}
BY_LABEL: dict[str, Any] = {**BUFFER, "partition_by": "y"}
PADDED: dict[str, Any] = {"padding": {"length": 12, "values": {"tokens": 0, "mask": 0}}}
NEAREST: dict[str, Any] = {"sampling": {"weights": "retrieved"}, "retrieval": {"embedding": "x", "exact_below": 4}}

SECTIONS: Mapping[str, dict[str, Any]] = {
    **{name: {"strategy": {"name": name}} for name in ("er", "er-ace", "der", "der++")},
    "topk": {"strategy": {"name": "topk", "k": 2}},
    "x-der": {"buffer": BY_LABEL, "strategy": {"name": "x-der"}},
    "partition weights": {"buffer": BY_LABEL, "strategy": {"name": "er", "partition_weights": {"0": 2, "9": 1}}},
    **{name: {"buffer": {**BUFFER, "policy": name}} for name in ("reservoir", "fifo", "random_replace")},
    "policy balanced": {"buffer": {**BY_LABEL, "policy": "balanced"}},
    "herding": {"buffer": {**BY_LABEL, "policy": "herding", "score_by": "x"}},
    "policy score": {"buffer": {**BUFFER, "policy": "score", "score_by": "loss"}},
    "weights score": {"buffer": {**BUFFER, "score_by": "weight"}, "sampling": {"weights": "score"}},
    "weights balanced": {"buffer": BY_LABEL, "sampling": {"weights": "balanced"}},
    "weights by partition": {"buffer": BY_LABEL, "sampling": {"weights": {"0": 1, "9": 3}}},
    **{
        f"nearest {index}": {**NEAREST, "retrieval": {**NEAREST["retrieval"], "index": index}}
        for index in ("flat", "ivf", "hnsw")
    },
    "nearest by cosine": {**NEAREST, "retrieval": {**NEAREST["retrieval"], "metric": "cosine"}},
    "padding": PADDED,
    "tokens": {**PADDED, "ratio_in": "tokens"},
    "deduplicate": {"buffer": {**BUFFER, "deduplicate": True}},
    "candidates": {"candidates": 2},
    "non-finite": {"non_finite": "skip"},
    "losses": {"buffer": BY_LABEL, "losses_every": 1, "guard": {"bound": 2.0, "window": 2, "action": "stop"}},
    "local": {"sampling": {"scope": "local"}},
}

STATEFUL = {"der", "der++", "topk", "x-der", "policy score"}

PHASES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "empty batches between others": ((4,), (0,), (0,), (3,), (0,), (5,)),
    "empty micro-batches beside others": ((3, 0, 2), (0, 0), (0, 4)),
    "nothing but empty batches": ((0,),),
    "empty ones first": ((0,), (0,), (0,), (0,), (0,), (4,)),
    "single rows": ((1,), (1, 1)),
    "steps without a batch": ((4,), (), (), (2,), ()),
}
"""Rows of the micro-batches of each step, over and over."""

STEPS = 12


def batch(rows: int, section: Mapping[str, Any]) -> dict[str, Tensor]:
    if "padding" in section:
        lengths = torch.randint(1, 13, (rows, 1))
        mask = (torch.arange(int(lengths.max()) if rows else 1) < lengths).long()
        return {"tokens": torch.randint(1, 9, mask.shape) * mask, "mask": mask}
    x = torch.randn(rows, WIDTH)
    return {"x": x, "y": torch.randint(0, CLASSES, (rows,)), "weight": torch.rand(rows)}


def run(name: str, phases: tuple[tuple[int, ...], ...], amount: dict[str, Any]) -> dict[str, float]:
    """A job of `STEPS` steps; its metrics."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    section = {"buffer": BUFFER, **SECTIONS[name]}
    model = torch.nn.Linear(WIDTH, CLASSES)
    with Rehearsal({**section, **amount}) as rehearsal:
        for sizes in itertools.islice(itertools.cycle(phases), STEPS):
            for rows in sizes:
                seen = rehearsal.augment(batch(rows, section))
                if "padding" not in section:
                    loss = rehearsal.loss(torch.nn.functional.cross_entropy, model(seen["x"]), seen["y"])
                    assert loss.ndim == 0
                    assert loss.requires_grad
            rehearsal.step()
        rehearsal.drain()
        return rehearsal.metrics()


def offered(name: str, phases: tuple[tuple[int, ...], ...]) -> int:
    most = SECTIONS[name].get("candidates", 1 << 30)
    return sum(min(rows, most) for sizes in itertools.islice(itertools.cycle(phases), STEPS) for rows in sizes)


@pytest.mark.parametrize("amount", [{"ratio": 0.3}, {"ratio": 0.3, "mode": "replace"}, {"ratio": 0.02}], ids=str)
@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize("name", SECTIONS)
def test_no_rows_are_a_step_like_any_other(name: str, phases: str, amount: dict[str, Any]) -> None:
    if "retrieval" in SECTIONS[name] and not find_spec("faiss"):
        pytest.skip("needs faiss")
    metrics = run(name, PHASES[phases], amount)
    unseen = metrics["rows_displaced"] if name in STATEFUL else 0  # they have no outputs that could be stored
    assert metrics["rows_offered"] + metrics["rows_duplicate"] == offered(name, PHASES[phases]) - unseen
    assert metrics["steps"] >= STEPS - 1


def run_some(names: list[str]) -> list[dict[str, float]]:
    """Jobs in which the second rank never has a row."""
    empty = dist.get_rank() == 1
    phases = {name: ((0,),) if empty else PHASES[name] for name in PHASES}
    return [
        run(name, phases[phase], {"ratio": 0.3})
        for name in names
        for phase in ("empty batches between others", "steps without a batch")
    ]


def test_a_rank_without_rows_is_a_rank_like_any_other() -> None:
    names = ["der", "weights balanced", "weights by partition", "tokens", "losses"]
    ranks = run_ranks(run_some, 2, names + (["nearest flat"] if find_spec("faiss") else []))
    for first, second in zip(*ranks, strict=True):
        assert first["rows_offered"] > 0 == second["rows_offered"]
