"""A rank that fails before it meets the others."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.errors import ConfigError, ExchangeError
from rehearsal_plugin.strategies import ExperienceReplay, register
from tests.helpers.ranks import run_ranks

SECTION: dict[str, Any] = {"buffer": {"capacity": 50, "partition_by": "label"}, "ratio": 0.25}


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(8, 9), "label": torch.arange(8) % 3}


def one_fails() -> bytes:
    start = time.monotonic()
    bad = {"ratio": 7} if dist.get_rank() == 1 else {}
    try:
        Rehearsal({**SECTION, **bad}).close()
    except (ConfigError, ExchangeError) as error:
        said = f"{type(error).__name__}: {error}"
    waited = time.monotonic() - start
    with Rehearsal(SECTION) as rehearsal:  # the next one, right on all ranks, begins as ever
        for _ in range(4):
            replayed = rehearsal.update(batch())
        assert len(replayed["x"]) > 8
    return f"{waited < 10} {said}".encode()


def test_a_rank_that_fails_before_the_first_exchange_is_heard_at_once() -> None:
    other, failed, third = (answer.decode() for answer in run_ranks(one_fails, 3, timeout_s=60))
    assert failed.startswith("True ConfigError: rehearsal.ratio must be less than 1")
    assert other.startswith(
        "True ExchangeError: rank 1 failed before its first exchange with ConfigError: rehearsal.ratio"
    )
    assert third == other


class Broken(ExperienceReplay):
    """Fails on one rank, as for want of a file there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if dist.get_rank() == 1:
            raise FileNotFoundError("teacher.pt")


def one_fails_by_an_error_of_its_own() -> bytes:
    register("broken")(Broken)
    start = time.monotonic()
    try:
        Rehearsal({**SECTION, "strategy": {"name": "broken"}})
    except (FileNotFoundError, ExchangeError) as error:
        return f"{time.monotonic() - start < 10} {type(error).__name__}: {error}".encode()
    return b"no error"


def test_an_error_of_any_kind_is_heard() -> None:
    other, failed = (answer.decode() for answer in run_ranks(one_fails_by_an_error_of_its_own, 2, timeout_s=60))
    assert failed == "True FileNotFoundError: teacher.pt"
    assert other.startswith("True ExchangeError: rank 1 failed before its first exchange with FileNotFoundError")
