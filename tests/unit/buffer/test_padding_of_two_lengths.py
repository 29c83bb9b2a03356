"""Padded fields that differ in length: each gets as wide as its longest row needs."""

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
from tests.helpers.padded_rows import EOS, LONGEST, VALUES, Batch, new_batch, number_of, numbers, row

SECTION: dict[str, Any] = {"buffer": {"capacity": 200}, "representatives": 4}


def pair(number: int) -> Batch:
    """A row of two sequences, each of a length of its own."""
    chosen, rejected = row(number), row(number + 3)
    return {**{f"chosen_{n}": v for n, v in chosen.items()}, **{f"rejected_{n}": v for n, v in rejected.items()}}


PAIR_VALUES = {f"{part}_{name}": value for part in ("chosen", "rejected") for name, value in VALUES.items()}


def collate_pairs(numbers: range) -> Batch:
    rows = [pair(number) for number in numbers]
    return {
        name: torch.nn.utils.rnn.pad_sequence([one[name] for one in rows], batch_first=True, padding_value=value)
        for name, value in PAIR_VALUES.items()
    }


def whole_pairs(batch: Batch) -> list[int]:
    """The numbers of the pairs of a batch; each sequence is as wide as its longest needs, in all its fields."""
    numbers = [number_of(ids) for ids in batch["chosen_input_ids"]]
    expected = {
        name: torch.nn.utils.rnn.pad_sequence(
            [pair(number)[name] for number in numbers], batch_first=True, padding_value=value
        )
        for name, value in PAIR_VALUES.items()
    }
    widths = {part: expected[f"{part}_labels"].shape[1] for part in ("chosen", "rejected")}
    for name in PAIR_VALUES:
        width = widths[name.partition("_")[0]]
        assert torch.equal(batch[name][:, :width], expected[name])
        assert (batch[name][:, width:] == PAIR_VALUES[name]).all()
        assert batch[name].shape == batch[f"{name.partition('_')[0]}_labels"].shape
    return numbers


@pytest.mark.parametrize("storage", ["memory", "mmap"])
@pytest.mark.parametrize("section", [{"length": LONGEST, "values": PAIR_VALUES}, {"token_id": EOS}])
def test_fields_of_two_lengths_come_back_at_lengths_of_their_own(
    section: dict[str, Any], storage: str, tmp_path: Any
) -> None:
    buffer = {"capacity": 50, "storage": storage, **({"path": str(tmp_path)} if storage == "mmap" else {})}
    own_widths = replayed = 0
    with Rehearsal({**SECTION, "buffer": buffer, "padding": section}, LocalTransport()) as rehearsal:
        for step in range(40):
            batch = rehearsal.update(collate_pairs(numbers(step, 3)))
            own_widths += batch["chosen_labels"].shape != batch["rejected_labels"].shape
            replayed += len(whole_pairs(batch)) - 3
    assert own_widths > 10
    assert replayed > 100


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_loader_gives_fields_of_two_lengths(mode: str) -> None:
    section = {**SECTION, "padding": {"token_id": EOS}, "mode": mode, "inject": "loader", "representatives": 2}
    seen = list[int]()
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for batch in RehearsalLoader([collate_pairs(numbers(step)) for step in range(12)], rehearsal):
            seen += whole_pairs(batch)
            rehearsal.step()
    assert set(seen) == {number for step in range(12) for number in numbers(step)}
    assert len(seen) > 12 * 6


def test_a_row_of_two_sequences_counts_as_long_as_the_longer() -> None:
    both = Padding(PaddingConfig.model_validate({"length": LONGEST, "values": PAIR_VALUES}))
    batch = collate_pairs(range(5))
    longer = [max(len(one["chosen_labels"]), len(one["rejected_labels"])) for one in map(pair, range(5))]
    assert both.lengths(batch).tolist() == both.lengths(both.widen(batch)).tolist() == longer


def test_labels_of_their_own_length_are_found_by_name() -> None:
    """As `DataCollatorForSeq2Seq` gives them for an encoder-decoder model."""
    both = Padding(PaddingConfig(length=LONGEST, token_id=EOS))
    batch = {**new_batch(0), "labels": new_batch(0)["labels"][:, :4], "classes": torch.zeros(6, 3)}
    wide = both.widen(batch)
    assert {name: wide[name].shape[1] for name in batch} == {**dict.fromkeys(VALUES, LONGEST), "classes": 3}


def test_scores_called_labels_are_no_sequence() -> None:
    both = Padding(PaddingConfig(length=LONGEST, token_id=EOS))
    assert both.widen({**new_batch(0), "labels": torch.zeros(6, 5)})["labels"].shape == (6, 5)


def test_the_longest_field_is_held_to_the_length() -> None:
    padding = Padding(PaddingConfig.model_validate({"length": LONGEST, "values": VALUES}))
    with pytest.raises(BatchError, match=r"have 30 positions, and rehearsal.padding.length is 24"):
        padding.widen({**new_batch(0), "labels": torch.zeros(6, 30, dtype=torch.int64)})


def test_tokens_without_a_mask_are_refused_by_name() -> None:
    batch = {**new_batch(0), "decoder_input_ids": torch.ones(6, 3, dtype=torch.int64)}
    with pytest.raises(BatchError, match=r"no 'decoder_attention_mask', so the padding of 'decoder_input_ids' counts"):
        Padding(PaddingConfig(length=LONGEST)).widen(batch)
