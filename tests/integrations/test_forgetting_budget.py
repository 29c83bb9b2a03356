"""Real ranks on gloo with a budget: where the ratio ends, that all ranks have the same one, and an exact resume.

The model is one number w. Old rows want 0, new ones 1, and each costs 1 more than its distance: there is no noise. With
a share r of old rows w comes to rest at 1 - r, where the loss on them has risen by (1 - r)^2: by 0.36 at r = 0.4.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import open_transport
from rehearsal_plugin.runtime.loss_consensus import LossConsensus
from tests.helpers.ranks import run_ranks

OLD_STEPS, STEPS, ROWS = 30, 400, 16
SECTION: dict[str, Any] = {
    "buffer": {"capacity": 400, "partition_by": "domain"},
    "ratio": {"budget": 0.36, "max": 0.8, "window": 64},
    "sampling": {"weights": {"0": 1}},
    "mode": "replace",
    "losses_every": 1,
    "exchange": {"timeout_s": 60},
}
BY_NEED = {**SECTION, "sampling": {"weights": "forgetting"}}


def loss_of(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return 1 + torch.mean((predicted - wanted) ** 2)


def mean_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


def train(
    rehearsal: Rehearsal,
    weight: torch.Tensor,
    first: int,
    stop: int,
    mean: Callable[[torch.Tensor], torch.Tensor] = mean_over_ranks,
) -> list[float]:
    """Trains the number, with gradients averaged over the ranks; the ratio after each step."""
    ratios = []
    for step in range(first, stop):
        domain = torch.full((ROWS,), int(step >= OLD_STEPS))
        batch = rehearsal.augment({"domain": domain, "wanted": domain.float()})
        loss = rehearsal.loss(loss_of, weight.expand(len(batch["wanted"])), batch["wanted"])
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 0.1 * mean(gradient)
        rehearsal.step()
        ratios.append(rehearsal.metrics().get("ratio", 0.0))
    return ratios


def last_line() -> str:
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("rehearsal_plugin")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    controlled(SECTION)
    return lines[-1]


def test_the_last_line_says_how_the_budget_was_met() -> None:
    for line in run_ranks(last_line, 2):
        assert re.search(r"; the ratio is 0\.[34]\d* in the end", line)
        assert re.search(r"has risen by 3\d(\.\d)? % of what it was \(rehearsal\.ratio\.budget: 36 %\)", line)


def controlled(section: dict[str, Any]) -> tuple[list[float], dict[str, float], float]:
    weight = torch.zeros((), requires_grad=True)
    with Rehearsal(section) as rehearsal:
        ratios = train(rehearsal, weight, 0, STEPS)
        return ratios, rehearsal.metrics(), weight.item()


def test_the_budget_is_held_with_the_replay_that_it_takes() -> None:
    (ratios, metrics, weight), (others, _, _) = run_ranks(controlled, 2, SECTION)
    assert ratios == others, "all ranks have the same ratio at every step"
    assert weight**2 == pytest.approx(0.36, rel=0.1)
    assert ratios[-1] == pytest.approx(0.4, rel=0.15)
    assert metrics["forgetting/0"] == pytest.approx(0.36, rel=0.1)


def test_weight_and_ratio_hold_it_with_fewer_rows() -> None:
    """A row that counts for v moves w as v rows do, so v times the ratio comes to rest where the ratio alone does."""
    by_both = {**SECTION, "ratio": {**SECTION["ratio"], "min": 0.1, "by": "both", "max_weight": 3.0}}
    (ratios, metrics, weight), (others, theirs, _) = run_ranks(controlled, 2, by_both)
    assert ratios == others
    assert metrics["loss_weight"] == theirs["loss_weight"] > 1.5
    assert weight**2 == pytest.approx(0.36, rel=0.1)
    assert ratios[-1] < 0.3, "the ratio alone takes 0.4"


def test_rows_are_drawn_where_the_loss_has_risen() -> None:
    (ratios, metrics, _), (others, theirs, _) = run_ranks(controlled, 2, BY_NEED)
    assert ratios == others
    assert metrics["forgetting/0"] == theirs["forgetting/0"] > 2 * max(0.0, metrics["forgetting/1"])
    assert metrics["rows_replayed/0"] > 0.6 * (metrics["rows_replayed/0"] + metrics["rows_replayed/1"])


def resumed(section: dict[str, Any], folder: Path) -> bool:
    weight = torch.zeros((), requires_grad=True)
    with Rehearsal(section) as rehearsal:
        train(rehearsal, weight, 0, 100)
        rehearsal.save(folder)
        at_save = weight.detach().clone()
        straight = train(rehearsal, weight, 100, 160)
    again = at_save.requires_grad_()
    with Rehearsal(section) as rehearsal:
        rehearsal.load(folder)
        return train(rehearsal, again, 100, 160) == straight and torch.equal(again, weight)


@pytest.mark.parametrize("section", [SECTION, BY_NEED, {**BY_NEED, "losses_every": 4}])
def test_a_job_resumes_bit_for_bit(section: dict[str, Any], tmp_path: Path) -> None:
    assert run_ranks(resumed, 2, section, tmp_path) == [True, True]


def rolled_back() -> tuple[float, float, float]:
    weight = torch.zeros((), requires_grad=True)
    with Rehearsal(SECTION) as rehearsal:
        before = train(rehearsal, weight, 0, 200)[-1]
        rehearsal.rollback()
        after = train(rehearsal, weight, 200, 204)[0]
        return before, after, rehearsal.metrics()["forgetting/0"]


def test_a_rollback_forgets_neither_ratio_nor_reference() -> None:
    for before, after, rise in run_ranks(rolled_back, 2):
        assert after == pytest.approx(before, rel=0.2)
        assert rise > 0.2


def with_a_newcomer() -> tuple[list[float], dict[str, float]]:
    weight = torch.zeros((), requires_grad=True)
    with Rehearsal(BY_NEED) as rehearsal:
        train(rehearsal, weight, 0, 150)
        if dist.get_rank() == 0:  # as a process that was started just now
            rehearsal._coordinator.losses = LossConsensus(rehearsal.config, 0)
        rehearsal.restart(150, lambda: open_transport("gloo", 60))
        return train(rehearsal, weight, 150, 250), rehearsal.metrics()


def test_a_rank_that_joins_takes_over_what_the_others_know() -> None:
    (ratios, metrics), (others, theirs) = run_ranks(with_a_newcomer, 2)
    assert ratios == others
    assert metrics["forgetting/0"] == theirs["forgetting/0"] > 0.2


def in_groups() -> list[float]:
    return controlled({**SECTION, "sampling": {"weights": {"0": 1}, "scope": 2}})[0]


def test_groups_of_ranks_have_one_ratio() -> None:
    first, *others = run_ranks(in_groups, 4)
    assert all(other == first for other in others)
    assert first[-1] == pytest.approx(0.4, rel=0.3)


def with_another(first: dict[str, Any], second: dict[str, Any]) -> str:
    with Rehearsal([first, second][dist.get_rank()]) as rehearsal:
        try:
            train(rehearsal, torch.zeros((), requires_grad=True), 0, 6)
        except Exception as error:
            return str(error)
    return ""


def test_ranks_of_which_one_has_no_budget_are_refused_by_name() -> None:
    without = {**SECTION, "ratio": 0.05}
    for message in run_ranks(with_another, 2, SECTION, without):
        assert "rehearsal.ratio" in message


def saved(folder: Path) -> tuple[float, float]:
    weight = torch.zeros((), requires_grad=True)
    with Rehearsal(SECTION) as rehearsal:
        train(rehearsal, weight, 0, 200)
        rehearsal.save(folder)
        return rehearsal.metrics()["ratio"], rehearsal.metrics()["forgetting/0"]


def taken_over(folder: Path) -> tuple[float, float]:
    with Rehearsal(SECTION) as rehearsal:
        rehearsal.load(folder)
        return rehearsal.metrics()["ratio"], rehearsal.metrics()["forgetting/0"]


def test_other_ranks_take_over_what_was_known(tmp_path: Path) -> None:
    before = run_ranks(saved, 2, tmp_path)[0]
    for ratio, rise in (*run_ranks(taken_over, 1, tmp_path), *run_ranks(taken_over, 3, tmp_path)):
        assert (ratio, rise) == before


def within_other_bounds(folder: Path) -> tuple[float, float, float]:
    weight = torch.zeros((), requires_grad=True)
    tighter = {**SECTION, "ratio": {**SECTION["ratio"], "max": 0.2}, "losses_every": 50}
    with Rehearsal(tighter) as rehearsal:
        rehearsal.load(folder)
        told = rehearsal.metrics()["ratio"]
        before = rehearsal.metrics()["rows_replayed"]
        train(rehearsal, weight, 200, 240)
        return told, (rehearsal.metrics()["rows_replayed"] - before) / (40 * ROWS), rehearsal.metrics()["ratio"]


def test_other_bounds_hold_from_the_load_on(tmp_path: Path) -> None:
    assert run_ranks(saved, 2, tmp_path)[0][0] > 0.3
    for told, share, _ in run_ranks(within_other_bounds, 2, tmp_path):
        assert told == pytest.approx(0.2)
        assert share < 0.25, "but for rows that were on their way"


def saved_without(folder: Path) -> None:
    with Rehearsal({**SECTION, "ratio": 0.2}) as rehearsal:
        train(rehearsal, torch.zeros((), requires_grad=True), 0, 40)
        rehearsal.save(folder)


def warnings_of_load(folder: Path) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rehearsal_plugin").addHandler(handler)
    with Rehearsal(SECTION) as rehearsal:
        rehearsal.load(folder)
    return [line for line in lines if "knows of no loss" in line]


@pytest.mark.parametrize("ranks", [1, 2], ids=["shared out", "exact"])
def test_a_budget_that_begins_in_the_middle_of_a_job_says_so(ranks: int, tmp_path: Path) -> None:
    run_ranks(saved_without, 2, tmp_path)
    first, *others = run_ranks(warnings_of_load, ranks, tmp_path)
    assert len(first) == 1
    assert not any(others)
