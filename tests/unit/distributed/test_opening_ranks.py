"""Ranks with different sections are told which keys differ."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal, RehearsalConfig
from rehearsal_plugin.config.differences import MAY_DIFFER, key_digests
from rehearsal_plugin.errors import ExchangeError
from tests.helpers.ranks import run_ranks

SECTION: dict[str, Any] = {"buffer": {"capacity": 50, "partition_by": "label"}, "ratio": 0.25}

OTHERS: dict[str, dict[str, Any]] = {
    "rehearsal.ratio": {"ratio": 0.5},
    "rehearsal.representatives": {"ratio": None, "representatives": 3},
    "rehearsal.buffer.capacity": {"buffer": {"capacity": 51, "partition_by": "label"}},
    "rehearsal.buffer.policy": {"buffer": {"capacity": 50, "partition_by": "label", "policy": "fifo"}},
    "rehearsal.buffer.partition_by": {"buffer": {"capacity": 50}},
    "rehearsal.strategy.name": {"strategy": {"name": "er-ace"}},
    "rehearsal.strategy.alpha": {"strategy": {"alpha": 0.25}},
    "rehearsal.sampling.weights": {"sampling": {"weights": {"0": 1.0}}},
    "rehearsal.mode": {"mode": "replace"},
    "rehearsal.candidates": {"candidates": 3},
    "rehearsal.seed": {"seed": 1},
    "rehearsal.start_step": {"start_step": 4},
    "rehearsal.padding.length": {"padding": {"length": 9, "values": {"x": 0.0}}},
}


def paths_of(section: dict[str, Any]) -> dict[str, int]:
    return key_digests(RehearsalConfig.load(section))


@pytest.mark.parametrize("key", OTHERS)
def test_a_key_with_another_value_has_another_digest(key: str) -> None:
    mine, theirs = paths_of(SECTION), paths_of({**SECTION, **OTHERS[key]})
    assert list(mine) == list(theirs)
    assert key in [path for path in mine if mine[path] != theirs[path]]


def test_paths_and_times_to_wait_may_differ() -> None:
    mmap = {"buffer": {"capacity": 50, "storage": "mmap", "path": "/a", "preload": "/b"}}
    here = {**mmap, "sampling": {"weights": "uniform"}, "exchange": {"timeout_s": 3}}
    there = {"buffer": {**mmap["buffer"], "path": "/c", "preload": "/d"}, "exchange": {"timeout_s": 4}}
    assert paths_of(here) == paths_of(there)
    assert all(key not in paths_of(here) for key in MAY_DIFFER)


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(8, 9), "label": torch.arange(8) % 3}


def told_apart(keys: dict[str, dict[str, Any]]) -> bytes:
    said = []
    for key, other in keys.items():
        mine = SECTION if dist.get_rank() == 0 else {**SECTION, **other}
        rehearsal = Rehearsal({**mine, "exchange": {"timeout_s": 20}})
        start = time.monotonic()
        try:
            for _ in range(3):
                rehearsal.augment(batch())
                rehearsal.pending.clear()
                rehearsal._coordinator.collect()
                rehearsal._coordinator.launch()
            said.append(f"{key}: nothing")
        except ExchangeError as error:
            said.append(f"{key}: {time.monotonic() - start < 10} {error}")
        rehearsal.close(drain_s=0.0)
        dist.barrier()
    return "\n".join(said).encode()


def test_ranks_with_different_sections_are_told_which_keys_differ() -> None:
    for rank, answer in enumerate(run_ranks(told_apart, 2, OTHERS, timeout_s=120)):
        for key, line in zip(OTHERS, answer.decode().split("\n"), strict=True):
            if key == "rehearsal.buffer.capacity":
                assert line == f"{key}: nothing"
                continue
            assert line.startswith(f"{key}: True rank {rank} and rank {1 - rank} have different rehearsal sections")
            assert f"{key} (here " in line, line


def told_apart_alone(other: dict[str, Any]) -> bytes:
    mine = other if dist.get_rank() == 1 else {}
    rehearsal = Rehearsal({**SECTION, **mine, "sampling": {"scope": "local"}})
    said = "nothing"
    try:
        for _ in range(200):  # it comes when it comes: nobody waits
            rehearsal.update(batch())
            time.sleep(0.01)
    except ExchangeError as error:
        said = str(error)
        with pytest.raises(ExchangeError, match="differ in"):
            rehearsal.step()
    rehearsal.close()
    return said.encode()


def test_ranks_that_draw_from_themselves_alone_are_told_apart_too() -> None:
    for rank, answer in enumerate(run_ranks(told_apart_alone, 2, {"ratio": 0.5}, timeout_s=60)):
        start = f"rank {rank} and rank {1 - rank} have different rehearsal sections: they differ in rehearsal.ratio"
        assert answer.decode().startswith(start)
    assert run_ranks(told_apart_alone, 2, {}, timeout_s=60) == [b"nothing"] * 2


def one_never_steps() -> bytes:
    with Rehearsal({**SECTION, "sampling": {"scope": "local"}, "exchange": {"timeout_s": 60}}) as rehearsal:
        start = time.monotonic()
        for _ in range(6 if dist.get_rank() == 0 else 0):
            rehearsal.update(batch())
        return str(time.monotonic() - start < 20).encode()


def test_a_rank_that_draws_from_itself_alone_waits_for_nobody() -> None:
    assert run_ranks(one_never_steps, 2, timeout_s=60) == [b"True"] * 2
