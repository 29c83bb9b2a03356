"""Batches of one rank that are unlike the others: refused, left out or kept, and nothing is lost on any rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.errors import BatchError
from tests.helpers.faults import SIZE, WANTED, connect, missing, section, variant_of
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, intact, new_batch

pytestmark = pytest.mark.fault

STEPS, BAD = 14, 6
Record = Callable[[str, object], None]


def another_shape(batch: Batch) -> Batch:
    return {**batch, "x": batch["x"][:, :2]}


def another_dtype(batch: Batch) -> Batch:
    return {**batch, "half": batch["half"].float()}


def not_finite(batch: Batch) -> Batch:
    x = batch["x"].clone()
    x[3, 1] = float("nan")
    return {**batch, "x": x}


def no_rows(batch: Batch) -> Batch:
    return {name: column[:0] for name, column in batch.items()}


def as_it_is(batch: Batch) -> Batch:
    return batch


BATCHES: dict[str, tuple[Callable[[Batch], Batch], dict[str, Any]]] = {
    "right": (as_it_is, {}),
    "shape": (another_shape, {}),
    "dtype": (another_dtype, {}),
    "refused": (not_finite, {"non_finite": "refuse"}),
    "skipped": (not_finite, {"non_finite": "skip"}),
    "kept": (not_finite, {"non_finite": "keep"}),
    "empty": (no_rows, {}),
    "ratio": (as_it_is, {"representatives": None, "ratio": 0.3}),
    "refused under a ratio": (not_finite, {"representatives": None, "ratio": 0.3, "non_finite": "refuse"}),
    "replaced": (as_it_is, {"mode": "replace"}),
    "refused where rows are replaced": (not_finite, {"mode": "replace", "non_finite": "refuse"}),
}


def feed() -> dict[str, Any]:
    """Rank 1 gives a batch that is unlike the others, and a proper one in its place if that is refused."""
    name, group = variant_of(list(BATCHES))
    spoil, keys = BATCHES[name]
    rank, refused = dist.get_rank(group), ""
    batches: list[Batch] = []
    with Rehearsal({k: v for k, v in section(**keys).items() if v is not None}, connect(group)) as rehearsal:
        for step in range(STEPS):
            batch = new_batch(rank, step, SIZE)
            try:
                batches.append(rehearsal.update(spoil(batch) if (rank, step) == (1, BAD) else batch))
            except BatchError as error:
                refused = str(error)
                batches.append(rehearsal.update(batch))
    offered = [row for step in range(STEPS) for row in new_batch(rank, step, SIZE)["id"].tolist()]
    return {
        "refused": refused,
        "ids": [batch["id"].tolist() for batch in batches],
        "broken": [row for batch in batches for row in broken(batch)],
        "lost": missing(rehearsal, offered),
        "metrics": rehearsal.metrics(),
    }


def broken(batch: Batch) -> list[int]:
    """The samples whose fields do not belong together."""
    return [int(row) for row in batch["id"] if not intact({k: v[batch["id"] == row][:1] for k, v in batch.items()})]


@functools.cache
def fed() -> dict[str, list[dict[str, Any]]]:
    ranks = run_ranks(feed, 2 * len(BATCHES), timeout_s=60)
    return {name: ranks[2 * number : 2 * number + 2] for number, name in enumerate(BATCHES)}


@pytest.mark.parametrize(
    ("name", "words", "proper"),
    [
        ("shape", "'x'", "right"),
        ("dtype", "'half'", "right"),
        ("refused", f"1 of {SIZE} candidates on rank 1 at step {BAD} hold NaN or infinity in ['x']", "right"),
        ("refused under a ratio", "on rank 1", "ratio"),
        ("refused where rows are replaced", "on rank 1", "replaced"),
    ],
)
def test_a_batch_that_is_refused_and_replaced_changes_nothing_on_any_rank(
    name: str, words: str, proper: str, record_property: Record
) -> None:
    lost = [row for outcome in fed()[name] for row in outcome["lost"]]
    record_property("rows_lost", len(lost))
    assert lost == []
    assert fed()[name][0]["refused"] == ""
    assert words in fed()[name][1]["refused"]
    for outcome, undisturbed in zip(fed()[name], fed()[proper], strict=True):
        assert outcome["ids"] == undisturbed["ids"], "bit for bit as if it had never come"
        assert outcome["broken"] == []
        assert outcome["metrics"]["rows_offered"] == undisturbed["metrics"]["rows_offered"]
        assert outcome["metrics"]["collectives"] == undisturbed["metrics"]["collectives"]


POISONED = int(new_batch(1, BAD, SIZE)["id"][3])


def test_a_row_of_nan_that_is_skipped_is_seen_once_and_never_stored(record_property: Record) -> None:
    record_property("rows_lost", sum(len(outcome["lost"]) for outcome in fed()["skipped"]) - 1)
    assert [outcome["lost"] for outcome in fed()["skipped"]] == [[], [POISONED]]
    assert [outcome["broken"] for outcome in fed()["skipped"]] == [[], [POISONED]]
    for outcome in fed()["skipped"]:
        assert [len(ids) for ids in outcome["ids"][2:]] == [SIZE + WANTED] * (STEPS - 2)


def test_a_row_of_nan_that_is_kept_travels_like_any_other(record_property: Record) -> None:
    record_property("rows_lost", sum(len(outcome["lost"]) for outcome in fed()["kept"]) - 1)
    assert [outcome["lost"] for outcome in fed()["kept"]] == [[], [POISONED]], "it is stored with its NaN"
    for outcome, undisturbed in zip(fed()["kept"], fed()["right"], strict=True):
        assert outcome["ids"] == undisturbed["ids"]
        assert set(outcome["broken"]) <= {POISONED}


def test_a_batch_without_rows_on_one_rank_is_a_step_like_any_other(record_property: Record) -> None:
    absent = new_batch(1, BAD, SIZE)["id"].tolist()
    lost = [row for outcome in fed()["empty"] for row in outcome["lost"] if row not in absent]
    record_property("rows_lost", len(lost))
    assert lost == []
    for rank, outcome in enumerate(fed()["empty"]):
        assert outcome["refused"] == ""
        assert outcome["broken"] == []
        new_rows = [0 if (rank, step) == (1, BAD) else SIZE for step in range(STEPS)]
        assert [len(ids) for ids in outcome["ids"]] == [
            n + (WANTED if step > 1 else 0) for step, n in enumerate(new_rows)
        ]
        assert not set(absent).intersection(row for ids in outcome["ids"] for row in ids)
