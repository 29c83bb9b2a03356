"""The guard: what it takes for a rise, that all ranks agree on it, and what it remembers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal, RehearsalConfig
from rehearsal_plugin.checkpoint import format as files
from rehearsal_plugin.checkpoint.format import RankFile
from rehearsal_plugin.config import GuardConfig
from rehearsal_plugin.distributed.transport import LocalTransport, TorchDistributedTransport
from rehearsal_plugin.errors import CheckpointError, ConfigError, ForgettingError
from rehearsal_plugin.runtime.forgetting_guard import ForgettingGuard
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import new_batch

SIZE = 8
HEARD_LATER = 1  # steps: losses travel with the next header
RISING = 20  # from which step on the loss rises in `train`


def section(**guard: Any) -> dict[str, Any]:
    return {
        "buffer": {"capacity": 60, "partition_by": "label"},
        "ratio": 0.2,
        "losses_every": 1,
        "guard": {"window": 4, "bound": 1.3, "action": "stop", **guard},
        "exchange": {"timeout_s": 20},
    }


def rising(step: int) -> float:
    return 1.0 + 0.2 * max(0, step - RISING)


def train(
    rehearsal: Rehearsal, first: int, last: int, rank: int = 0, loss: Callable[[int], float] = rising
) -> str | None:
    """Steps with a loss that is given; what the guard said when it ended them, or None."""
    for step in range(first, last):
        value = torch.tensor(loss(step))
        batch = rehearsal.augment(new_batch(rank, step, SIZE))
        rehearsal.loss(lambda _, value=value: value, batch["x"])
        try:
            rehearsal.step()
        except ForgettingError as error:
            return str(error)
    return None


# --- what is a rise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_a_loss_that_stays_is_no_rise_whatever_its_sign(level: float) -> None:
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        assert train(rehearsal, 0, 30, loss=lambda _: level) is None


def heard(losses: list[float], **config: Any) -> list[int]:
    """After which of the measurements the guard would have ended the job."""
    guard, schedule = (
        ForgettingGuard(GuardConfig(**{"action": "stop", "window": 1, **config}), 0),
        ReplayRatio(RehearsalConfig()),
    )
    stops = []
    for number, loss in enumerate(losses):
        try:
            guard.hear(loss, number, schedule)
        except ForgettingError:
            stops.append(number)
    return stops


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([2.0, 2.2, 2.25], [2]),  # 1.1 times 2 is the bound itself
        ([-2.0, -1.8, -1.75], [2]),  # as far above the lowest value where that is below 0
        ([3.0, 2.0, 2.3], [2]),  # the lowest so far, not the first
        ([3.0, 2.9, 2.8], []),
    ],
)
def test_the_bound_is_a_share_of_the_lowest_mean(losses: list[float], stops: list[int]) -> None:
    assert heard(losses, bound=1.1 + 1e-9) == stops


def test_only_means_over_whole_windows_count() -> None:
    assert heard([1.0, 1.0, 1.5, 1.0, 1.0], bound=1.2, window=3) == []
    assert heard([1.0, 1.0, 1.0, 1.5, 1.5], bound=1.2, window=3) == [4]


def test_what_is_no_number_on_one_rank_is_left_out_of_the_mean_of_all() -> None:
    steady, broken = run_ranks(one_rank_without_numbers, 2, timeout_s=60)
    assert steady == broken == {"stopped": None, "mean": 1.0}


def one_rank_without_numbers() -> dict[str, Any]:
    rank = dist.get_rank()
    with Rehearsal(section()) as rehearsal:
        stopped = train(rehearsal, 0, 20, rank, lambda _: float("nan") if rank else 1.0)
        assert rehearsal._coordinator.losses.guard is not None
        return {"stopped": stopped, "mean": rehearsal._coordinator.losses.guard.state_dict()["best"]}


@pytest.mark.parametrize("window", [1, 4])
def test_a_job_whose_loss_stays_nan_ends_with_the_window(window: int) -> None:
    measured = 0

    def loss(step: int) -> float:
        nonlocal measured
        measured += step >= RISING
        return float("nan") if step >= RISING else 1.0

    with Rehearsal(section(window=window), LocalTransport()) as rehearsal:
        stopped = train(rehearsal, 0, 60, loss=loss)
    assert stopped is not None
    assert f"NaN or infinite in each of the last {window} measurements" in stopped
    assert measured == window + HEARD_LATER


# --- what it says and does -------------------------------------------------------------------------------------------


def test_a_ratio_that_can_rise_no_further_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    keys = section(action="raise_ratio", factor=2.0, most=0.5)
    with Rehearsal(keys, LocalTransport()) as rehearsal, caplog.at_level(logging.WARNING, "rehearsal_plugin"):
        train(rehearsal, 0, 80)
    assert [line.rpartition("the ratio is ")[2] for line in caplog.messages] == [
        "0.4 from here on",
        "0.5 from here on",
    ]


def test_a_second_rise_is_told_of_again(caplog: pytest.LogCaptureFixture) -> None:
    keys = section(action="warn")
    with Rehearsal(keys, LocalTransport()) as rehearsal, caplog.at_level(logging.WARNING, "rehearsal_plugin"):
        train(rehearsal, 0, 40, loss=lambda step: 2.0 if 10 <= step < 20 or step >= 30 else 1.0)
    assert len(caplog.messages) == 2


# --- the last good checkpoint ----------------------------------------------------------------------------------------


def test_the_step_is_named_where_one_folder_has_all_checkpoints(tmp_path: Path) -> None:
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        for first in (0, 6):
            train(rehearsal, first, first + 6)
            rehearsal.save(tmp_path)
        told = train(rehearsal, 12, 60)
    assert told is not None
    assert told.endswith(f"from before: {tmp_path}, step 12")


@pytest.mark.parametrize("every", [1, 10])
def test_a_checkpoint_from_between_the_damage_and_its_measurement_is_no_good_one(every: int, tmp_path: Path) -> None:
    keys = {**section(window=1), "losses_every": every}
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        told = None
        for step in range(60):
            # The update of step 30 spoils the model, as the step after it finds it.
            told = told or train(rehearsal, step, step + 1, loss=lambda step: 1.0 if step <= 30 else 10.0)
            rehearsal.save(tmp_path / f"after{step}")
    assert told is not None
    assert told.endswith(f"from before: {tmp_path / 'after29'}, step 30")


def test_a_checkpoint_from_after_the_rise_is_no_good_one(tmp_path: Path) -> None:
    with Rehearsal(section(action="warn"), LocalTransport()) as rehearsal:
        train(rehearsal, 0, 10)
        rehearsal.save(tmp_path / "before")
        train(rehearsal, 10, 40)
        rehearsal.save(tmp_path / "after")
        assert rehearsal._coordinator.losses.guard is not None
        assert rehearsal._coordinator.losses.guard.good == f"{tmp_path / 'before'}, step 10"


@pytest.mark.parametrize("pending", [None, 3, [3], [[3]], [["3", "a"]], [[-1, "a"]], [[3, 4]], [[2.5, "a"]]])
def test_checkpoints_that_wait_for_their_loss_must_be_steps_and_folders(pending: Any, tmp_path: Path) -> None:
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        train(rehearsal, 0, 10)
        rehearsal.save(tmp_path)
        place = RankFile(rehearsal.steps, 1, 0)
    whole = files.read_file(tmp_path, place)
    guard = whole.meta["state"]["progress"]["supply"]["guard"]
    guard["pending"] = pending
    files.write_file(tmp_path, place, whole)
    with Rehearsal(section(), LocalTransport()) as rehearsal, pytest.raises(CheckpointError):
        rehearsal.load(tmp_path)


def test_a_resumed_job_names_the_checkpoint_that_it_was_resumed_from(tmp_path: Path) -> None:
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        train(rehearsal, 0, 10)
        rehearsal.save(tmp_path)
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        rehearsal.load(tmp_path)
        told = train(rehearsal, 10, 60)
    assert told is not None
    assert told.endswith(f"from before: {tmp_path}, step 10")


def test_a_job_that_was_stopped_can_still_be_saved(tmp_path: Path) -> None:
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        assert train(rehearsal, 0, 60) is not None
        rehearsal.save(tmp_path)
        stopped = rehearsal.steps
    with Rehearsal(section(action="warn"), LocalTransport()) as rehearsal:
        assert rehearsal.load(tmp_path)
        assert train(rehearsal, stopped, stopped + 10) is None


def test_a_job_that_was_stopped_can_go_back_and_on(tmp_path: Path) -> None:
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        train(rehearsal, 0, 10)
        rehearsal.save(tmp_path)
        assert train(rehearsal, 10, 60) is not None
        rehearsal.load(tmp_path)
        assert train(rehearsal, 10, 30, loss=lambda _: 1.0) is None


# --- all ranks alike -------------------------------------------------------------------------------------------------


def test_ranks_stop_together_after_one_of_them_joined_later() -> None:
    stayed, joined = run_ranks(with_a_rank_that_joins, 2, timeout_s=60)
    assert stayed == joined
    assert stayed is not None


def with_a_rank_that_joins() -> str | None:
    """Rank 1 begins anew at step 15, as a process would that an elastic job takes in."""
    rank = dist.get_rank()
    rehearsal = Rehearsal(section())
    train(rehearsal, 0, 15, rank)
    if rank:
        rehearsal.close()
        rehearsal = Rehearsal(section(), TorchDistributedTransport())
        rehearsal.restart(15)
    else:
        rehearsal.restart(15, TorchDistributedTransport)
    with rehearsal:
        return train(rehearsal, 15, 60, rank)


def test_a_rank_that_goes_on_alone_is_not_stopped_alone() -> None:
    assert run_ranks(with_a_rank_that_stays_away, 2, timeout_s=90) == [None, None]


def with_a_rank_that_stays_away() -> str | None:
    rank = dist.get_rank()
    keys = {**section(), "exchange": {"timeout_s": 2, "on_failure": "local"}}
    with Rehearsal(keys) as rehearsal:
        stopped = train(rehearsal, 0, 10, rank)
        if rank == 0 and stopped is None:
            stopped = train(rehearsal, 10, 60, rank)
            assert rehearsal.metrics()["failures"] == 1
        return stopped


# --- what keeps it from watching -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "cure"),
    [
        ({"sampling": {"scope": "local"}}, "set it to 'global'"),
        ({"buffer": {"capacity": 60}, "guard": {"partitions": [0]}}, "rehearsal.buffer.partition_by is missing"),
        ({"guard": {"action": "raise_ratio", "most": 0.2}}, "give a higher one"),
    ],
)
def test_a_guard_that_could_not_watch_or_act_is_refused(keys: dict[str, Any], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        RehearsalConfig.load({**section(), **keys})
