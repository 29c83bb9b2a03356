"""Rows of different length: what is stored, what comes back, and how much of it is tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.buffer.rows.padding import Padding
from rehearsal_plugin.config import PaddingConfig
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.integrations.inject.loader import RehearsalLoader
from tests.helpers.padded_rows import EOS, IGNORED, LONGEST, VALUES, Batch, collate, new_batch, number_of, numbers, row
from tests.helpers.ranks import run_ranks

SECTION: dict[str, Any] = {
    "buffer": {"capacity": 200},
    "padding": {"length": LONGEST, "values": VALUES},
    "representatives": 4,
}


def whole(batch: Batch) -> list[int]:
    """The numbers of the rows of a batch, each of which is as it was made, and padded behind."""
    found = []
    for i, ids in enumerate(batch["input_ids"]):
        number = number_of(ids)
        made = row(number)
        for name, value in VALUES.items():
            length = len(made[name])
            assert torch.equal(batch[name][i, :length], made[name])
            assert (batch[name][i, length:] == value).all()
        found.append(number)
    return found


def longest(found: list[int]) -> int:
    return max(len(row(number)["input_ids"]) for number in found)


def padding(length: int = LONGEST) -> Padding:
    return Padding(PaddingConfig.model_validate({"length": length, "values": VALUES}))


# --- the lengths -----------------------------------------------------------------------------------------------------


def test_a_row_ends_behind_the_last_position_that_counts_in_any_field() -> None:
    batch = new_batch(0)
    assert padding().lengths(batch).tolist() == [len(row(number)["input_ids"]) for number in numbers(0)]


def test_padding_inside_a_row_is_part_of_it() -> None:
    batch = new_batch(0, 1)
    batch["input_ids"][0, 1], batch["attention_mask"][0, 1], batch["labels"][0, 1] = EOS, 0, IGNORED
    assert padding().lengths(batch).tolist() == [batch["input_ids"].shape[1]]


def test_rows_of_padding_alone_have_no_length() -> None:
    assert padding().lengths(padding().widen(collate([{n: v[:0] for n, v in row(0).items()}]))).tolist() == [0]


def test_wide_and_narrow_again_is_the_same() -> None:
    batch = new_batch(3)
    wide = padding().widen(batch)
    assert {name: tuple(field.shape) for name, field in zip(wide.names, wide.leaves, strict=True)} == dict.fromkeys(
        VALUES, (6, LONGEST)
    )
    assert all(torch.equal(padding().narrow(wide)[name], batch[name]) for name in VALUES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floating_fields_of_several_dimensions_are_padded_too(dtype: torch.dtype) -> None:
    both = Padding(PaddingConfig.model_validate({"length": 5, "values": {"sound": -1.5}}))
    batch = {"sound": torch.ones(2, 3, 4, dtype=dtype), "label": torch.tensor([1, 2])}
    wide = both.widen(batch)
    assert wide["sound"].shape == (2, 5, 4)
    assert (wide["sound"][:, 3:] == -1.5).all()
    assert wide["sound"].dtype == dtype
    assert both.lengths(wide).tolist() == [3, 3]
    assert wide["label"] is batch["label"]


# --- in a job --------------------------------------------------------------------------------------------------------


def replaying(steps: int = 30, rank: int = 0, **keys: Any) -> list[tuple[Batch, int]]:
    """What the model sees, and how many rows of it are new."""
    seen = []
    with Rehearsal({**SECTION, **keys}, None if rank or keys.get("seed") else LocalTransport()) as rehearsal:
        for step in range(steps):
            size = 3 + step % 4
            seen.append((rehearsal.update(new_batch(step, size, rank)), size))
    return seen


def test_rows_come_back_as_they_were_at_the_length_of_the_longest() -> None:
    replayed = 0
    for batch, size in replaying():
        found = whole(batch)
        replayed += len(found) - size
        assert batch["input_ids"].shape[1] == longest(found)
    assert replayed == 3 + 4 * 27, "all that there were, then as many as asked for"


def test_replace_keeps_the_rows_that_stay() -> None:
    for batch, size in replaying(mode="replace", representatives=2):
        assert len(whole(batch)) == size


def on_ranks() -> list[list[int]]:
    import torch.distributed as dist

    return [whole(batch)[size:] for batch, size in replaying(12, dist.get_rank(), seed=1)]


def test_rows_of_other_ranks_have_lengths_of_their_own() -> None:
    for replayed in run_ranks(on_ranks, 2, timeout_s=60):
        assert {number // 1000 for one in replayed for number in one} == {0, 1}


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_loader_gives_rows_of_different_length(mode: str) -> None:
    section = {**SECTION, "mode": mode, "inject": "loader", "representatives": 2}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        seen = []
        for batch in RehearsalLoader([new_batch(step) for step in range(12)], rehearsal):
            found = whole(batch)
            assert batch["input_ids"].shape[1] == longest(found)
            seen += found
            rehearsal.step()
    assert set(seen) == {number for step in range(12) for number in numbers(step)}
    assert len(seen) > 12 * 6


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5])
def test_a_ratio_in_tokens_is_met_over_time(mode: str, ratio: float) -> None:
    """New rows are short at first and long later; those replayed are of any length."""
    section = {**SECTION, "mode": mode, "ratio": ratio, "ratio_in": "tokens", "representatives": None}
    new, replayed, before = 0, 0, 0.0
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for step in range(900):
            short = step < 400
            rows = sorted((row(number) for number in numbers(step, 24)), key=lambda one: len(one["input_ids"]))
            batch = rehearsal.update(collate(rows[:12] if short else rows[12:]))
            lengths = padding().lengths(batch)
            own = len(lengths) - int(rehearsal.metrics()["rows_replayed"] - before)
            before = rehearsal.metrics()["rows_replayed"]
            new += int(lengths[:own].sum())
            replayed += int(lengths[own:].sum())
    assert replayed / (new + replayed) == pytest.approx(ratio, rel=0.01)


def test_a_job_with_a_ratio_in_tokens_goes_on_bit_for_bit(tmp_path: Any) -> None:
    section = {**SECTION, "ratio": 0.3, "ratio_in": "tokens", "representatives": None}
    with Rehearsal(section, LocalTransport()) as whole_job:
        expected = [whole_job.update(new_batch(step)) for step in range(30)]
    with Rehearsal(section, LocalTransport()) as first:
        for step in range(12):
            first.update(new_batch(step))
        first.save(tmp_path)
    with Rehearsal(section, LocalTransport()) as second:
        second.load(tmp_path)
        rest = [second.update(new_batch(step)) for step in range(12, 30)]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(expected[12:], rest, strict=True) for n in VALUES)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_too_long_is_refused_with_the_cure() -> None:
    with pytest.raises(BatchError, match=r"have 17 positions, and rehearsal.padding.length is 16; raise it"):
        padding(16).widen(collate([row(2)]))


def test_a_batch_that_is_wide_by_its_padding_alone_is_taken() -> None:
    batch = collate([row(2)])  # of 17 positions
    wider = padding(64).widen(batch)
    assert all(torch.equal(padding(17).widen(wider)[name], batch[name]) for name in VALUES)
    with pytest.raises(BatchError, match="have 17 positions"):
        padding(16).widen(wider)


def test_a_field_that_is_not_there_is_refused() -> None:
    batch = new_batch(0)
    del batch["labels"]
    with pytest.raises(BatchError, match=r"names 'labels', which has no length.*\['attention_mask', 'input_ids'\]"):
        padding().widen(batch)


def test_a_field_without_a_length_is_refused() -> None:
    with pytest.raises(BatchError, match=r"names 'labels', which has no length: the batch has shape \(6,\)"):
        padding().widen({**new_batch(0), "labels": torch.zeros(6)})


@pytest.mark.parametrize("full_batches", [0, 3])
def test_rows_that_are_padded_before_are_refused(full_batches: int) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    words = r"rows of 'attention_mask' begin with padding.*padding_side to 'right'"
    section = {**SECTION, "padding": {"length": LONGEST}}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for _ in range(full_batches):
            rehearsal.update({"input_ids": torch.full((2, 4), 5), "attention_mask": torch.ones_like(mask)})
        with pytest.raises(BatchError, match=words):
            rehearsal.update({"input_ids": 5 * mask, "attention_mask": mask})


@pytest.mark.parametrize(("padding", "token"), [(-1e4, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_masks_of_any_kind_are_judged_by_their_own_padding(padding: float, token: float) -> None:
    before = torch.tensor([[padding, token, token], [token, token, token]])
    values = {"input_ids": 0.0, "attention_mask": padding}
    for mask in (before, before.flip(1)):
        section = {**SECTION, "padding": {"length": LONGEST, "values": values}}
        batch = {"input_ids": torch.full((2, 3), 5), "attention_mask": mask}
        with Rehearsal(section, LocalTransport()) as rehearsal:
            if mask is before:
                with pytest.raises(BatchError, match="begin with padding"):
                    rehearsal.update(batch)
            else:
                rehearsal.update(batch)


def test_a_mask_of_global_attention_is_no_padding() -> None:
    section = {**SECTION, "padding": {"length": LONGEST, "values": {"input_ids": 0, "global_attention_mask": 0}}}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        rehearsal.update({"input_ids": torch.full((1, 3), 5), "global_attention_mask": torch.tensor([[0, 0, 1]])})
