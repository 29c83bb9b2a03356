"""The ratio is met over time, whatever the steps look like."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.integrations.inject.loader import RehearsalLoader
from tests.helpers.unequal_steps import NEAR, PATTERNS, RATIO, STEPS, QueueJob


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_micro_batch_gets_the_representatives_in_the_mean(pattern: str) -> None:
    count, rows = 0, 0
    with Rehearsal({"buffer": {"capacity": 1000}, "representatives": 3}) as rehearsal:
        for _, sizes in zip(range(STEPS), itertools.cycle(PATTERNS[pattern]), strict=False):
            for size in sizes:
                seen = len(rehearsal.augment(torch.zeros(size, 2)))
                count, rows = count + 1, rows + seen - size
                assert seen - size <= 5, "no micro-batch grows by much more"
            rehearsal.step()
    assert rows / count == pytest.approx(3, abs=0.1)


def test_a_micro_batch_gets_little_more_than_its_own_part() -> None:
    most: dict[int, int] = {}
    with Rehearsal({"buffer": {"capacity": 1000}, "ratio": RATIO}) as rehearsal:
        for sizes in itertools.islice(itertools.cycle(((8,) * 6, (8,), (1,), (32,))), 200):
            for size in sizes:
                replayed = len(rehearsal.augment(torch.zeros(size, 2))) - size
                most[size] = max(most.get(size, 0), replayed)
            rehearsal.step()
    assert most[1] <= 2
    assert most[8] <= 5
    assert most[32] <= 17


@pytest.mark.parametrize("large", [16, 63, 64])
@pytest.mark.parametrize("singles", [1, 2, 10, 50])
def test_single_rows_beside_large_batches_are_displaced_as_the_ratio_says(singles: int, large: int) -> None:
    seen = {1: [0, 0], large: [0, 0]}
    sizes = (*(1,) * singles, large)
    with Rehearsal({"buffer": {"capacity": 1000}, "ratio": RATIO, "mode": "replace"}) as rehearsal:
        for step, size in zip(range(900), itertools.cycle(sizes), strict=False):
            out = rehearsal.update(torch.full((size, 1), float(step + 1)))
            if step >= 100:
                seen[size][0] += int((out != step + 1).sum())
                seen[size][1] += size
    for displaced, rows in seen.values():
        assert displaced / rows == pytest.approx(RATIO, abs=0.015)


@pytest.mark.parametrize("beside", [(), (64,)], ids=["alone", "beside 64"])
def test_single_rows_without_room_for_two_draws_are_made_up_for_or_said(
    beside: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    section = {"buffer": {"capacity": 1000}, "ratio": RATIO, "mode": "replace", "strategy": {"name": "der++"}}
    new = replayed = 0
    with Rehearsal(section) as rehearsal:
        for step, size in zip(range(600), itertools.cycle((1, 1, 1, 1, *beside)), strict=False):
            batch = rehearsal.augment(torch.full((size, 1), float(step)))
            rehearsal.record(batch.clone())
            new, replayed = new + int((batch == step).sum()), replayed + int((batch != step).sum())
            rehearsal.step()
            asked.append(rehearsal._coordinator.queue._requested[-1].requested)
    assert max(asked) <= 40, "rows that nobody can take are not asked for ever more"
    if beside:
        assert replayed / (new + replayed) == pytest.approx(RATIO, abs=NEAR)
    else:
        assert replayed == 0
    warnings = [line for line in caplog.messages if "no room for a row of each of 2 draws" in line]
    assert len(warnings) == (0 if beside else 1)


def test_one_exceptional_step_is_made_up_for_and_then_forgotten() -> None:
    replayed = []
    with Rehearsal({"buffer": {"capacity": 1000}, "ratio": RATIO}) as rehearsal:
        for step in range(200):
            for _ in range(30 if step == 50 else 3):
                rehearsal.augment(torch.zeros(8, 2))
            replayed.append(rehearsal.metrics()["rows_replayed"])
            rehearsal.step()
    assert replayed[-1] == pytest.approx((8 * 3 * 197 + 8 * 27) / 3, abs=2)
    assert replayed[-1] - replayed[-31] == pytest.approx(30 * 8, abs=1)


def test_rows_that_no_buffer_has_are_not_owed() -> None:
    replayed = []
    with Rehearsal({"buffer": {"capacity": 5}, "ratio": 0.8}) as rehearsal:
        for _ in range(40):
            replayed.append(sum(len(rehearsal.augment(torch.zeros(4, 2))) - 4 for _ in range(2)))
            rehearsal.step()
    assert replayed[10:] == [5] * 30


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("epoch", [10, 13, 24])
def test_a_ratio_is_met_by_a_loader_whose_epochs_end_within_a_step(mode: str, epoch: int) -> None:
    rows = [torch.zeros(8, 2)] * epoch + [torch.zeros(3, 2)]
    with Rehearsal({"buffer": {"capacity": 1000}, "ratio": RATIO, "mode": mode, "inject": "loader"}) as rehearsal:
        seen = 0
        for _ in range(60):
            for number, batch in enumerate(RehearsalLoader(rows, rehearsal), start=1):
                seen += len(batch)
                if number % 4 == 0:
                    rehearsal.step()
            rehearsal.step()
        assert rehearsal.metrics()["rows_replayed"] / seen == pytest.approx(RATIO, abs=NEAR)


def test_a_changing_ratio_is_met_with_unequal_steps() -> None:
    share = QueueJob(ratio=0.1, ratio_schedule={"to": 0.4, "steps": STEPS}).run(PATTERNS["8 8 8 3"])
    per_new = [share / (1 - share) for share in (0.1 + 0.3 * step / STEPS for step in range(STEPS))]
    mean = sum(per_new) / len(per_new)
    assert share == pytest.approx(mean / (1 + mean), abs=NEAR)


def test_a_job_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Any) -> None:
    def drive(rehearsal: Rehearsal, first: int, last: int) -> list[int]:
        sizes = []
        for step in range(first, last):
            sizes += [len(rehearsal.augment(torch.zeros(8, 2))) for _ in range((4, 1, 2, 7, 1)[step % 5])]
            rehearsal.step()
        return sizes

    section = {"buffer": {"capacity": 100}, "ratio": RATIO}
    with Rehearsal(section) as first, Rehearsal(section) as second:
        drive(first, 0, 23)
        first.save(tmp_path)
        second.load(tmp_path)
        assert drive(first, 23, 60) == drive(second, 23, 60)
