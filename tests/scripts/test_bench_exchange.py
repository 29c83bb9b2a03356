"""The benchmark of the exchange on few ranks: what is counted, never what is timed."""

from __future__ import annotations

import socket

import pytest

from scripts.benchmarks import exchange as bench_exchange
from scripts.benchmarks import process_ranks as bench_ranks
from scripts.benchmarks.process_ranks import Job, on_ranks, run_steps

STEPS = 12


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_are_nearly_all_that_a_rank_sends(ranks: int) -> None:
    row = bench_exchange.counted(Job(32 << 10, representatives=8, steps=STEPS), ranks)
    assert 1 <= row["collectives"] <= 1 + 1 / STEPS
    assert row["messages"] <= row["messages_max"] <= 2 * (ranks - 1) * (1 + 1 / STEPS)
    assert 1 <= row["bytes_ratio"] <= 1.05
    assert row["segments"] >= row["messages"] / 2
    # All rows that are asked for and live elsewhere: 8 (n - 1) / n in the mean, a multiple of rows over all steps.
    rows = row["row_bytes"] / row["bytes_a_row"]
    assert rows * STEPS * ranks == pytest.approx(round(rows * STEPS * ranks))
    assert 0.9 <= rows / (8 * (ranks - 1) / ranks) <= 1.1


def test_what_comes_on_top_of_rows_does_not_depend_on_them() -> None:
    small, large = (on_ranks(run_steps, 2, Job(size, steps=STEPS)) for size in (1024, 64 << 10))
    on_top = [[rank.wire_bytes - rank.row_bytes for rank in ranks] for ranks in (small, large)]
    assert on_top[0] == pytest.approx(on_top[1], abs=100)
    assert all(0 < rank < 1024 for rank in on_top[0])


def test_few_rows_reach_few_ranks() -> None:
    measured = on_ranks(run_steps, 3, Job(1024, representatives=1, steps=STEPS))
    assert sum(rank.messages for rank in measured) <= 2 * 3 + 2 * 3 * 2 / STEPS
    assert all(len(rank.step_s) == STEPS for rank in measured)


def test_the_kernel_counts_what_a_connection_sends() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=10) as one,
        server.accept()[0] as other,
    ):
        one.sendall(b"x" * 1000)
        assert len(other.recv(1000, socket.MSG_WAITALL)) == 1000
        counters = bench_ranks.connections()
        assert counters[one.getsockname(), one.getpeername()] == (1, 1000)
        assert counters[other.getsockname(), other.getpeername()] == (0, 0)


def test_an_error_of_a_rank_is_raised() -> None:
    with pytest.raises(RuntimeError, match="negative"):
        on_ranks(run_steps, 1, Job(-1))


def test_the_draw_is_timed_for_all_ranks() -> None:
    timings = bench_exchange.timed_draws(((16, 1), (64, 10)), rounds=3)
    assert [timing.rounds for timing in timings.values()] == [3, 3]
    moved = [bench_exchange.drawing(*which)().moved for which in timings]
    assert moved == [8 * 16, 8 * 64]
