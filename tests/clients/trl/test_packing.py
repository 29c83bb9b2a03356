"""`trl sft` with batches without padding: one flat row, of which every document is a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from tests.clients.trl.commands import command, deepspeed_ranks, plain_ranks
from tests.helpers.clients.claims import assert_evaluation_untouched, assert_replay, assert_same_from, samples_of
from tests.helpers.clients.runs import Run, run_client, section_file

pytestmark = pytest.mark.clients

BFD = ["--packing"]  # its default strategy
PADDING_FREE = ["--padding_free", "True", "--max_length", "none"]
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]


def both_runs(tiny: Path, folder: Path, options: Sequence[object], **keys: Any) -> tuple[Run, Run]:
    """A job without the plugin and with it."""
    given = command("sft", tiny / "text", tiny / "model", options)
    section = section_file(folder, **keys)
    plain, replayed = (
        run_client([*given, "--output_dir", folder / name], folder / f"{name}_run", section=with_it, may_abort=True)
        for name, with_it in (("plain", None), ("replayed", section))
    )
    return plain, replayed


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        pytest.param(BFD, 1, id="bfd"),
        pytest.param(PADDING_FREE, 1, id="padding-free"),
        pytest.param([*BFD, *LORA, "--gradient_accumulation_steps", "2"], 2, id="bfd, LoRA, accumulation"),
    ],
)
def test_documents_are_replayed_in_the_workers(tiny: Path, tmp_path: Path, options: list[str], passes: int) -> None:
    plain, replayed = both_runs(tiny, tmp_path, [*plain_ranks(), *options])
    assert all(len(batch["input_ids"]) == 1 for batch in replayed.ranks[0]["train"])
    assert_replay(plain, replayed, passes=passes)


def test_documents_take_the_places_of_new_ones(tiny: Path, tmp_path: Path) -> None:
    assert_replay(*both_runs(tiny, tmp_path, [*plain_ranks(), *BFD], mode="replace"), displaces=True)


def test_documents_are_replayed_under_deepspeed(tiny: Path, tmp_path: Path) -> None:
    assert_replay(*both_runs(tiny, tmp_path, [*deepspeed_ranks(tmp_path, 2), *BFD]))


def test_a_ratio_in_tokens_is_met(tiny: Path, tmp_path: Path) -> None:
    keys = {"ratio": 0.25, "ratio_in": "tokens", "representatives": None}
    plain, replayed = both_runs(tiny, tmp_path, [*plain_ranks(), *BFD, "--max_steps", "24"], **keys)
    for rank in range(2):
        old, new = samples_of(plain, rank, 1), samples_of(replayed, rank, 1)
        assert [batch[: len(fresh)] for fresh, batch in zip(old, new, strict=True)] == old
        tokens = [sum(len(document) for (document,) in batch) for batches in (old, new) for batch in batches[6:]]
        fresh_tokens, all_tokens = sum(tokens[: len(tokens) // 2]), sum(tokens[len(tokens) // 2 :])
        assert 1 - fresh_tokens / all_tokens == pytest.approx(0.25, abs=0.03)
    assert_evaluation_untouched(plain, replayed)


def test_a_resumed_run_goes_on_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    saves = ["--save_strategy", "steps", "--save_steps", "5"]
    given = command("sft", tiny / "text", tiny / "model", [*plain_ranks(), *BFD, *saves])
    section = section_file(tmp_path)
    whole = run_client([*given, "--output_dir", tmp_path / "out"], tmp_path / "whole", section=section)
    checkpoint = tmp_path / "out" / "checkpoint-5"
    again = [*given, "--output_dir", tmp_path / "again", "--resume_from_checkpoint", checkpoint]
    assert_same_from(whole, run_client(again, tmp_path / "resumed", section=section), 5)
