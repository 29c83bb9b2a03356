"""What a training loop may rely on: 2 and 4 real processes on gloo."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.header_schedule import STEADY_AFTER
from rehearsal_plugin.errors import ExchangeError, ExchangeTimeout
from tests.helpers.exits import run_exits
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, ids_of, intact, new_batch, rank_of, same, step_of

SIZE, WANTED, STEPS = 8, 6, 60
SIGNIFICANCE = 1e-4  # of each statistical test; seeds are fixed

both_sizes = pytest.mark.parametrize("ranks", [2, 4])


def section(**keys: Any) -> dict[str, Any]:
    return {"buffer": {"capacity": 64}, "representatives": WANTED, "exchange": {"timeout_s": 20}, **keys}


def run(steps: int = STEPS, size: int = SIZE, **keys: Any) -> tuple[list[Batch], dict[str, float]]:
    """What the model of this rank sees in each step, and the metrics."""
    with Rehearsal(section(**keys)) as rehearsal:
        seen = [rehearsal.update(new_batch(dist.get_rank(), step, size)) for step in range(steps)]
    return seen, rehearsal.metrics()


def carry(function: Callable[[], Any]) -> bytes:
    """The result by value: tensors that go through a pipe as they are need a sender that stays alive."""
    return pickle.dumps(function())


@functools.cache
def runs(ranks: int) -> list[tuple[list[Batch], dict[str, float]]]:
    """One run for all facts about it."""
    return [pickle.loads(result) for result in run_ranks(carry, ranks, run, timeout_s=60)]


@both_sizes
def test_the_batchs_own_rows_come_first_bit_identical(ranks: int) -> None:
    for rank, (batches, _) in enumerate(runs(ranks)):
        for step, seen in enumerate(batches):
            assert same({k: v[:SIZE] for k, v in seen.items()}, new_batch(rank, step, SIZE))


@both_sizes
def test_all_fields_of_a_replayed_row_stay_together(ranks: int) -> None:
    assert all(intact(seen) for batches, _ in runs(ranks) for seen in batches)


@both_sizes
def test_the_third_update_is_the_first_with_replayed_rows(ranks: int) -> None:
    for batches, _ in runs(ranks):
        assert [len(seen["id"]) for seen in batches] == [SIZE] * 2 + [SIZE + WANTED] * (STEPS - 2)


@both_sizes
def test_a_row_is_never_replayed_before_the_second_next_step_nor_twice_at_once(ranks: int) -> None:
    for batches, _ in runs(ranks):
        for step, seen in enumerate(batches):
            replayed = ids_of(seen, SIZE)
            assert all(step_of(row) <= step - 2 for row in replayed)
            assert len(set(replayed)) == len(replayed)


@both_sizes
def test_every_rank_is_served_by_every_rank(ranks: int) -> None:
    for batches, _ in runs(ranks):
        assert {rank_of(row) for seen in batches for row in ids_of(seen, SIZE)} == set(range(ranks))


@both_sizes
def test_metrics_count_exactly(ranks: int) -> None:
    all_metrics = [metrics for _, metrics in runs(ranks)]
    for rank, (batches, metrics) in enumerate(runs(ranks)):
        assert metrics["steps"] == STEPS
        rows, headers = STEPS - 1, metrics["collectives"] - (STEPS - 1)
        assert STEADY_AFTER < headers < rows, "rows from the second step on, and few headers once nothing changes"
        assert metrics["rows_offered"] == STEPS * SIZE
        assert metrics["rows_stored"] == 64
        assert metrics["rows_replayed"] == (STEPS - 2) * WANTED
        foreign = sum(rank_of(row) != rank for seen in batches for row in ids_of(seen, SIZE))
        assert 0 <= metrics["rows_received"] - foreign <= WANTED, "the last exchange is counted and not seen"
        assert metrics["bytes_received"] % metrics["rows_received"] == 0
    assert sum(m["rows_sent"] for m in all_metrics) == sum(m["rows_received"] for m in all_metrics)
    assert sum(m["bytes_sent"] for m in all_metrics) == sum(m["bytes_received"] for m in all_metrics)


def test_bytes_of_a_rank_do_not_grow_with_ranks() -> None:
    for ranks in (2, 4):
        for _, metrics in runs(ranks):
            row_bytes = metrics["bytes_received"] / metrics["rows_received"]
            assert metrics["bytes_received"] <= (STEPS - 1) * WANTED * row_bytes, "more than was asked for"
        sent = np.mean([metrics["bytes_sent"] for _, metrics in runs(ranks)])
        assert sent <= (STEPS - 1) * WANTED * row_bytes


# Modes and settings that share one job of two ranks.


def variants() -> dict[str, Any]:
    rank = dist.get_rank()
    return {
        "thread": run(exchange={"launch": "thread", "timeout_s": 20})[0],
        "inline": run(exchange={"launch": "inline", "timeout_s": 20})[0],
        "other seed": run(seed=7)[0],
        "local": run(sampling={"scope": "local"}),
        "replace": run(mode="replace")[0],
        "micro-batches": micro_batches(rank),
        "uneven": uneven(rank),
        "balanced": balanced(rank),
        "between": between(rank),
    }


def micro_batches(rank: int) -> tuple[list[list[Batch]], dict[str, float]]:
    with Rehearsal(section(buffer={"capacity": 1000})) as rehearsal:
        steps = []
        for step in range(12):
            steps.append([rehearsal.augment(new_batch(rank, 3 * step + micro, SIZE)) for micro in range(3)])
            rehearsal.step()
    return steps, rehearsal.metrics()


def uneven(rank: int) -> list[int]:
    """Rows added in each step, where ranks have batches of different sizes, and a smaller last one."""
    sizes = [4 + 8 * rank] * 10 + [1 + rank, 4]
    with Rehearsal({"buffer": {"capacity": 64}, "ratio": 0.2}) as rehearsal:
        return [len(rehearsal.update(new_batch(rank, step, n))["id"]) - n for step, n in enumerate(sizes)]


def balanced(rank: int) -> list[list[int]]:
    """Partitions replayed in each step; rank 1 alone holds partition 9, and a new one appears every 10 steps."""
    keys = section(
        buffer={"capacity": 200, "partition_by": "label"}, sampling={"weights": "balanced"}, representatives=12
    )
    with Rehearsal(keys) as rehearsal:
        labels = [9 if rank == 1 and step % 2 else step // 10 for step in range(40)]
        batches = [rehearsal.update(new_batch(rank, step, SIZE, label)) for step, label in enumerate(labels)]
    return [batch["label"][SIZE:].tolist() for batch in batches]


def between(rank: int) -> bool:
    """Whether collectives of the loop's own on the default group stay right."""
    right = True
    with Rehearsal(section()) as rehearsal:
        for step in range(STEPS):
            rehearsal.update(new_batch(rank, step, SIZE))
            gradient = torch.full((10_000,), float(rank + step))
            dist.all_reduce(gradient)
            right &= bool((gradient == 2 * step + 1).all())
    return right


@functools.cache
def two() -> list[dict[str, Any]]:
    return [pickle.loads(result) for result in run_ranks(carry, 2, variants, timeout_s=100)]


def test_threads_change_nothing_bit_for_bit() -> None:
    for of_rank in two():
        assert all(same(a, b) for a, b in zip(of_rank["thread"], of_rank["inline"], strict=True))


def test_the_seed_makes_the_run() -> None:
    for of_rank, (default, _) in zip(two(), runs(2), strict=True):
        assert all(same(a, b) for a, b in zip(of_rank["thread"], default, strict=True)), "the same seed, another run"
        assert not all(same(a, b) for a, b in zip(of_rank["other seed"], default, strict=True))


def test_ranks_get_different_rows() -> None:
    first, second = ([ids_of(seen, SIZE) for seen in of_rank["thread"]] for of_rank in two())
    assert sum(a == b for a, b in zip(first[2:], second[2:], strict=True)) == 0


def test_local_scope_moves_no_byte() -> None:
    for rank, of_rank in enumerate(two()):
        batches, metrics = of_rank["local"]
        assert metrics["bytes_sent"] == metrics["bytes_received"] == metrics["rows_sent"] == 0
        assert metrics["rows_replayed"] == (STEPS - 2) * WANTED
        assert {rank_of(row) for seen in batches for row in ids_of(seen, SIZE)} == {rank}


def test_local_scope_draws_differently_on_each_rank() -> None:
    first, second = ([[row % 1_000_000 for row in ids_of(b, SIZE)] for b in of_rank["local"][0]] for of_rank in two())
    assert first != second


def test_replace_keeps_the_size() -> None:
    for rank, of_rank in enumerate(two()):
        for step, seen in enumerate(of_rank["replace"]):
            kept = SIZE if step < 2 else SIZE - WANTED
            assert len(seen["id"]) == SIZE
            assert ids_of(seen, 0)[:kept] == ids_of(new_batch(rank, step, SIZE), 0)[:kept]


def test_micro_batches_share_one_exchange() -> None:
    for of_rank in two():
        steps, metrics = of_rank["micro-batches"]
        for number, step in enumerate(steps):
            replayed = [row for batch in step for row in ids_of(batch, SIZE)]
            assert len(replayed) == (3 * WANTED if number > 2 else 0), f"step {number}"
            assert len(set(replayed)) == len(replayed)
        assert metrics["collectives"] <= 2 * len(steps)


def test_ranks_may_have_batches_of_different_sizes() -> None:
    # Rank 1 ends with batches of 2 and 4 rows, which are due half a row and one; those planned are of 12 rows.
    assert [of_rank["uneven"] for of_rank in two()] == [[0, 0] + [1] * 10, [0, 0] + [3] * 8 + [0, 1]]


def test_balanced_weights_replay_every_partition_alike() -> None:
    for of_rank in two():
        replayed = of_rank["balanced"]
        for step in range(15, 40):
            counts = Counter(replayed[step])
            partitions = {9, *range((step - 2) // 10 + 1)}
            assert counts.keys() <= partitions
            if step % 10 > 4:  # a new partition needs some steps until it holds its share
                assert {counts[p] for p in partitions} <= {12 // len(partitions), -(-12 // len(partitions))}, step


def test_collectives_of_the_loop_stay_right() -> None:
    assert all(of_rank["between"] for of_rank in two())


# The draw over ranks of very unequal fill.


def owners(launch: str) -> list[list[int]]:
    """Owners of the rows replayed in each step; rank k holds 10 * (k + 1) ** 2 rows from step 20 on."""
    rank = dist.get_rank()
    keys = section(
        buffer={"capacity": 10 * (rank + 1) ** 2}, representatives=8, exchange={"launch": launch, "timeout_s": 20}
    )
    with Rehearsal(keys) as rehearsal:
        seen = [rehearsal.update(new_batch(rank, step, SIZE)) for step in range(320)]
    return [[rank_of(row) for row in ids_of(batch, SIZE)] for batch in seen[22:]]


@pytest.mark.parametrize(("ranks", "launch"), [(2, "thread"), (4, "inline")])
def test_every_stored_row_has_the_same_chance_on_every_rank(ranks: int, launch: str) -> None:
    fill = 10 * np.arange(1, ranks + 1) ** 2
    for reader, steps in enumerate(run_ranks(owners, ranks, launch, timeout_s=100)):
        observed = np.bincount(np.concatenate(steps), minlength=ranks)
        expected = observed.sum() * fill / fill.sum()
        # Draws without replacement scatter less than independent ones, by this factor.
        shrink = (fill.sum() - 8) / (fill.sum() - 1)
        statistic = float(((observed - expected) ** 2 / expected).sum() / shrink)
        p = stats.chi2.sf(statistic, ranks - 1)
        assert SIGNIFICANCE < p < 1 - SIGNIFICANCE, f"reader {reader}: {observed} instead of {expected}"


# Ranks that are at odds.


def at_odds(kind: str) -> tuple[str, str, float]:
    """Kind and message of the first error, and seconds from the last good step until it came."""
    rank = dist.get_rank()
    keys = section(exchange={"timeout_s": 1.0}, seed=rank if kind == "seeds" else 0)
    rehearsal = Rehearsal(keys)
    started = time.monotonic()
    try:
        for step in range(20):
            started = time.monotonic()
            if kind == "one step less" and rank == 1 and step == 5:
                time.sleep(4)
                break
            batch = new_batch(rank, step, SIZE)
            if kind == "layouts" and rank == 1:
                batch["x"] = batch["x"].float()
            rehearsal.update(batch)
    except ExchangeError as error:
        seconds = time.monotonic() - started
        for _ in range(2):
            with pytest.raises(type(error)):  # it stays failed
                rehearsal.update(new_batch(rank, 0, SIZE))
        rehearsal.close()
        rehearsal.close()
        return type(error).__name__, str(error), seconds
    rehearsal.close()
    return "", "", 0.0


@pytest.mark.fault
def test_different_rows_on_two_ranks_are_an_error_that_names_them() -> None:
    for rank, (kind, message, _) in enumerate(run_ranks(at_odds, 2, "layouts", timeout_s=30)):
        assert kind == ExchangeError.__name__
        assert message.startswith(f"rank {rank} is at step 0; rank {1 - rank}")
        assert "fields, dtypes or shapes" in message


def test_different_seeds_on_two_ranks_are_an_error() -> None:
    for kind, message, _ in run_ranks(at_odds, 2, "seeds", timeout_s=30):
        assert kind == ExchangeError.__name__
        assert "rehearsal.seed" in message


@pytest.mark.fault
def test_a_rank_with_one_step_less_is_a_timeout_of_the_others() -> None:
    (kind, message, seconds), _ = run_ranks(at_odds, 2, "one step less", timeout_s=30)
    assert kind == ExchangeTimeout.__name__
    assert "rank 0 at step 5" in message
    assert seconds < 1.5


def interrupted() -> float:
    """Seconds to leave the block after an error in the loop."""
    rank = dist.get_rank()
    with pytest.raises(ZeroDivisionError):
        fail_at_different_times(rank)
    raised = time.monotonic()
    return raised - _failed_at.pop()


_failed_at: list[float] = []


def fail_at_different_times(rank: int) -> None:
    """Rank 0 fails while an exchange is in flight that rank 1 does not join before 1.5 s."""
    with Rehearsal(section(exchange={"timeout_s": 30})) as rehearsal:
        for step in range(4 - rank):
            rehearsal.update(new_batch(rank, step, SIZE))
        time.sleep(1.5 * rank)
        _failed_at.append(time.monotonic())
        raise ZeroDivisionError


@pytest.mark.fault
def test_an_error_in_the_loop_ends_quickly() -> None:
    assert run_ranks(interrupted, 2, timeout_s=30)[0] < 1


def again_and_again() -> tuple[int, list[str]]:
    """Growth of open files over 30 rehearsals, and threads that are left."""
    files = 0
    for turn in range(40):
        run(steps=4, seed=turn)
        if turn == 9:
            files = _files()
    deadline = time.monotonic() + 5  # the system closes a connection after the last message on it has ended
    while _files() > files and time.monotonic() < deadline:
        time.sleep(0.05)
    return _files() - files, [t.name for t in threading.enumerate() if t.name.startswith("rehearsal")]


def _files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_many_rehearsals_in_one_process_leave_nothing_behind() -> None:
    for files, threads in run_ranks(again_and_again, 2, timeout_s=60):
        assert files <= 2
        assert not threads


# Whole processes: what a shell sees at their end.


def _some_steps(rank: int, steps: int = 5) -> Rehearsal:
    rehearsal = Rehearsal(section(exchange={"timeout_s": 30}))
    for step in range(steps):
        rehearsal.update(new_batch(rank, step, SIZE))
    return rehearsal


def exit_closed(rank: int) -> None:
    _some_steps(rank).close()
    dist.destroy_process_group()


def exit_unclosed(rank: int) -> None:
    _some_steps(rank)
    dist.destroy_process_group()


def exit_unclosed_with_nothing_destroyed(rank: int) -> None:
    _some_steps(rank)
    dist.barrier()


def exit_destroyed_before_close(rank: int) -> None:
    rehearsal = _some_steps(rank)
    dist.barrier()
    dist.destroy_process_group()
    rehearsal.close()


def exit_after_the_peer_was_killed(rank: int) -> None:
    _some_steps(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    dist.destroy_process_group()


def exit_after_an_error(rank: int) -> None:
    rehearsal = _some_steps(rank)
    if rank == 1:
        os._exit(3)
    with pytest.raises(ExchangeError):
        train_on(rehearsal)
    dist.destroy_process_group()


def train_on(rehearsal: Rehearsal) -> None:
    for step in range(5, 20):
        rehearsal.update(new_batch(0, step, SIZE))


def exit_one_step_ahead(rank: int) -> None:
    """The peer takes another step for which nobody waits."""
    _some_steps(rank, 5 + rank)
    time.sleep(1 - rank)


EXITS: dict[Callable[[int], None], list[int]] = {
    exit_closed: [0, 0],
    exit_unclosed: [0, 0],
    exit_unclosed_with_nothing_destroyed: [0, 0],
    exit_destroyed_before_close: [0, 0],
    exit_after_the_peer_was_killed: [0, -9],
    exit_after_an_error: [0, 3],
    exit_one_step_ahead: [0, 0],
}


@functools.cache
def exits() -> dict[str, list[dict[str, Any]]]:
    return run_exits(EXITS)


@pytest.mark.parametrize("scenario", EXITS, ids=lambda scenario: scenario.__name__)
def test_the_process_ends_cleanly_and_fast(scenario: Callable[[int], None]) -> None:
    ranks = exits()[scenario.__name__]
    assert [rank["code"] for rank in ranks] == EXITS[scenario], ranks
    assert not any("terminate called" in rank["stderr"] for rank in ranks), ranks
    assert max(rank["seconds"] for rank in ranks) < 15, "no end waits for the 30 s of the exchange"
