"""Mixtures: how much of what is replayed each partition is, and how that changes while a job runs."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.config import SamplingConfig
from rehearsal_plugin.core.apportionment import weighted_shares
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.draw import draw
from rehearsal_plugin.distributed.mixture import Mixture
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import ConfigError
from tests.helpers.chance import SIGNIFICANCE, equally_included
from tests.helpers.drawn_rows import DrawnRows, drawn_rows
from tests.helpers.fuzzing import PROPERTY
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, new_batch, samples

SIZE, WANTED = 10, 8
EXCHANGE = {"timeout_s": 20}


# --- shares ----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 100)), min_size=1, max_size=12), st.floats(0, 0.999))
def test_shares_add_up_and_stay_below_their_limits(parts: list[tuple[int, float]], part: float) -> None:
    limits, weights = np.array([n for n, _ in parts]), np.array([w for _, w in parts])
    total = int(part * limits.sum())
    whole, fractions = weighted_shares(limits, weights, total)
    assert (whole >= 0).all()
    assert (whole + (fractions > 0) <= limits).all()
    assert ((fractions >= 0) & (fractions < 1)).all()
    assert whole.sum() + fractions.sum() == pytest.approx(total, abs=1e-6)
    exact = whole + fractions
    full = exact >= limits - 1e-9
    per_weight = exact[~full] / weights[~full]
    assert np.allclose(per_weight, per_weight[0] if len(per_weight) else 0)
    if full.any() and len(per_weight):
        assert (exact[full] / weights[full] <= per_weight[0] + 1e-6).all(), "who is full would have had more"


def drawn(table: IntArray, requests: list[int], weights: Any, step: int = 0) -> DrawnRows:
    asked, shares = np.array(requests), np.array(weights)
    return drawn_rows(lambda rank, numbers: draw(table, asked, rank, numbers, 1, shares), len(table), step)


def found_in(counts: list[list[int]], weights: list[float], wanted: int, draws: int = 4000) -> Counter[int]:
    """Rows of each partition in all draws of one rank, after a check of each draw."""
    table, found = np.array(counts), Counter[int]()
    for step in range(draws):
        one = drawn(table, [wanted] + [0] * (len(counts) - 1), weights, step)
        rows = set(zip(one.owner.tolist(), one.partition.tolist(), one.index.tolist(), strict=True))
        assert len(rows) == len(one.owner) == min(wanted, sum(sum(c) for c in zip(*counts, strict=True)))
        assert (one.index < table[one.owner, one.partition]).all()
        found.update(one.partition.tolist())
    return found


def test_partitions_get_their_shares_exactly_over_time() -> None:
    found = found_in([[100, 200, 50], [100, 0, 50]], [3.0, 1.0, 0.7], 8)
    for partition, weight in enumerate((3.0, 1.0, 0.7)):
        assert found[partition] / (4000 * 8) == pytest.approx(weight / 4.7, rel=0.02)


def test_no_share_of_a_single_draw_is_a_whole_row_off() -> None:
    table, weights = np.array([[100, 200, 50]]), np.array([3.0, 1.0, 0.7])
    for step in range(300):
        one = drawn(table, [8], weights, step)
        counts = np.bincount(one.partition, minlength=3)
        assert (np.abs(counts - 8 * weights / weights.sum()) < 1).all()


def test_every_row_of_a_partition_has_the_same_chance_on_all_ranks() -> None:
    table, weights, found = np.array([[3, 4], [5, 2]]), np.array([2.0, 1.0]), Counter[tuple[int, int]]()
    for step in range(6000):
        one = drawn(table, [3, 0], weights, step)
        first = one.partition == 0
        found.update(zip(one.owner[first].tolist(), one.index[first].tolist(), strict=True))
    counts = [found[owner, index] for owner in (0, 1) for index in range((3, 5)[owner])]
    assert equally_included(counts, 6000, 2) > SIGNIFICANCE


def test_what_a_partition_has_too_few_rows_for_goes_to_the_others() -> None:
    found = found_in([[1, 100, 100]], [8.0, 2.0, 1.0], 10, 900)
    assert found[0] == 900
    assert found[1] / found[2] == pytest.approx(2, rel=0.05)


def test_partitions_of_weight_zero_give_none() -> None:
    assert set(found_in([[9, 9, 9]], [1.0, 0.0, 2.0], 4, 50)) == {0, 2}
    one = drawn(np.array([[9, 9]]), [4], [0.0, 0.0])
    assert len(one.owner) == 0


# --- in a job --------------------------------------------------------------------------------------------------------


def section(weights: Any, **keys: Any) -> dict[str, Any]:
    return {
        "buffer": {"capacity": 600, "partition_by": "label"},
        "representatives": WANTED,
        "sampling": {"weights": weights, **keys.pop("sampling", {})},
        "exchange": EXCHANGE,
        **keys,
    }


def batch_of(rank: int, step: int) -> Batch:
    """Nine rows of partition 0 for one of partition 1."""
    own = new_batch(rank, step, SIZE)
    return samples(own["id"], (own["id"] % SIZE == 0).long())


def labels(batch: Batch) -> list[int]:
    found: list[int] = batch["label"][SIZE:].tolist()
    return found


def mixed_on_ranks() -> dict[str, Any]:
    """Weights that change on every rank at another step."""
    rank = dist.get_rank()
    with Rehearsal(section({"0": 1, "1": 3})) as rehearsal:
        seen = []
        for step in range(120):
            if step == 60 + 7 * rank:
                rehearsal.reweigh({0: 1, 1: 0})
            seen.append(labels(rehearsal.update(batch_of(rank, step))))
        return {"before": seen[20:60], "between": seen[68:70], "after": seen, "digest": rehearsal._coordinator.digest}


def test_a_change_takes_effect_on_all_ranks_at_once_when_all_have_it() -> None:
    ranks = run_ranks(mixed_on_ranks, 2, timeout_s=60)
    assert len({rank["digest"] for rank in ranks}) == 1
    for rank in ranks:
        counts = Counter(label for one in rank["before"] for label in one)
        assert counts[1] == 3 * counts[0] == 40 * 6
    last = [max(step for step, one in enumerate(rank["after"]) if 1 in one) for rank in ranks]
    assert last[0] == last[1]
    assert 67 <= last[0] < 72


def test_a_rank_alone_with_its_wish_changes_nothing() -> None:
    for rank in run_ranks(wishing, 2, timeout_s=60):
        assert Counter(label for one in rank for label in one) == {0: 40 * 2, 1: 40 * 6}


def wishing() -> list[list[int]]:
    rank = dist.get_rank()
    with Rehearsal(section({"0": 1, "1": 3})) as rehearsal:
        if rank == 0:
            rehearsal.reweigh({"0": 1})
        seen = [labels(rehearsal.update(batch_of(rank, step))) for step in range(60)]
    return seen[20:]


def test_a_mixture_is_met_alone_and_can_be_asked_of_a_balanced_draw() -> None:
    with Rehearsal(section("balanced"), LocalTransport()) as rehearsal:
        seen = []
        for step in range(90):
            if step == 50:
                rehearsal.reweigh({"1": 1, "0": 7})
            seen.append(Counter(labels(rehearsal.update(batch_of(0, step)))))
    assert all(one == {0: 4, 1: 4} for one in seen[10:50])
    assert all(one == {0: 7, 1: 1} for one in seen[53:])


def test_a_resumed_job_goes_on_with_the_mixture_in_force(tmp_path: Path) -> None:
    def steps(rehearsal: Rehearsal, first: int, last: int) -> list[list[int]]:
        return [rehearsal.update(batch_of(0, step))["id"].tolist() for step in range(first, last)]

    with Rehearsal(section({"0": 1, "1": 3}), LocalTransport()) as whole:
        steps(whole, 0, 20)
        whole.reweigh({"0": 3, "1": 1})
        steps(whole, 20, 30)
        whole.save(tmp_path)
        expected = steps(whole, 30, 40)
    with Rehearsal(section({"0": 1, "1": 3}), LocalTransport()) as again:
        again.load(tmp_path)
        assert steps(again, 30, 40) == expected


def test_after_a_rollback_the_wish_is_kept() -> None:
    with Rehearsal(section({"0": 1, "1": 1}), LocalTransport()) as rehearsal:
        for step in range(10):
            rehearsal.update(batch_of(0, step))
        rehearsal.commit()
        rehearsal.reweigh({"0": 1})
        rehearsal.rollback()
        seen = [labels(rehearsal.update(batch_of(0, step))) for step in range(10, 20)]
    assert {label for one in seen[4:] for label in one} == {0}


def test_a_file_changes_the_mixture_of_a_running_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mixture.json"
    with Rehearsal(section("balanced", sampling={"weights_file": str(path)}), LocalTransport()) as rehearsal:
        seen = []
        for step in range(80):
            if step == 20:
                path.write_text(json.dumps({"0": 1, "1": 7}))
            if step == 40:
                path.write_text("no: {weights")
            if step == 60:
                path.write_text("0: 7\n1: 1\n")
            with caplog.at_level(logging.WARNING, "rehearsal_plugin"):
                seen.append(Counter(labels(rehearsal.update(batch_of(0, step)))))
    assert seen[19] == {0: 4, 1: 4}
    assert all(one == {0: 1, 1: 7} for one in seen[23:60])
    assert all(one == {0: 7, 1: 1} for one in seen[63:])
    assert len([line for line in caplog.messages if "cannot be used" in line]) == 1


@pytest.mark.parametrize("weights", [{}, {"0": -1}, {"a": 1}, {"0": 0.0}])
def test_what_is_no_mixture_is_refused(weights: Any) -> None:
    with (
        Rehearsal(section("balanced"), LocalTransport()) as rehearsal,
        pytest.raises(ConfigError, match=r"rehearsal.sampling.weights"),
    ):
        rehearsal.reweigh(weights)


def test_a_job_that_knows_no_partitions_cannot_change_to_a_mixture() -> None:
    with (
        Rehearsal({"buffer": {"partition_by": "label"}}, LocalTransport()) as rehearsal,
        pytest.raises(ConfigError, match="start the job with 'balanced'"),
    ):
        rehearsal.reweigh({"0": 1})


def test_ranks_with_other_weights_at_the_start_are_told() -> None:
    for message in run_ranks(at_odds, 2, timeout_s=60):
        assert "sampling.weights" in message


def at_odds() -> str:
    rehearsal = Rehearsal(section({"0": 1, "1": 1 + dist.get_rank()}))
    try:
        for step in range(4):
            rehearsal.update(batch_of(dist.get_rank(), step))
    except Exception as error:
        return str(error)
    finally:
        rehearsal.close(drain_s=0.0)
    return ""


# --- by need ---------------------------------------------------------------------------------------------------------


def test_weights_that_follow_the_losses_are_proposed_and_give_new_partitions_a_mean_share() -> None:
    mixture, keys = Mixture(SamplingConfig(weights="forgetting")), np.array([3, 5, 9])
    assert mixture.weights(keys) is None, "all alike before anything is known"
    mixture.follow(None)
    assert mixture.proposed is None
    mixture.follow({"3": 0.25, "5": 0.75})
    assert mixture.weights(keys) is None, "not before all ranks have told the same"
    assert mixture.agree(np.array([Mixture.digest(mixture.proposed)] * 2), mixture.proposed)
    assert mixture.weights(keys) == pytest.approx([0.25, 0.75, 0.5])


def test_ranks_that_know_otherwise_keep_the_weights_as_they_are() -> None:
    mixture = Mixture(SamplingConfig(weights="forgetting"))
    mixture.follow({"3": 1.0})
    assert not mixture.agree(np.array([Mixture.digest({"3": 1.0}), Mixture.digest({"3": 0.5})]), mixture.proposed)
    assert mixture.in_force is None
