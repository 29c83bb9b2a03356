"""The model of large clusters, and many ranks as threads that run the real code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rehearsal_plugin.runtime.cost_model import LINKS, Links
from scripts.benchmarks import scale as bench_scale
from scripts.benchmarks.scale import GPUS, LOADS
from scripts.benchmarks.thread_ranks import (
    SETTLED_AFTER,
    ThreadTransport,
    counted_messages,
    replayed_ids,
    rows_of,
)
from tests.helpers.chance import SIGNIFICANCE, equally_included

STEPS, REPRESENTATIVES = 12, 8


# --- ranks as threads ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed() -> tuple[torch.Tensor, int]:
    ids, metrics = replayed_ids(128, STEPS, REPRESENTATIVES)
    return ids.reshape(STEPS, 128, REPRESENTATIVES), int(metrics["collectives"])


def test_every_row_of_128_ranks_has_the_same_chance(replayed: tuple[torch.Tensor, int]) -> None:
    ids, _ = replayed
    counts = torch.bincount(ids.flatten(), minlength=4 * 128).reshape(128, 4)
    stored = [row for rank in range(128) for row in counts[rank, : rows_of(rank)].tolist()]
    assert sum(stored) == ids.numel() == 128 * STEPS * REPRESENTATIVES
    assert equally_included(stored, trials=128 * STEPS, taken=REPRESENTATIVES) > SIGNIFICANCE


def test_no_rank_of_128_gets_a_row_twice_in_a_step(replayed: tuple[torch.Tensor, int]) -> None:
    ids, _ = replayed
    assert all(len(set(drawn)) == REPRESENTATIVES for step in ids.tolist() for drawn in step)


def test_ranks_draw_apart_and_steps_anew(replayed: tuple[torch.Tensor, int]) -> None:
    ids, _ = replayed
    drawn = {tuple(sorted(one)) for one in ids.reshape(-1, REPRESENTATIVES).tolist()}
    assert len(drawn) == 128 * STEPS


def test_in_groups_every_row_of_128_ranks_has_the_same_chance() -> None:
    ids, _ = replayed_ids(128, STEPS, REPRESENTATIVES, sampling={"scope": 32})
    counts = torch.bincount(ids, minlength=4 * 128).reshape(128, 4)
    stored = [row for rank in range(128) for row in counts[rank, : rows_of(rank)].tolist()]
    assert sum(stored) == len(ids) == pytest.approx(128 * STEPS * REPRESENTATIVES, rel=0.01)
    assert chisquare(stored).pvalue > SIGNIFICANCE


def test_128_ranks_need_two_collectives_a_step(replayed: tuple[torch.Tensor, int]) -> None:
    _, collectives = replayed
    steps = STEPS + SETTLED_AFTER
    assert 2 * steps - 2 <= collectives <= 2 * steps  # the first have no rows to send


def test_ranks_as_threads_deliver_what_the_plan_says() -> None:
    one, other = ThreadTransport.group(2)
    rows = torch.arange(6, dtype=torch.uint8).reshape(3, 2)
    got = [torch.empty(2, 2, dtype=torch.uint8), torch.empty(4, 2, dtype=torch.uint8)]
    pending = one.all_to_all(rows, np.array([1, 2]), got[0], np.array([1, 1]))
    second = other.all_to_all(rows + 10, np.array([1, 2]), got[1], np.array([2, 2]))
    assert pending.done()
    assert pending.result().tolist() == [[0, 1], [10, 11]]
    assert second.result().tolist() == [[2, 3], [4, 5], [12, 13], [14, 15]]


def test_messages_do_not_grow_with_the_ranks() -> None:
    found = [counted_messages(ranks, 4, 6, 4, "global")["messages_max"] for ranks in (16, 64)]
    assert all(count <= 2 * 4 + 2 * (ranks - 1) for count, ranks in zip(found, (16, 64), strict=True))
    grouped = counted_messages(32, 4, 6, 4, 8)["messages_max"]
    assert grouped <= 2 * 4 + 2 * 7 + 2 * 31 / 2, "headers of the group in each of these steps, of all in some"


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_fit_finds_the_figures_that_made_the_steps() -> None:
    cores = bench_scale.cores()
    links = Links(16, 300.0, 40.0, 40.0, 40.0, 0.8, 0.8, cores=cores)
    steps = {(n, size): bench_scale.predicted_ms(links, n, size) for n in (2, 4, 8) for size in bench_scale.SIZES}
    fitted = bench_scale.fit(steps)
    assert (fitted.base_us, fitted.hop_us, fitted.gb_s) == pytest.approx((300.0, 40.0, 0.8), rel=1e-6)
    checked = bench_scale.validation({(16, 1024): bench_scale.predicted_ms(links, 16, 1024)}, fitted, held_out=16)
    assert checked[0]["held_out"]
    assert checked[0]["ratio"] == pytest.approx(1.0)


def test_the_model_covers_all_clusters_and_grows_with_them() -> None:
    rows = bench_scale.model_rows()
    assert len(rows) == len(LOADS) * len(LINKS) * len(GPUS)
    for name in LOADS:
        for links in LINKS:
            totals = [row["total"] for row in rows if (row["load"], row["links"]) == (name, links)]
            assert totals == sorted(totals)


def test_rows_cost_the_same_on_all_clusters_and_headers_grow() -> None:
    rows = [row for row in bench_scale.model_rows() if row["links"] == "h100-ndr" and row["gpus"] >= 64]
    first, last = rows[0], [row for row in rows if row["load"] == rows[0]["load"]][-1]
    assert last["gpus"] == 256 * first["gpus"]
    assert last["messages"] == first["messages"] == 8
    assert last["rows"] == pytest.approx(first["rows"], rel=0.02)
    assert last["headers"] >= 100 * first["headers"]


def test_a_step_of_two_real_ranks_is_measured_and_foretold() -> None:
    measured = bench_scale.steps_of([2], steps=4)
    assert list(measured) == [(2, size) for size in bench_scale.SIZES]
    links = bench_scale.fit(measured)
    assert all(row["measured_ms"] > 0 and row["foretold_ms"] > 0 for row in bench_scale.validation(measured, links, 2))
