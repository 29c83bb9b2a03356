"""Checkpoints of one number of ranks for another: which rows go where, and what becomes of them."""

from __future__ import annotations

import doctest
import functools
import itertools
import pickle
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp
from torch import Tensor

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.buffer.policies.reservoir import thinned_places
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.checkpoint import format as files
from rehearsal_plugin.checkpoint import reshard
from rehearsal_plugin.checkpoint.format import RankFile
from rehearsal_plugin.checkpoint.lazy_rows import LazyRows
from rehearsal_plugin.checkpoint.record import Record, RowSet, pack_record, rows_for_rank
from rehearsal_plugin.checkpoint.reshard import deal_rows, keep_rows
from rehearsal_plugin.checkpoint.timeline import find_newest
from rehearsal_plugin.errors import BatchError, CheckpointError
from tests.helpers.chance import SIGNIFICANCE, equally_included
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, ids_of, intact, new_batch, rank_of, samples, step_of
from tests.helpers.seat import Seat

PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)
WORLDS = (1, 2, 3, 4, 8)
STEPS = 6
ROOMY = {"capacity": 500}


def job(rank: int = 0, size: int = 1, **keys: Any) -> Rehearsal:
    section = {"buffer": ROOMY, "representatives": 4, "sampling": {"scope": "local"}, **keys}
    return Rehearsal(section, Seat(rank, size))


def own(rank: int, step: int, label: int | None = None) -> Batch:
    """The batch of a rank; higher ranks have more rows."""
    return new_batch(rank, step, 4 + rank, label)


def save(folder: Path, size: int, *, labels: Sequence[int | None] = (None,) * STEPS, **keys: Any) -> Path:
    """The checkpoint of `size` ranks after a step for each label."""
    for rank in range(size):
        with job(rank, size, **keys) as rehearsal:
            for step, label in enumerate(labels):
                rehearsal.update(own(rank, step, label))
            rehearsal.save(folder)
    return folder


def load(folder: Path, size: int, **keys: Any) -> list[Rehearsal]:
    """Jobs of `size` ranks that went on from a checkpoint."""
    rehearsals = [job(rank, size, **keys) for rank in range(size)]
    for rehearsal in rehearsals:
        rehearsal.load(folder)
    return rehearsals


def stored(rehearsal: Rehearsal) -> Batch:
    """All rows of a buffer, by slot."""
    assert rehearsal.buffer is not None
    assert rehearsal._coordinator.prefetcher is not None
    rehearsal._coordinator.prefetcher.drain()  # the last rows are written in the background
    batch: Batch = rehearsal.buffer.layout.unpack(rehearsal.buffer.state_dict()["rows"])
    return batch


def ids(rehearsal: Rehearsal) -> list[int]:
    return ids_of(stored(rehearsal), 0)


def seen(rehearsal: Rehearsal) -> int:
    assert rehearsal.buffer is not None
    return rehearsal.buffer.slot_index.offered


def offered(size: int, steps: int = STEPS) -> list[int]:
    """The rows of all ranks."""
    return sorted(row for rank in range(size) for step in range(steps) for row in ids_of(own(rank, step), 0))


# --- sharing out -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(1, 12))
@PROPERTY
def test_ranks_take_every_row_of_every_file_once_in_equal_shares(counts: list[int], size: int) -> None:
    taken = [deal_rows(counts, rank, size) for rank in range(size)]
    rows = [(one.file, row) for of_rank in taken for one in of_rank for row in range(one.start, one.stop)]
    assert sorted(rows) == [(file, row) for file, count in enumerate(counts) for row in range(count)]
    shares = [sum(one.stop - one.start for one in of_rank) for of_rank in taken]
    assert max(shares) - min(shares) <= 1
    assert all(len(of_rank) <= 1 + (len(counts) - 1) for of_rank in taken)


OWNERS = st.lists(st.integers(0, 5), min_size=1, max_size=80)


@given(OWNERS, st.integers(1, 80), st.booleans())
@PROPERTY
def test_what_stays_is_a_set_of_rows_as_large_as_the_room(owners: list[int], capacity: int, equal: bool) -> None:
    kept = keep_rows(np.array(owners), capacity, equal=equal, rng=np.random.default_rng(0))
    assert len(kept) == min(capacity, len(owners))
    assert (np.diff(kept) > 0).all()
    assert not len(kept) or 0 <= kept[0] <= kept[-1] < len(owners)


@given(OWNERS, st.integers(1, 80))
@PROPERTY
def test_partitions_keep_their_shares_to_the_largest_remainder(owners: list[int], capacity: int) -> None:
    kept = keep_rows(np.array(owners), capacity, equal=False, rng=np.random.default_rng(0))
    have, left = Counter(owners), Counter(np.array(owners)[kept].tolist())
    if capacity >= len(owners):
        return
    exact = {key: size * capacity / len(owners) for key, size in have.items()}
    assert all(int(exact[key]) <= left[key] <= int(exact[key]) + 1 for key in have)
    up = [exact[key] % 1 for key in have if left[key] > int(exact[key])]
    down = [exact[key] % 1 for key in have if left[key] == int(exact[key])]
    assert not up or not down or min(up) >= max(down) - 1e-9


@given(OWNERS, st.integers(1, 80))
@PROPERTY
def test_or_get_equal_ones(owners: list[int], capacity: int) -> None:
    kept = keep_rows(np.array(owners), capacity, equal=True, rng=np.random.default_rng(0))
    have, left = Counter(owners), Counter(np.array(owners)[kept].tolist())
    most = max(left[key] for key in have)
    assert all(left[key] in (have[key], most, most - 1) or left[key] == have[key] for key in have)
    assert all(left[key] >= most - 1 for key in have if left[key] < have[key])


@pytest.mark.parametrize("equal", [True, False])
def test_every_row_of_a_partition_has_the_same_chance_to_stay(equal: bool) -> None:
    owners, trials = np.repeat([0, 1, 2], [20, 12, 4]), 2000
    counts = np.zeros(len(owners), dtype=int)
    for seed in range(trials):
        counts[keep_rows(owners, 18, equal=equal, rng=np.random.default_rng(seed))] += 1
    for key, taken in enumerate([7, 7, 4] if equal else [10, 6, 2]):
        mine = counts[owners == key]
        assert mine.sum() == taken * trials
        assert taken == len(mine) or equally_included(mine.tolist(), trials, taken) > SIGNIFICANCE


def rows_of(amount: int, seen_by_key: dict[int, int], first: int = 0) -> RowSet:
    """Rows of one partition a label, stored in turn."""
    batch = samples(torch.arange(first, first + amount))
    layout = RowLayout.infer(batch)
    packed = torch.zeros((amount, layout.row_bytes), dtype=torch.uint8)
    layout.pack(layout.columns(batch), packed)
    numbers = np.arange(amount)
    return RowSet(layout, LazyRows.of(packed), numbers, numbers.astype(np.int32), batch["label"].numpy(), seen_by_key)


def write(folder: Path, place: RankFile, rows: RowSet) -> tuple[Path, RankFile]:
    job = {"policy": "reservoir", "strategy": "er", "records": False}
    files.write_file(folder, place, pack_record(Record(job, rows.layout, "cpu", rows.buffer_state(), None)))
    return folder, place


def test_every_row_has_the_same_chance_to_go_to_a_rank(tmp_path: Path) -> None:
    rows, trials, counts = rows_of(12, {}), 200, np.zeros((3, 12), dtype=int)
    for step in range(trials):
        file = write(tmp_path, RankFile(step, 1, 0), rows)
        for rank in range(3):
            taken = rows_for_rank([file], rank, 3)
            assert taken is not None
            counts[rank, taken.written] += 1
        (tmp_path / file[1].name).unlink()
    for rank in range(3):
        assert equally_included(counts[rank].tolist(), trials, 4) > SIGNIFICANCE


@given(st.integers(0, 30), st.integers(1, 6), st.integers(0, 3))
@PROPERTY
def test_what_was_offered_is_shared_as_the_rows_are(amount: int, size: int, more: int) -> None:
    told = {key: 10 * (key + 1) * more + (amount + 4 - key) // 5 for key in range(5)}
    rows = rows_of(amount, told)
    parts = [rows.select(np.arange(rank, amount, size)) for rank in range(size)]
    for part in parts:
        have = Counter(part.keys.tolist())
        assert all(part.offered.get(key, 0) >= have[key] for key in have)
        if not more:
            assert sum(part.offered.values()) == len(part.keys), "who kept everything goes on keeping everything"
    if amount:
        total = sum(sum(part.offered.values()) for part in parts)
        assert abs(total - sum(told.values())) <= size * (len(told) + 1)


def test_what_vanished_partitions_offered_counts_too(tmp_path: Path) -> None:
    rows = rows_of(10, dict.fromkeys(range(50), 100))
    parts = [rows.select(np.arange(rank, 10, 2)) for rank in range(2)]
    assert [sum(part.offered.values()) for part in parts] == [2500, 2500]
    file = write(tmp_path, RankFile(1, 1, 0), parts[0])
    again = rows_for_rank([file], 0, 1)
    assert again is not None
    assert sum(again.offered.values()) == 2500, "a file carries it on"


def test_rows_that_had_to_go_were_offered_all_the_same() -> None:
    rows = rows_of(20, dict.fromkeys(range(5), 40))
    kept = rows.cut_to(5, equal=False, rng=np.random.default_rng(0))
    assert len(kept.rows) == 5
    assert sum(kept.offered.values()) == 200


def test_other_keys_share_what_was_offered() -> None:
    rows = rows_of(20, {0: 1000}).with_keys(np.repeat([7, 9], [5, 15]))
    assert rows.offered == {7: 250, 9: 750}


# --- other numbers of ranks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("saves")
    return {size: save(folder / str(size), size) for size in WORLDS}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(WORLDS, WORLDS)))
def test_no_row_is_lost_or_doubled_while_there_is_room(before: int, after: int, saves: dict[int, Path]) -> None:
    rehearsals = load(saves[before], after, buffer={"capacity": 501})
    found = [ids(rehearsal) for rehearsal in rehearsals]
    assert sorted(itertools.chain(*found)) == offered(before)
    shares = [len(rows) for rows in found]
    assert max(shares) - min(shares) <= 1
    assert sum(map(seen, rehearsals)) == len(offered(before))
    for rehearsal, rows in zip(rehearsals, found, strict=True):
        assert rehearsal.steps == STEPS
        assert intact(stored(rehearsal))
        assert rehearsal.buffer is not None
        state = rehearsal.buffer.state_dict()
        assert state["written"].tolist() == list(map(step_of, rows)), "when a row was admitted is known"
        assert state["origin"].tolist() == list(map(rank_of, rows)), "and where"
        rehearsal.close()


def test_what_was_written_for_other_ranks_goes_on(saves: dict[int, Path]) -> None:
    for size in (1, 3):
        for rehearsal in load(saves[2], size, buffer={"capacity": 501}):
            with rehearsal:
                rank = rehearsal._coordinator.lifecycle.rank
                batches = [rehearsal.update(own(rank, step)) for step in range(STEPS, STEPS + 4)]
                assert [len(batch["id"]) - 4 - rank for batch in batches] == [0, 0, 4, 4], "as late as in a new job"
                assert all(map(intact, batches))


def test_ranks_without_a_row_go_on_at_the_same_step_as_the_others(tmp_path: Path) -> None:
    save(tmp_path, 1, labels=[None], buffer={"capacity": 2})
    rehearsals = load(tmp_path, 4)
    assert sorted(len(ids(rehearsal)) for rehearsal in rehearsals) == [0, 0, 1, 1]
    assert [rehearsal.steps for rehearsal in rehearsals] == [1] * 4
    for rank, rehearsal in enumerate(rehearsals):
        with rehearsal:
            for step in range(1, 5):
                batch = rehearsal.update(own(rank, step))
            assert len(batch["id"]) > 4 + rank


def test_a_checkpoint_before_the_first_batch_is_an_empty_one_for_any_ranks(tmp_path: Path) -> None:
    save(tmp_path, 2, labels=[])
    for rank, rehearsal in enumerate(load(tmp_path, 3)):
        with rehearsal:
            assert rehearsal.buffer is None
            assert rehearsal.steps == 0
            assert [len(rehearsal.update(own(rank, step))["id"]) for step in range(3)] == [4 + rank, 4 + rank, 8 + rank]


def partitions(rehearsal: Rehearsal) -> dict[int, int]:
    return dict(Counter(stored(rehearsal)["label"].tolist()))


def test_where_there_is_too_little_room_partitions_keep_their_shares(tmp_path: Path) -> None:
    save(tmp_path, 1, labels=[0] * 12 + [1] * 6 + [2] * 2, buffer={**ROOMY, "partition_by": "label"})
    (rehearsal,) = load(tmp_path, 1, buffer={"capacity": 20, "partition_by": "label"})
    assert partitions(rehearsal) == {0: 12, 1: 6, 2: 2}
    assert seen(rehearsal) == 80
    balanced = {"capacity": 20, "partition_by": "label", "policy": "balanced"}
    (rehearsal,) = load(tmp_path, 1, buffer=balanced)
    assert partitions(rehearsal) == {0: 7, 1: 7, 2: 6}


def test_partitions_are_those_of_the_job_that_goes_on(tmp_path: Path) -> None:
    save(tmp_path, 1, labels=[0] * 12 + [1] * 6 + [2] * 2)
    (rehearsal,) = load(tmp_path, 1, buffer={"capacity": 20, "partition_by": "label", "policy": "balanced"})
    assert partitions(rehearsal) == {0: 7, 1: 7, 2: 6}
    metrics = rehearsal.metrics()
    assert [metrics[f"rows_offered/{key}"] for key in range(3)] == [48, 24, 8]
    with rehearsal:
        for step in range(20, 30):
            rehearsal.update(own(0, step, 2))
        assert partitions(rehearsal) == {0: 7, 1: 7, 2: 6}, "no partition takes the room of others"


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "more room": ({}, {"buffer": {"capacity": 900}}),
    "bytes": ({}, {"buffer": {"capacity": "1MiB"}}),
    "fifo": ({}, {"buffer": {**ROOMY, "policy": "fifo"}}),
    "random": ({}, {"buffer": {**ROOMY, "policy": "random_replace"}}),
    "balanced": ({}, {"buffer": {**ROOMY, "policy": "balanced", "partition_by": "label"}}),
    "partitions": ({}, {"buffer": {**ROOMY, "partition_by": "odd"}}),
    "other partitions": (
        {"buffer": {**ROOMY, "partition_by": "label"}},
        {"buffer": {**ROOMY, "partition_by": "odd", "policy": "balanced"}, "sampling": {"weights": "balanced"}},
    ),
    "no partitions": ({"buffer": {**ROOMY, "partition_by": "label", "policy": "balanced"}}, {}),
    "score": ({}, {"buffer": {**ROOMY, "policy": "score", "score_by": "half"}, "sampling": {"weights": "score"}}),
    "herding": ({}, {"buffer": {**ROOMY, "policy": "herding", "score_by": "x", "partition_by": "label"}}),
    "no score": ({"buffer": {**ROOMY, "policy": "score", "score_by": "half"}}, {}),
    "scope": ({}, {"sampling": {"scope": "global"}}),
    "strategy without records": ({}, {"strategy": {"name": "er-ace"}}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_go_on_with_the_rows(change: str, tmp_path: Path) -> None:
    before, after = CHANGES[change]
    save(tmp_path, 1, labels=[None] * 10, **before)
    (rehearsal,) = load(tmp_path, 1, **{"sampling": {}, **after})
    assert ids(rehearsal) == offered(1, 10), "all of them, the oldest first"
    with rehearsal:
        for step in range(10, 14):
            batch = rehearsal.augment(own(0, step))
            rehearsal.give_up_step()
            rehearsal.step()
        assert intact(batch)
        assert len(batch["id"]) == 8


# --- what goes on being true -----------------------------------------------------------------------------------------


def test_fifo_goes_on_dropping_the_oldest(tmp_path: Path) -> None:
    full = {"capacity": 10, "policy": "fifo"}
    for size, after in ((1, 1), (2, 1), (4, 2), (1, 3)):
        folder = save(tmp_path / f"{size}-{after}", size, labels=[None] * 7, buffer=full)
        for rank, rehearsal in enumerate(load(folder, after, buffer={"capacity": 9, "policy": "fifo"})):
            with rehearsal:
                for step in range(7, 13):
                    before, new = ids(rehearsal), ids_of(own(rank, step), 0)
                    rehearsal.update(own(rank, step))
                    left, gone = set(ids(rehearsal)), set(before) - set(ids(rehearsal))
                    assert set(new) <= left
                    assert len(left) == min(9, len(before) + len(new))
                    ages = [step_of(row) for row in before]
                    assert sorted(map(step_of, gone)) == sorted(ages)[: len(gone)], "the oldest went"


def stream(seed: int, *, seen_before: int, stored_before: int, capacity: int, batches: Sequence[int]) -> list[int]:
    """Numbers of the rows that are left of `seen_before` old ones and those of new batches."""
    rng = np.random.default_rng(seed)
    slots = dict(enumerate(rng.choice(seen_before, stored_before, replace=False).tolist()))
    number = seen_before
    for size in batches:
        places = thinned_places(number, len(slots), size, capacity, rng)
        assert sorted(places[places >= len(slots)].tolist()) == list(
            range(len(slots), len(slots) + int((places >= len(slots)).sum()))
        ), "new places are taken in order"
        slots.update({place: number + row for row, place in enumerate(places.tolist()) if place >= 0})
        number += size
    return list(slots.values())


def groups(left: Sequence[int], parts: Sequence[int]) -> list[float]:
    """How much of each part of a stream is left, parts given by their ends."""
    edges = [0, *parts]
    return [sum(low <= row < high for row in left) / (high - low) for low, high in itertools.pairwise(edges)]


def alike(shares: Sequence[Sequence[float]]) -> bool:
    """Whether no part of the stream is left more often than another, over independent streams."""
    parts = np.array(shares)
    gaps = parts - parts.mean(axis=1, keepdims=True)
    return all(not gap.any() or ttest_1samp(gap, 0).pvalue > SIGNIFICANCE for gap in gaps.T)


@pytest.mark.parametrize(
    ("seen_before", "stored_before", "capacity", "batches"),
    [
        (800, 100, 200, [80] * 30),  # is full after some batches, and goes on
        (800, 100, 200, [2400]),
        (400, 100, 300, [50] * 12),  # has room to the end
        (300, 90, 100, [6] * 50),
        (100, 100, 200, [70] * 8),  # has turned nothing away
        (300, 100, 100, [70] * 8),  # is full
    ],
)
def test_a_reservoir_spread_over_more_ranks_stays_a_uniform_sample(
    seen_before: int, stored_before: int, capacity: int, batches: list[int]
) -> None:
    total, shares = seen_before + sum(batches), []
    for seed in range(200):
        left = stream(seed, seen_before=seen_before, stored_before=stored_before, capacity=capacity, batches=batches)
        assert len(set(left)) == len(left) <= capacity
        shares.append(groups(left, [seen_before, (seen_before + total) // 2, total]))
    assert alike(shares)
    assert np.mean(shares) == pytest.approx(min(capacity, total * stored_before / seen_before) / total, rel=0.03)


def after_reshard(folder: Path, before: int, after: int, capacity: int, seed: int) -> list[float]:
    """Of 800 rows, and of as many that were offered after them to other ranks: how much is left."""
    keys: dict[str, Any] = {"buffer": {"capacity": capacity, "partition_by": "label"}, "seed": seed}
    for rank in range(before):
        with job(rank, before, **keys) as rehearsal:
            for step in range(4):
                rehearsal.update(samples(torch.arange(200 // before) + 1000 * step + 200 * rank))
            rehearsal.save(folder)
    left, told = [], 0
    for rank, rehearsal in enumerate(load(folder, after, **keys)):
        with rehearsal:
            told += seen(rehearsal)
            for step in range(4, 8):
                rehearsal.update(samples(torch.arange(200 // after) + 1000 * step + 200 * rank))
            left += ids(rehearsal)
    assert abs(told - 800) <= 5 * after
    return [sum(row < 4000 for row in left), sum(row >= 4000 for row in left)]


@pytest.mark.parametrize(("before", "after", "capacity"), [(1, 2, 60), (1, 4, 60), (4, 1, 40), (3, 2, 30)])
def test_a_job_on_other_ranks_keeps_old_and_new_rows_alike(
    before: int, after: int, capacity: int, tmp_path: Path
) -> None:
    assert alike([after_reshard(tmp_path / str(seed), before, after, capacity, seed) for seed in range(8)])


# --- what is refused -------------------------------------------------------------------------------------------------


def recorded(folder: Path, name: str, **keys: Any) -> None:
    with job(strategy={"name": name, "k": 2}, **keys) as rehearsal:
        for step in range(4):
            train(rehearsal, step)
        rehearsal.save(folder)


def train(rehearsal: Rehearsal, step: int) -> None:
    batch = rehearsal.augment(own(0, step))
    outputs = batch["x"].float().repeat(1, 2)
    rehearsal.loss(torch.nn.functional.cross_entropy, outputs, batch["label"])
    rehearsal.step()


@pytest.mark.parametrize(
    ("before", "after"), [("der", "er"), ("er", "der"), ("der", "x-der"), ("topk", "der++"), ("der++", "er-ace")]
)
@pytest.mark.parametrize("size", [1, 2])
def test_rows_with_the_records_of_another_strategy_are_refused(
    before: str, after: str, size: int, tmp_path: Path
) -> None:
    recorded(tmp_path, before)
    with pytest.raises(CheckpointError, match=rf"'{re.escape(before)}'.*'{re.escape(after)}'"):
        load(tmp_path, size, strategy={"name": after, "k": 2})


def test_other_outputs_or_losses_are_too(tmp_path: Path) -> None:
    recorded(tmp_path / "topk", "topk")
    with pytest.raises(CheckpointError, match=r"k 2.*k 3"):
        load(tmp_path / "topk", 1, strategy={"name": "topk", "k": 3})
    with pytest.raises(CheckpointError, match="outputs"):
        load(tmp_path / "topk", 1, strategy={"name": "topk", "k": 2, "outputs": ["output"]})
    by_loss = {"buffer": {**ROOMY, "policy": "score", "score_by": "loss"}}
    recorded(tmp_path / "loss", "er", **by_loss)
    with pytest.raises(CheckpointError, match="score_by 'loss'"):
        load(tmp_path / "loss", 1, strategy={"name": "er", "k": 2})
    recorded(tmp_path / "er", "er")
    with pytest.raises(CheckpointError, match="score_by 'loss'"):
        load(tmp_path / "er", 1, strategy={"name": "er", "k": 2}, **by_loss)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["der", "der++", "x-der", "topk"])
def test_records_go_with_their_rows(name: str, size: int, tmp_path: Path) -> None:
    recorded(tmp_path, name)
    for rehearsal in load(tmp_path, size, strategy={"name": name, "k": 2}, buffer={"capacity": 300}):
        with rehearsal:
            for step in range(4, 9):
                train(rehearsal, step)
            assert rehearsal.metrics()["rows_replayed"] > 0


@pytest.mark.parametrize("size", [1, 2])
def test_batches_of_other_fields_are_refused_at_the_first(size: int, tmp_path: Path) -> None:
    save(tmp_path, 1)
    whole = own(0, STEPS)
    others = [
        {**whole, "x": whole["x"].float()},
        {**whole, "x": whole["x"][:, :2]},
        {**whole, "more": whole["id"]},
        {name: value for name, value in whole.items() if name != "odd"},
        {("new" if name == "odd" else name): value for name, value in whole.items()},
    ]
    for batch in others:
        for rehearsal in load(tmp_path, size):
            with rehearsal:
                with pytest.raises(CheckpointError, match="batches of the same fields"):
                    rehearsal.update(batch)
                rehearsal.update(whole)


def test_rows_that_have_not_the_field_that_is_asked_for_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for keys in ({"partition_by": "domain"}, {"policy": "score", "score_by": "surprise"}):
        with pytest.raises(BatchError, match="no field"):
            load(tmp_path, 1, buffer={**ROOMY, **keys})


def test_files_of_different_fields_do_not_go_together(tmp_path: Path) -> None:
    save(tmp_path, 2)
    place = RankFile(STEPS, 2, 1)
    rows = rows_of(5, {})
    layout = replace(rows.layout, fields=rows.layout.fields[1:])
    other = RowSet.of(Record({}, layout, "cpu", rows.buffer_state(), None))
    assert other is not None
    narrow = RowLayout.infer({"x": torch.zeros(3, 2)})
    cut = LazyRows.of(other.rows.read_all()[:][:, : narrow.row_bytes].contiguous())
    write(tmp_path, place, replace(other, layout=narrow, rows=cut))
    with pytest.raises(CheckpointError, match="fields"):
        load(tmp_path, 1)


# --- real ranks ------------------------------------------------------------------------------------------------------


def section(**keys: Any) -> dict[str, Any]:
    return {"buffer": {"capacity": 60}, "representatives": 6, "exchange": {"timeout_s": 20}, **keys}


def begin(folder: Path) -> int:
    """Save with rows of every rank."""
    with Rehearsal(section()) as rehearsal:
        for step in range(20):
            rehearsal.update(new_batch(dist.get_rank(), step, 8))
        rehearsal.save(folder)
        return len(ids(rehearsal))


def go_on(folder: Path) -> bytes:
    """Load on other ranks: rows of each, and what the model sees then."""
    with Rehearsal(section()) as rehearsal:
        rehearsal.load(folder)
        first = ids(rehearsal)
        batches = [rehearsal.update(new_batch(dist.get_rank(), step, 8)) for step in range(20, 45)]
        return pickle.dumps((first, batches, rehearsal.steps))


@functools.cache
def moved(
    before: int, after: int, folder: Path
) -> tuple[list[int], list[tuple[list[int], list[dict[str, Tensor]], int]]]:
    amounts = run_ranks(begin, before, folder / f"{before}-{after}", timeout_s=120)
    return amounts, [
        pickle.loads(result) for result in run_ranks(go_on, after, folder / f"{before}-{after}", timeout_s=120)
    ]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moved")


both_ways = pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])


@both_ways
def test_real_ranks_share_out_the_rows(before: int, after: int, common: Path) -> None:
    amounts, results = moved(before, after, common)
    found = [rows for rows, _, _ in results]
    assert amounts == [60] * before
    together = list(itertools.chain(*found))
    assert len(set(together)) == len(together) == 120
    assert {len(rows) for rows in found} == {120 // after}
    files_found = find_newest(common / f"{before}-{after}")
    assert files_found is not None
    stored_before = []
    for place in files_found:
        part = rows_for_rank([(common / f"{before}-{after}", place)], 0, 1)
        assert part is not None
        stored_before += part.layout.unpack(part.rows.read_all()[:])["id"].tolist()
    assert set(together) <= set(stored_before)


@both_ways
def test_and_go_on_with_rows_of_all_old_ranks(before: int, after: int, common: Path) -> None:
    _, results = moved(before, after, common)
    replayed = [row for _, batches, _ in results for batch in batches for row in ids_of(batch, 8)]
    old = {rank_of(row) for row in replayed if step_of(row) < 20}
    assert old == set(range(before))
    assert {rank_of(row) for row in replayed if step_of(row) >= 20} == set(range(after))
    for _, batches, steps in results:
        assert steps == 45
        assert all(map(intact, batches))
        assert [len(batch["id"]) - 8 for batch in batches] == [0, 0] + [6] * 23


def test_the_examples_of_the_module_are_right() -> None:
    assert doctest.testmod(reshard).failed == 0
