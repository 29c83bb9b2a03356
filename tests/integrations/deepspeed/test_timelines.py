"""A DeepSpeed folder with checkpoints of two runs: the buffer that is loaded is that of the engine's own tag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers.ranks import run_ranks
from tests.helpers.witness import config_of, engine_of, samples

pytest.importorskip("deepspeed")

BLOCK: dict[str, Any] = {"buffer": {"capacity": 500}, "representatives": 2}
FIRST, SECOND = 0, 500


def run_of(folder: Path, first: int, saves: int, every: int, tag: str | None = None) -> None:
    """A run that saves every so many steps."""
    made = engine_of(config_of(BLOCK))
    for step in range(saves * every):
        made.backward(made(**samples(first + step)))
        made.step()
        if (step + 1) % every == 0:
            made.save_checkpoint(str(folder), tag=tag)
    made.destroy()


def loaded(folder: Path, tag: str | None = None) -> tuple[int, int, set[int]]:
    """Steps of the model and of the buffer that an engine loads, and the run that its rows are of."""
    made = engine_of(config_of(BLOCK))
    made.load_checkpoint(str(folder), tag=tag)
    uids = made.rehearsal.rehearsal.buffer.sample(1000)["uid"]
    runs = {FIRST if uid % 8000 < 8 * SECOND else SECOND for uid in uids.tolist()}
    found = made.global_steps, made.rehearsal.rehearsal.steps, runs
    made.destroy()
    return found


def on_ranks(folder: Path) -> dict[str, Any]:
    run_of(folder / "steps", FIRST, 2, 5)
    run_of(folder / "steps", SECOND, 1, 5)  # over global_step5; global_step10 stays
    run_of(folder / "one tag", FIRST, 2, 5, "last")
    run_of(folder / "one tag", SECOND, 1, 4, "last")
    run_of(folder / "beside", FIRST, 2, 6)
    run_of(folder / "beside", SECOND, 2, 4)
    dist.barrier()
    return {
        "latest": loaded(folder / "steps"),
        "named": loaded(folder / "steps", "global_step10"),
        "one tag": loaded(folder / "one tag"),
        "beside": [loaded(folder / "beside", f"global_step{step}") for step in (4, 6, 8, 12)],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_ranks, 2, tmp_path_factory.mktemp("timelines"), timeout_s=200)


def test_the_tag_in_latest_is_of_the_second_run(ranks: list[dict[str, Any]]) -> None:
    assert [rank["latest"] for rank in ranks] == [(5, 5, {SECOND})] * 2


def test_a_tag_of_the_first_run_brings_its_buffer(ranks: list[dict[str, Any]]) -> None:
    assert [rank["named"] for rank in ranks] == [(10, 10, {FIRST})] * 2


def test_a_tag_that_both_used_is_of_the_second_run_at_its_lower_step(ranks: list[dict[str, Any]]) -> None:
    assert [rank["one tag"] for rank in ranks] == [(4, 4, {SECOND})] * 2


def test_checkpoints_of_two_runs_between_each_other(ranks: list[dict[str, Any]]) -> None:
    beside = [(4, 4, {SECOND}), (6, 6, {FIRST}), (8, 8, {SECOND}), (12, 12, {FIRST})]
    assert [rank["beside"] for rank in ranks] == [beside] * 2
