"""The words of the first header: one run for all ranks, and sections that differ are told by their keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.distributed.opening import Opening, SectionCheck
from rehearsal_plugin.errors import ExchangeError


def opening(run: int = 1, **keys: Any) -> Opening:
    return Opening(RehearsalConfig.load(keys), run)


def agree(*ranks: Opening, rank: int = 0) -> int:
    return ranks[rank].agree(np.stack([one.words for one in ranks]), rank)


def test_all_ranks_take_the_run_of_rank_0() -> None:
    ranks = [opening(run) for run in (7, 8, 9)]
    assert {agree(*ranks, rank=rank) for rank in range(3)} == {7}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"ratio": 0.3}, "ratio"),
        ({"buffer": {"policy": "fifo"}}, "buffer.policy"),
        ({"strategy": {"name": "der"}}, "strategy.name"),
        ({"seed": 3}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rank_with_another_section_is_told_by_the_key(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ExchangeError, match=rf"rank 0 and rank 2 have different .* differ in .*{named}.*same config"):
        agree(opening(), opening(), opening(**keys))


def test_another_capacity_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert agree(opening(), opening(), opening(buffer={"capacity": 5})) == 1
    (message,) = caplog.messages
    assert "rank 0 and rank 2" in message
    assert "buffer.capacity" in message


def test_both_values_that_differ_are_named() -> None:
    with pytest.raises(ExchangeError) as caught:
        agree(opening(ratio=0.1, seed=1), opening(ratio=0.2, seed=2))
    assert "ratio" in str(caught.value)
    assert "seed" in str(caught.value)


def test_paths_may_differ() -> None:
    first, second = (opening(buffer={"storage": "mmap", "path": f"/scratch/{rank}"}) for rank in range(2))
    assert agree(first, second) == 1


class Gone:
    """Two ranks, of which one is gone."""

    rank, size = 0, 2

    def all_gather(self, send: Tensor) -> Any:
        return self

    def done(self, within_s: float = 0.0) -> bool:
        raise RuntimeError("connection closed by peer")


def test_a_rank_that_is_gone_is_no_matter_where_ranks_stand_alone(caplog: pytest.LogCaptureFixture) -> None:
    check = SectionCheck(RehearsalConfig.load({}), Gone())  # type: ignore[arg-type]
    check.hear()
    check.hear()
    (message,) = caplog.messages
    assert "were not compared: connection closed by peer" in message
