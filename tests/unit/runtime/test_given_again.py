"""A batch that is given again, after a failure anywhere: its rows are stored once, and no replayed row is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import Rehearsal

STEPS, ROWS, RATIO = 120, 8, 0.25

JOBS: dict[str, dict[str, Any]] = {
    "er": {},
    "der": {"strategy": {"name": "der"}},
    "loss": {"buffer": {"capacity": 5000, "policy": "score", "score_by": "loss"}},
    "partitions": {"buffer": {"capacity": 5000, "partition_by": "id"}, "losses_every": 1},
    "replace": {"mode": "replace", "strategy": {"name": "er"}},
    "few": {"candidates": 5},
}


def job(name: str, **keys: Any) -> Rehearsal:
    return Rehearsal({"buffer": {"capacity": 5000, "policy": "fifo"}, "ratio": RATIO, **JOBS[name], **keys})


def batch(number: int, rows: int = ROWS) -> dict[str, Tensor]:
    ids = torch.arange(rows) + 100 * number
    return {"id": ids, "x": ids.float()[:, None]}


def train(rehearsal: Rehearsal, seen: dict[str, Tensor]) -> None:
    rehearsal.loss(lambda outputs: (outputs**2).mean(), seen["x"].clone().requires_grad_())


def stored(rehearsal: Rehearsal) -> list[int]:
    assert rehearsal.buffer is not None
    return sorted(rehearsal.buffer.sample(10**6)["id"].tolist())


@pytest.mark.parametrize("after_loss", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", JOBS)
def test_a_batch_after_a_failed_pass_is_stored_once(name: str, after_loss: bool) -> None:
    seen_rows = 0
    with job(name) as rehearsal:
        for step in range(STEPS):
            seen = rehearsal.augment(batch(step))
            if step % 2:
                if after_loss:
                    train(rehearsal, seen)
                rehearsal.drop()
                again = rehearsal.augment(batch(step))
                assert torch.equal(again["id"], seen["id"]), "the very rows of the pass that failed"
            train(rehearsal, seen)
            seen_rows += len(seen["id"])
            rehearsal.step()
        ids, metrics = stored(rehearsal), rehearsal.metrics()
    assert len(set(ids)) == len(ids)
    assert metrics["rows_offered"] == STEPS * (5 if name == "few" else ROWS) - (
        metrics["rows_displaced"] if name == "der" else 0
    )
    assert metrics["rows_replayed"] == pytest.approx(RATIO * seen_rows, abs=12)


@pytest.mark.parametrize("name", ["er", "der"])
def test_a_batch_can_be_given_again_in_halves(name: str) -> None:
    with job(name) as rehearsal:
        new = replayed = 0
        for step in range(STEPS):
            whole = batch(step)
            parts = [whole]
            if step % 3 == 0:
                rehearsal.augment(whole)
                rehearsal.drop()
                parts = [{key: value[half] for key, value in whole.items()} for half in (slice(4), slice(4, None))]
            for part in parts:
                seen = rehearsal.augment(part)
                train(rehearsal, seen)
                new += len(part["id"])
                replayed += len(seen["id"]) - len(part["id"])
            rehearsal.step()
        assert stored(rehearsal) == sorted(id for step in range(STEPS) for id in batch(step)["id"].tolist())
    assert replayed / (new + replayed) == pytest.approx(RATIO, abs=0.02)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("which", ["replayed", "all"])
def test_an_error_within_augment_leaves_no_trace(error: type[BaseException], which: str) -> None:
    fails = False

    def transform(rows: Any) -> Any:
        if fails:
            raise error("out of something")
        return rows

    config = {"buffer": {"capacity": 5000}, "ratio": RATIO, "strategy": {"name": "er", "transform": which}}
    with Rehearsal(config, transform=transform) as rehearsal, Rehearsal(config, transform=transform) as untouched:
        for step in range(40):
            fails = step > 5
            if fails:
                with pytest.raises(error, match="out of something"):
                    rehearsal.augment(batch(step))
            fails = False
            assert torch.equal(rehearsal.augment(batch(step))["id"], untouched.augment(batch(step))["id"])
            rehearsal.step()
            untouched.step()
        assert stored(rehearsal) == stored(untouched)
        names = ("rows_offered", "rows_replayed", "rows_stored")
        assert [rehearsal.metrics()[name] for name in names] == [untouched.metrics()[name] for name in names]


def test_any_micro_batch_of_a_step_can_be_dropped() -> None:
    with job("er") as rehearsal:
        for step in range(10):
            for micro in range(3):
                rehearsal.augment(batch(3 * step + micro), ahead=True)
            rehearsal.drop()  # the first one
            rehearsal.give_up_step()
            rehearsal.step()
        assert stored(rehearsal) == sorted(
            id for step in range(10) for micro in (1, 2) for id in batch(3 * step + micro)["id"].tolist()
        )


def tokens(number: int) -> dict[str, Tensor]:
    """Four rows, the i-th with i + 1 tokens, of the domains 0 and 1."""
    return {**batch(number, 4), "labels": torch.ones(4, 4).tril().long() * 101 - 100, "domain": torch.arange(4) % 2}


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("partition", [None, "domain"])
@pytest.mark.parametrize("after_loss", [False, True], ids=["forward", "backward"])
def test_totals_count_a_batch_that_is_given_again_once(
    mode: str, partition: str | None, after_loss: bool, caplog: pytest.LogCaptureFixture
) -> None:
    section = {"buffer": {"capacity": 50, "partition_by": partition}, "ratio": RATIO, "mode": mode}
    caplog.set_level("INFO", logger="rehearsal_plugin")
    totals, lines = [], []
    for fails in (False, True):
        with Rehearsal(section) as rehearsal:
            for step in range(30):
                if fails and step % 2:
                    seen = rehearsal.augment(tokens(step))
                    if after_loss:
                        train(rehearsal, seen)
                    rehearsal.drop()
                train(rehearsal, rehearsal.augment(tokens(step)))
                rehearsal.step()
        totals.append({name: value for name, value in rehearsal.metrics().items() if not name.endswith("_ms")})
        lines.append(caplog.messages[-1])
    assert totals[0] == totals[1]
    assert totals[0]["tokens_new"] + 4 * totals[0]["rows_displaced"] == 30 * 10, "the last row makes room"
    assert lines[0] == lines[1]
    assert "rows offered" in lines[0]


def test_a_batch_of_an_earlier_step_is_not_taken_back() -> None:
    with job("er") as rehearsal:
        for step in range(5):
            rehearsal.update(batch(step))
            rehearsal.drop()
        assert len(stored(rehearsal)) == 5 * ROWS
