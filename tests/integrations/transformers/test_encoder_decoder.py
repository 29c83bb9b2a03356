"""The Hugging Face Trainer with an encoder-decoder model: inputs and labels have lengths of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from rehearsal_plugin import RehearsalCallback
from tests.helpers.trainer_jobs import BatchRecorder

WORDS, PAD, SIZE = 60, 0, 4
Example = dict[str, list[int]]


def examples(count: int = 120) -> list[Example]:
    """Inputs and labels of different lengths, which the first token tells."""
    return [
        {
            "input_ids": [3 + number % 50, *range(3, 4 + number * 5 % 17), 1],
            "labels": [3 + number % 50, *range(20, 20 + number * 3 % 11), 1],
        }
        for number in range(count)
    ]


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w2"))
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=words, pad_token="w0", eos_token="w1", model_max_length=64)


def network() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    sizes |= {"vocab_size": WORDS, "dropout_rate": 0.0, "decoder_start_token_id": PAD}
    kind: Any = T5ForConditionalGeneration
    return kind(T5Config(**sizes))


def batches_of(folder: Path, section: dict[str, Any] | None, *, with_decoder_inputs: bool) -> list[dict[str, Tensor]]:
    """What the model saw in ten steps."""
    model = network()
    data: Any = examples()
    recorder = BatchRecorder(model)
    collator = DataCollatorForSeq2Seq(tokenizer(), model=model if with_decoder_inputs else None)
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    settings = TrainingArguments(str(folder), max_steps=10, per_device_train_batch_size=SIZE, **quiet)
    callbacks = [recorder, *([] if section is None else [RehearsalCallback(section)])]
    Trainer(model, settings, train_dataset=data, data_collator=collator, callbacks=callbacks).train()
    return recorder.batches


def rows(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each row without padding, of which the fields of the decoder are held to be right."""
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())
    if "decoder_input_ids" in batch:
        shifted = batch["labels"].masked_fill(batch["labels"] == -100, PAD).roll(1, 1)
        shifted[:, 0] = PAD
        assert torch.equal(batch["decoder_input_ids"], shifted)
    return [
        (ids[ids != PAD].tolist(), labels[labels != -100].tolist())
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


@pytest.mark.parametrize("with_decoder_inputs", [False, True])
def test_inputs_and_labels_are_replayed_at_lengths_of_their_own(with_decoder_inputs: bool, tmp_path: Path) -> None:
    section = {"buffer": {"capacity": 60}, "representatives": 2}
    plain = batches_of(tmp_path / "plain", None, with_decoder_inputs=with_decoder_inputs)
    replayed = batches_of(tmp_path / "replayed", section, with_decoder_inputs=with_decoder_inputs)
    known = [(one["input_ids"], one["labels"]) for one in examples()]
    for step, (without, batch) in enumerate(zip(plain, replayed, strict=True)):
        fresh, joined = rows(without), rows(batch)
        assert joined[:SIZE] == fresh
        assert len(joined) == SIZE + (2 if step >= 3 else 0)
        assert all(row in known for row in joined)
        longest = [max(map(len, column)) for column in zip(*joined, strict=True)]
        assert batch["input_ids"].shape[1] == longest[0]
        assert batch["labels"].shape[1] - longest[1] in ((0, 1) if with_decoder_inputs else (0,))
