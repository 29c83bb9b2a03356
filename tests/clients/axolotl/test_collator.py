"""The flat rows of axolotl's own collator, which it fills up to a length."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl")

from transformers import AutoTokenizer

from rehearsal_plugin import LocalTransport, Rehearsal

pytestmark = pytest.mark.clients

collators = importlib.import_module("axolotl.utils.collators.batching")
LENGTHS, WIDTH, STEPS = (5, 9, 3), 32, 6


def documents(step: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    rows = [torch.randint(5, 50, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": list(row), "position_ids": list(range(len(row)))} for row in rows]


def test_what_the_collator_fills_up_is_no_sample(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    collate = collators.V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=WIDTH)
    with Rehearsal({"buffer": {"capacity": 64}, "representatives": 2}, LocalTransport()) as rehearsal:
        for step in range(STEPS):
            batch = dict(collate([documents(step)]))
            assert batch["input_ids"].shape == (1, WIDTH)
            seen = rehearsal.update(batch)
        assert rehearsal.metrics()["rows_offered"] == STEPS * len(LENGTHS)
    new = sum(LENGTHS)
    assert seen["input_ids"][0, :new].tolist() == batch["input_ids"][0, :new].tolist()
    starts = (seen["position_ids"][0] == 0).nonzero().reshape(-1).tolist()
    assert len(starts) == len(LENGTHS) + 2
    assert (seen["labels"] != -100).all()
