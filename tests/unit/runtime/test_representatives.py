"""Rows that arrived together: shared out between micro-batches, in random order, with new state for their owners."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rehearsal_plugin import RowLayout
from rehearsal_plugin.distributed.draw import Plan
from rehearsal_plugin.distributed.in_flight import Arrival, Outgoing
from rehearsal_plugin.runtime.representatives import Representatives, Share
from tests.helpers.chance import SIGNIFICANCE, equally_likely

LAYOUT = RowLayout.infer({"id": torch.zeros(2, dtype=torch.int64)}).with_state({"old": torch.zeros(2)})


def arrival(draws: list[int]) -> Arrival:
    """Rows 0, 1, ... of the draws that are given."""
    rows = torch.zeros((len(draws), LAYOUT.row_bytes), dtype=torch.uint8)
    LAYOUT.pack([torch.arange(len(draws)), torch.zeros(len(draws))], rows)
    none = np.empty(0, dtype=np.int64)
    plan = Plan(none, none, np.array([0]), np.array([len(draws)]), np.array(draws, dtype=np.int64), len(draws))
    return Arrival(rows, Outgoing(rows[:0], LAYOUT, plan, none, none))


def shuffled(draws: list[int], seed: int = 0) -> Representatives:
    number = max(draws, default=0) + 1
    return Representatives.shuffled(arrival(draws), number, lambda: np.random.default_rng(seed))


def ids_of(share: Share) -> list[int]:
    return list(LAYOUT.views(share.rows)["id"].tolist())


def test_micro_batches_take_their_shares_until_none_is_left() -> None:
    representatives = shuffled([0] * 5)
    shares = [representatives.take(2) for _ in range(4)]
    assert [len(share.rows) for share in shares] == [2, 2, 1, 0]
    assert sorted(id for share in shares for id in ids_of(share)) == [0, 1, 2, 3, 4]


def test_each_share_has_rows_of_every_draw() -> None:
    representatives = shuffled([0, 1, 0, 1])
    for _ in range(2):
        share = representatives.take(1)
        assert share.sizes == [1, 1]
        assert [id % 2 for id in ids_of(share)] == [0, 1], "draw by draw"


def test_it_says_how_many_rows_there_are() -> None:
    representatives = shuffled([0, 0, 0, 1, 1])
    assert (representatives.left, representatives.most(3)) == (2, 5)
    representatives.take(1)
    assert (representatives.left, representatives.most(3)) == (1, 3)


@pytest.mark.parametrize("draws", [[0] * 5, [0, 1] * 3])
@pytest.mark.parametrize("share", [1, 2, 5])
def test_rows_that_are_put_back_come_again(draws: list[int], share: int) -> None:
    representatives = shuffled(draws)
    representatives.take(1)
    before = representatives.left
    taken = representatives.take(share)
    representatives.put_back(taken.index, taken.sizes)
    assert representatives.left == before
    assert ids_of(representatives.take(share)) == ids_of(taken)


def test_rows_come_in_random_order() -> None:
    orders = [tuple(ids_of(shuffled([0, 0, 0], seed).take(2))) for seed in range(1200)]
    assert equally_likely(orders, 6) > SIGNIFICANCE


def test_the_only_micro_batch_gets_the_rows_where_they_lie() -> None:
    representatives = shuffled([0] * 4)
    assert ids_of(representatives.take(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("updated", [False, True])
def test_a_refresh_says_whether_there_is_new_state(updated: bool) -> None:
    representatives = shuffled([0] * 3)
    share = representatives.take(3)
    if updated:
        representatives.update(share.index[:1], {"old": torch.tensor([5.0])})
    refresh = representatives.refresh()
    assert refresh.packed[:, -1].tolist() == [int(updated)] * 3
    assert LAYOUT.state_of(refresh.packed)["old"].tolist() == [5.0 if updated else 0.0, 0.0, 0.0]


def test_it_goes_on_from_its_state() -> None:
    representatives = shuffled([0, 1] * 3)
    representatives.take(1)
    loaded = Representatives.load(representatives.state_dict(), LAYOUT, torch.device("cpu"))
    assert ids_of(loaded.take(2)) == ids_of(representatives.take(2))
