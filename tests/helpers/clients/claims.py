"""What every trainer is held to: new rows stay, rows of training are replayed, evaluation is untouched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.helpers.clients.runs import LEAD, REPLAYED, Run

__all__ = ["assert_bit_for_bit", "assert_evaluation_untouched", "assert_replay", "assert_same_from"]

Row = tuple[int, ...]


def assert_replay(plain: Run, replayed: Run, parts: int = 1, passes: int = 1, displaces: bool = False) -> None:
    """Hold a run to the rows of one without the plugin, and to the share.

    Args:
        plain: Run without the plugin.
        replayed: The same run with it.
        parts: Rows of a sample: each part stands together, as `[chosen x n; rejected x n]` for 2.
        passes: Micro-batches of a step.
        displaces: Replayed rows take the places of new ones.
    """
    ranks = range(len(plain.ranks))
    offered = {sample for rank in ranks for batch in samples_of(plain, rank, parts) for sample in batch}
    for rank in ranks:
        old, new = samples_of(plain, rank, parts), samples_of(replayed, rank, parts)
        assert len(old) == len(new)
        for place, (without, batch) in enumerate(zip(old, new, strict=True)):
            added = REPLAYED if place >= LEAD * passes else 0
            assert len(batch) == len(without) + (0 if displaces else added), place
            fresh = batch[: len(batch) - added]
            assert fresh == without[: len(fresh)], place
            assert offered.issuperset(batch[len(fresh) :]), place
    assert_evaluation_untouched(plain, replayed)
    assert_tokens_counted(plain, replayed, passes)


def samples_of(run: Run, rank: int, parts: int) -> list[list[tuple[Row, ...]]]:
    """The samples of each micro-batch, each with its parts."""
    return [_samples(rows, parts) for rows in run.rows(rank)]


def _samples(rows: Sequence[Row], parts: int) -> list[tuple[Row, ...]]:
    count = len(rows) // parts
    assert count * parts == len(rows)
    return list(zip(*(rows[part * count : (part + 1) * count] for part in range(parts)), strict=True))


def assert_evaluation_untouched(plain: Run, replayed: Run) -> None:
    """The rows of the evaluations are the same, and so is the loss before the first step."""
    for rank in range(len(plain.ranks)):
        assert plain.rows(rank, "evaluation") == replayed.rows(rank, "evaluation") != []
    before = [run.ranks[0]["logs"][0]["eval_loss"] for run in (plain, replayed)]
    assert before[0] == before[1]


def assert_tokens_counted(plain: Run, replayed: Run, passes: int) -> None:
    """The Trainer divides by the labelled tokens of the rows of all ranks, replayed ones among them."""
    if None in plain.ranks[0]["items"]:
        return
    shift = next((shift for shift in (0, 1) if _labelled(plain, shift, passes) == plain.ranks[0]["items"]), None)
    assert shift is not None
    assert all(note["items"] == _labelled(replayed, shift, passes) for note in replayed.ranks)


def _labelled(run: Run, shift: int, passes: int) -> list[int]:
    """Labelled tokens of the step of each micro-batch, of the rows of all ranks."""
    by_rank = [[int((b["labels"][:, shift:] != -100).sum()) for b in note["train"]] for note in run.ranks]
    together = [sum(batches) for batches in zip(*by_rank, strict=True)]
    steps = [sum(together[first : first + passes]) for first in range(0, len(together), passes)]
    return [step for step in steps for _ in range(passes)]


def assert_same_from(whole: Run, resumed: Run, step: int) -> None:
    """A run that was resumed after a step trains on the same batches, to the same weights, bit for bit."""
    for full, rest in zip(whole.ranks, resumed.ranks, strict=True):
        assert_bit_for_bit(full["train"][step:], rest["train"])
        assert full["loss"][step:] == rest["loss"]
        assert_bit_for_bit([full["weights"]], [rest["weights"]])


def assert_bit_for_bit(left: Sequence[dict[str, torch.Tensor]], right: Sequence[dict[str, torch.Tensor]]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
