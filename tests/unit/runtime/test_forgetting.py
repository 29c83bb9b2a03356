"""The mixture by need, and what is told of the forgetting of each partition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import PARTITIONS, PartitionWord
from rehearsal_plugin.runtime.forgetting import Forgetting, weights_by_need
from rehearsal_plugin.runtime.partition_losses import PartitionLosses, Tally
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

BY_NEED = {"sampling": {"weights": "forgetting"}, "buffer": {"partition_by": "domain"}}
BOTH: dict[str, Any] = {**BY_NEED, "ratio": {"budget": 0.02}}


def words(losses: dict[int, float], rows: int = 1024) -> IntArray:
    """What one rank tells of partitions with so many replayed rows each."""
    rank = PartitionLosses()
    rank.add({key: Tally.measured(loss * rows, rows, rows, 0) for key, loss in losses.items()})
    return np.array(rank.words).reshape(1, PARTITIONS, len(PartitionWord))


def heard(section: dict[str, Any], *losses: dict[int, float]) -> tuple[Forgetting, ReplayRatio]:
    config = RehearsalConfig.load(section)
    forgetting, ratio = Forgetting(config, 0), ReplayRatio(config)
    for one in losses:
        forgetting.hear(words(one), ratio)
    return forgetting, ratio


def test_the_example_of_the_weights() -> None:
    weights = weights_by_need({0: 0.0, 1: 0.02, 2: 0.06, 3: 0.01}, {3: 1.0})
    assert [weights[key] for key in "0123"] == pytest.approx([0.03, 0.26, 0.71, 0.004], abs=0.01)


def test_what_comes_anew_counts_the_less_the_more_of_it_comes() -> None:
    weights = weights_by_need({0: 0.1, 1: 0.1, 2: 0.1}, {0: 0.0, 1: 0.25, 2: 0.75})
    assert [weights[key] for key in "012"] == pytest.approx([0.5, 0.375, 0.125], abs=0.01)


def test_a_partition_of_which_no_loss_is_known_gets_a_mean_share_unless_it_comes_anew() -> None:
    weights = weights_by_need({0: 0.1, 1: 0.1}, {2: 1.0, 3: 0.0})
    assert weights["3"] == pytest.approx(0.25, abs=0.01)
    assert weights["2"] < 0.01


def test_partitions_that_have_not_risen_leave_the_weights_as_they_were() -> None:
    assert weights_by_need({0: 0.0, 1: -0.1}, {}) == {}
    assert weights_by_need({0: 0.1}, {0: 1.0}) == {}
    forgetting, _ = heard(BY_NEED, {0: 2.0, 1: 2.0}, {0: 2.0, 1: 2.2}, {0: 2.0, 1: 1.0})
    assert forgetting.weights is not None
    assert [forgetting.weights[key] for key in ("0", "1")] == pytest.approx([0.05, 0.95], abs=0.01)


def test_the_partition_that_is_learnt_now_is_hardly_replayed() -> None:
    forgetting, ratio = heard(BY_NEED, {0: 2.0, 1: 2.0, 2: 2.0})
    rank = PartitionLosses()
    rank.add({key: Tally.measured(2.2 * 1024, 1024, 1024, 8 * (key == 2)) for key in range(3)})
    forgetting.hear(np.array(rank.words).reshape(1, PARTITIONS, len(PartitionWord)), ratio)
    assert forgetting.weights is not None
    assert [forgetting.weights[key] for key in "012"] == pytest.approx([0.5, 0.5, 0.005], abs=0.01)


def test_no_partition_is_lost_sight_of() -> None:
    assert min(weights_by_need({key: float(key == 7) for key in range(500)}, {}).values()) > 0


def test_the_ratio_stays_as_given_without_a_budget() -> None:
    forgetting, ratio = heard(BY_NEED, {0: 2.0}, {0: 4.0})
    ratio.go_by(1)
    assert ratio.ratio == 0.05
    assert forgetting.metrics == {"forgetting/0": pytest.approx(1.0)}


def test_the_weights_stay_as_given_without_the_mixture() -> None:
    section = {"ratio": {"budget": 0.02}, "buffer": {"partition_by": "domain"}}
    forgetting, ratio = heard(section, {0: 2.0}, {0: 4.0})
    assert forgetting.weights is None
    ratio.go_by(1)
    assert forgetting.metrics["ratio"] == ratio.ratio


def test_headers_without_a_measurement_change_nothing() -> None:
    forgetting, ratio = heard(BOTH, {0: 2.0}, {0: 2.1})
    before = forgetting.state_dict()
    forgetting.hear(np.zeros((2, PARTITIONS, len(PartitionWord)), dtype=np.int64), ratio)
    assert forgetting.state_dict() == before


def test_a_queue_that_begins_anew_gets_the_ratio() -> None:
    forgetting, _ = heard(BOTH, {0: 2.0}, {0: 2.1}, {0: 2.1})
    anew = ReplayRatio(RehearsalConfig.load(BOTH))
    forgetting.steer(anew)
    anew.go_by(5)
    assert anew.ratio == forgetting.metrics["ratio"] > 0.1


def test_a_loaded_one_goes_on_alike() -> None:
    forgetting, ratio = heard(BOTH, {0: 2.0, 1: 3.0}, {0: 2.1, 1: 3.0})
    loaded, _ = heard(BOTH)
    loaded.load_state_dict(forgetting.state_dict())
    for one in (forgetting, loaded):
        one.hear(words({0: 2.2, 1: 3.3}), ratio)
    assert loaded.state_dict() == forgetting.state_dict()


def test_a_section_that_asks_for_less_takes_what_it_needs() -> None:
    forgetting, _ = heard(BOTH, {0: 2.0}, {0: 2.1})
    loaded, _ = heard(BY_NEED)
    loaded.load_state_dict(forgetting.state_dict())
    assert loaded.weights == forgetting.weights
    assert "ratio" not in loaded.metrics


def test_the_one_that_has_risen_gets_its_part_among_many() -> None:
    weights = weights_by_need({key: float(key == 7) for key in range(1000)}, {})
    assert weights["7"] / sum(weights.values()) == pytest.approx(0.9, abs=0.01)


def test_rows_of_other_partitions_do_not_move_the_ratio() -> None:
    """A budget is controlled by the rows of the partition that counts."""
    forgetting, ratio = heard(BOTH, {0: 2.0, 1: 2.0}, {0: 2.1, 1: 2.0})
    before = forgetting.metrics["ratio"]
    for _ in range(50):
        forgetting.hear(words({1: 2.0}, rows=64), ratio)
    assert forgetting.metrics["ratio"] == before
