"""`sampling.weights: stream`: every row that any rank was ever offered has the same chance."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rehearsal_plugin import Rehearsal, RehearsalConfig
from rehearsal_plugin.buffer.policies import register
from rehearsal_plugin.buffer.policies.reservoir import algorithm_r, reservoir
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.draw import draw_from_stream
from rehearsal_plugin.distributed.transport import Transport
from rehearsal_plugin.errors import ConfigError
from tests.helpers.chance import SIGNIFICANCE, equally_included
from tests.helpers.drawn_rows import DrawnRows, drawn_rows
from tests.helpers.thread_ranks import run_threads

RATES = (1, 2, 5)
CAPACITY, STEPS, PHASES = 40, 400, 4


def section(**keys: Any) -> dict[str, Any]:
    sampling = {"weights": "stream", **keys.pop("sampling", {})}
    buffer = {"capacity": CAPACITY, **keys.pop("buffer", {})}
    return {"buffer": buffer, "representatives": 6, "sampling": sampling, "exchange": {"timeout_s": 60}, **keys}


def batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    """As many rows as the rank's rate says; rows of rank 2 are of class 1 four times as often as of class 0."""
    size = RATES[rank]
    label = torch.arange(size) % 5 > 0 if rank == 2 else torch.arange(size) % 2 > 0
    return {"rank": torch.full((size,), rank), "step": torch.full((size,), step), "label": label.long()}


def replayed_on(transport: Transport, keys: dict[str, Any], steps: int = STEPS) -> tuple[IntArray, IntArray, IntArray]:
    """Rank, age as a share of the stream, and label of the rows that a rank replays."""
    found = []
    with Rehearsal(section(**keys), transport) as rehearsal:
        for step in range(steps):
            rows = rehearsal.update(batch(transport.rank, step))
            if step >= 60:
                of_past = rows["step"] != step
                found.append(torch.stack([rows["rank"], rows["step"] * 1000 // step, rows["label"]])[:, of_past])
    rank, age, label = torch.cat(found, 1).numpy()
    return rank, age / 1000, label


def replayed(ranks: int = 3, **keys: Any) -> tuple[IntArray, IntArray, IntArray]:
    parts = run_threads(replayed_on, ranks, keys)
    rank, age, label = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rank, age, label


def drawn(counts: IntArray, offers: IntArray, requests: Any, step: int = 0, draws: int = 1) -> DrawnRows:
    asked = np.array(requests)
    return drawn_rows(
        lambda rank, numbers: draw_from_stream(counts, offers, asked, rank, numbers, draws), len(counts), step
    )


def p_value(counts: Any, shares: Any) -> float:
    counts, shares = np.asarray(counts), np.asarray(shares, dtype=np.float64)
    return float(chisquare(counts, shares / shares.sum() * counts.sum()).pvalue)


def test_ranks_have_the_share_of_their_rate_and_every_age_is_alike() -> None:
    rank, age, _ = replayed()
    assert p_value(np.bincount(rank), RATES) > SIGNIFICANCE
    # Of one reservoir, rows stay for many steps, so draws of neighbouring steps are alike: shares, not chances.
    for number, rate in enumerate(RATES):
        phases = np.bincount((age[rank == number] * PHASES).astype(int).clip(max=PHASES - 1), minlength=PHASES)
        assert phases / phases.sum() == pytest.approx([1 / PHASES] * PHASES, abs=0.1), f"rate {rate}"


def test_without_it_slow_ranks_come_too_often() -> None:
    rank, *_ = replayed(sampling={"weights": "uniform"})
    assert p_value(np.bincount(rank), RATES) < SIGNIFICANCE
    assert p_value(np.bincount(rank), (1, 1, 1)) > SIGNIFICANCE


def test_with_balanced_buffers_partitions_have_their_share_of_the_stream() -> None:
    rank, _, label = replayed(buffer={"policy": "balanced", "partition_by": "label"})
    cells = np.bincount(2 * rank + label, minlength=6)
    # Rank 0 gives label 0 alone, rank 1 both, rank 2 one row of label 0 and four of label 1.
    assert cells[1] == 0
    assert p_value(cells[[0, 2, 3, 4, 5]], (1, 1, 1, 1, 4)) > SIGNIFICANCE


def test_partitions_of_a_reservoir_change_nothing() -> None:
    rank, *_ = replayed(buffer={"partition_by": "label"})
    assert p_value(np.bincount(rank), RATES) > SIGNIFICANCE


def test_every_row_of_the_stream_is_drawn_with_the_same_chance() -> None:
    offered, capacity, wanted, trials = np.array([8, 16, 40]), 8, 4, 6000
    begin, rng = np.cumsum(offered) - offered, np.random.default_rng(1)
    times_drawn = np.zeros(int(offered.sum()), dtype=np.int64)
    for trial in range(trials):
        stored = []
        for number in offered.tolist():
            places = algorithm_r(0, number, capacity, rng)
            rows = np.empty(capacity, dtype=np.int64)
            rows[places[places >= 0]] = np.flatnonzero(places >= 0)
            stored.append(rows)
        draws = drawn(np.full((3, 1), capacity), offered[:, None], [0, wanted, 0], trial)
        for owner, index in zip(draws.owner.tolist(), draws.index.tolist(), strict=True):
            times_drawn[begin[owner] + stored[owner][index]] += 1
    assert equally_included(times_drawn.tolist(), trials, wanted) > SIGNIFICANCE


@pytest.mark.parametrize("draws", [1, 2])
def test_no_draw_has_a_row_twice_and_plans_agree(draws: int) -> None:
    counts, offers = np.array([[3, 0], [5, 2], [0, 9]]), np.array([[30, 4], [5, 2], [0, 900]])
    for seed in range(50):
        found = drawn(counts, offers, [4, 0, 7], seed, draws)
        rows = np.stack([found.reader, found.draw_number, found.owner, found.partition, found.index])
        assert len(np.unique(rows, axis=1).T) == len(rows.T) == 11 * draws
        assert (found.index < counts[found.owner, found.partition]).all()
        plans = found.plans
        assert all(plans[a].send_counts[b] == plans[b].recv_counts[a] for a in range(3) for b in range(3))


def test_what_a_rank_has_too_few_rows_for_goes_to_the_others() -> None:
    counts, offers = np.array([[2], [10]]), np.array([[1000], [10]])
    found = drawn(counts, offers, [8, 0])
    assert np.bincount(found.owner).tolist() == [2, 6]


@pytest.mark.parametrize("requests", [(0, 0), (100, 3)])
def test_no_rows_and_more_than_there_are(requests: tuple[int, int]) -> None:
    counts = np.array([[2], [3]])
    found = drawn(counts, 7 * counts, requests)
    assert len(found.owner) == min(5, requests[0]) + min(5, requests[1])
    none = drawn(0 * counts, 0 * counts, requests)
    assert len(none.owner) == 0


# --- policies, changes of the config, checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffer",
    [
        {"policy": "fifo"},
        {"policy": "random_replace"},
        {"policy": "score", "score_by": "x"},
        {"policy": "herding", "score_by": "x", "partition_by": "label"},
    ],
    ids=lambda buffer: str(buffer["policy"]),
)
def test_policies_that_keep_no_uniform_sample_are_refused_by_name(buffer: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"'{buffer['policy']}' keeps others; set the policy to 'reservoir' or 'bal"):
        RehearsalConfig.load(section(buffer=buffer))


def test_a_policy_of_ones_own_says_what_its_rows_are_a_sample_of() -> None:
    late = RehearsalConfig.load(section(buffer={"policy": "tests-late"}), open_names=True)
    register("tests-late")(reservoir)
    with pytest.raises(ConfigError, match="'tests-late' keeps others"):
        Rehearsal(late)
    register("tests-uniform", sample_of="rank")(reservoir)
    RehearsalConfig.load(section(buffer={"policy": "tests-uniform"}))


def saved_and_loaded(transport: Transport, folder: Path, keys: dict[str, Any]) -> list[bool]:
    """Whether a job that is loaded goes on bit for bit."""
    with Rehearsal(section(**keys), transport) as first:
        for step in range(30):
            first.update(batch(transport.rank, step))
        first.save(folder)
        ahead = [first.update(batch(transport.rank, step)) for step in range(30, 40)]
        first.drain()
        first.load(folder)
        behind = [first.update(batch(transport.rank, step)) for step in range(30, 40)]
    return [torch.equal(one[name], other[name]) for one, other in zip(ahead, behind, strict=True) for name in one]


@pytest.mark.parametrize("buffer", [{}, {"policy": "balanced", "partition_by": "label"}], ids=["reservoir", "balanced"])
def test_a_job_goes_on_bit_for_bit(tmp_path: Path, buffer: dict[str, Any]) -> None:
    for same in run_threads(saved_and_loaded, 3, tmp_path, {"buffer": buffer}):
        assert all(same)


def saved(transport: Transport, folder: Path) -> None:
    with Rehearsal(section(), transport) as rehearsal:
        for step in range(200):
            rehearsal.update(batch(transport.rank, step))
        rehearsal.save(folder)


def origins_after_load(transport: Transport, folder: Path) -> Counter[int]:
    """Which ranks the rows come from that a job replays after it has taken over the rows of others."""
    found: Counter[int] = Counter()
    with Rehearsal(section(seed=1, strategy={"name": "er", "k": 3}), transport) as rehearsal:
        rehearsal.load(folder)
        for step in range(200, 320):
            rows = rehearsal.update({name: value[:0] for name, value in batch(transport.rank, step).items()})
            found.update(rows["rank"].tolist())
    return found


def test_rows_that_as_many_ranks_take_over_keep_what_they_stand_for(tmp_path: Path) -> None:
    run_threads(saved, 3, tmp_path)
    counts: Counter[int] = sum(run_threads(origins_after_load, 3, tmp_path), Counter())
    assert p_value([counts[rank] for rank in range(3)], RATES) > SIGNIFICANCE
