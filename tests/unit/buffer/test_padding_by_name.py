"""`padding` without `length` or `values`: what the names and the first batch tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import BatchError, ConfigError
from tests.helpers.ranks import run_ranks

PAD = 7


def batch(step: int, mask: bool = True) -> dict[str, Tensor]:
    """Three texts, the first of `2 + step % 4` tokens, all of them `100 + step`."""
    lengths = [2 + step % 4, 1, 3]
    width = max(lengths)
    inside = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.where(inside, 100 + step, PAD)
    fields = {"input_ids": tokens, "labels": torch.where(inside, tokens, -100), "kind": torch.arange(3)}
    return {**fields, "attention_mask": inside.long()} if mask else fields


def job(padding: dict[str, Any], **section: Any) -> Rehearsal:
    return Rehearsal(
        {"buffer": {"capacity": 40}, "representatives": 2, "padding": padding, **section}, LocalTransport()
    )


def texts(seen: dict[str, Tensor]) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, labels and mask of each row without the padding of the batch."""
    return [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist(), ids[~mask.bool()].tolist())
        for ids, labels, mask in zip(seen["input_ids"], seen["labels"], seen["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("padding", [{}, {"token_id": PAD}, {"length": 9}])
def test_an_empty_section_pads_text(padding: dict[str, Any]) -> None:
    with job(padding) as rehearsal:
        for step in range(12):
            seen = rehearsal.update(batch(step))
            for tokens, labels, filling in texts(seen):
                assert tokens == labels
                assert len(set(tokens)) == 1
                assert set(filling) <= {PAD, padding.get("token_id", 0)}
        assert seen["input_ids"].shape[0] == 5
        assert seen["input_ids"].shape[1] <= 5
        assert rehearsal.padding is not None
        assert rehearsal.padding.length == padding.get("length", 1 << 15)


def test_a_job_goes_on_with_the_length_of_its_checkpoint(tmp_path: Path) -> None:
    def wide(step: int) -> dict[str, Tensor]:
        return {name: leaf.repeat(1, 8000) if leaf.ndim == 2 else leaf for name, leaf in batch(step).items()}

    with job({}) as first:
        for step in range(3, 9):  # 40,000 positions in the first batch, so up to 262,144
            first.update(wide(step))
        assert first.padding is not None
        assert first.padding.length == 1 << 18
        first.save(tmp_path)
        expected = [first.update(batch(step))["input_ids"] for step in range(6)]
    with job({}) as second:
        second.load(tmp_path)
        again = [second.update(batch(step))["input_ids"] for step in range(6)]
        assert second.padding is not None
        assert second.padding.length == 1 << 18
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


def first_batches_of_two_widths() -> tuple[int, list[list[int]]]:
    """A rank whose first batch is shorter than a quarter of its later ones, and of those of the other rank."""
    import torch.distributed as dist

    rank, replayed = dist.get_rank(), []
    with Rehearsal({"buffer": {"capacity": 40}, "representatives": 2, "padding": {}}) as rehearsal:
        for width in ([900, 1100][rank], 9000, 300, 5000, 20_000, 40, 7):
            tokens = torch.full((2, width), width + rank)
            seen = rehearsal.update({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
            replayed += [ids[mask.bool()] for ids, mask in zip(seen["input_ids"], seen["attention_mask"], strict=True)]
    return rank, [[len(ids), *set(ids.tolist())] for ids in replayed]


def test_first_batches_of_ranks_may_differ_in_width_and_later_ones_be_wider() -> None:
    for _, replayed in run_ranks(first_batches_of_two_widths, 2, timeout_s=60):
        assert len(replayed) == 7 * 2 + 5 * 2
        for length, *tokens in replayed:
            assert len(tokens) == 1
            assert length in {tokens[0], tokens[0] - 1}


def test_without_a_mask_the_padding_of_tokens_has_to_be_said() -> None:
    with job({}) as rehearsal, pytest.raises(BatchError, match=r"no 'attention_mask'.*token_id"):
        rehearsal.update(batch(0, mask=False))
    with job({"token_id": PAD}) as rehearsal:
        for step in range(6):
            seen = rehearsal.update(batch(step, mask=False))
        assert set(seen["input_ids"][seen["labels"] == -100].tolist()) <= {PAD}


def test_fields_that_are_not_stored_are_not_padded() -> None:
    stored = ["input_ids", "labels"]
    with job({"token_id": PAD}, fields=stored) as rehearsal:
        for step in range(6):
            seen = rehearsal.update(batch(step))
        assert seen["attention_mask"].shape[0] == 3
        assert seen["input_ids"].shape[0] == seen["labels"].shape[0] == 5
        assert rehearsal.padding is not None
        assert sorted(rehearsal.padding.values) == stored
    with job({}, fields=stored) as rehearsal, pytest.raises(BatchError, match=r"no 'attention_mask'.*token_id"):
        rehearsal.update(batch(0))


def test_padded_fields_that_are_not_stored_are_refused_by_name() -> None:
    values = {"input_ids": 0, "labels": -100}
    with pytest.raises(ConfigError, match=r"padding\.values names \['labels'\], which rehearsal\.fields leaves out"):
        job({"values": values}, fields=["input_ids"])
    job({"values": values}, fields=["input_ids", "labels", "kind"]).close()


def test_what_is_no_text_is_told_to_name_its_fields() -> None:
    with job({}) as rehearsal, pytest.raises(BatchError, match=r"values is left out, and the batch has no 'input_ids'"):
        rehearsal.update({"x": torch.zeros(3, 4)})


def test_a_token_beside_values_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"token_id has no use beside rehearsal\.padding\.values"):
        job({"token_id": 3, "values": {"input_ids": 0}})
