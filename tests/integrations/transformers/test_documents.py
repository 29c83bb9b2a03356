"""The Hugging Face Trainer without padding, and with collators that pad: a buffer and a ratio are enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.errors import BatchError
from tests.helpers.ranks import run_ranks

SECTION: dict[str, Any] = {"buffer": {"capacity": 60}, "ratio": 0.3, "exchange": {"timeout_s": 60}}
STEPS, EXAMPLES, WORDS = 12, 4, 90
Texts = list[dict[str, list[int]]]


def texts(count: int = 200, seed: int = 0) -> Texts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, WORDS, int(length)).tolist() for length in rng.integers(2, 24, count)]
    return [{"input_ids": one, "labels": list(one)} for one in ids]


def llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    way: dict[str, Any] = {"attn_implementation": attention}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes, **heads, **way))


class Seen(TrainerCallback):
    """Notes each batch that the model trains on, its loss, and the loss of its documents one by one."""

    def __init__(self, model: LlamaForCausalLM, one_by_one: bool = True) -> None:
        self.batches: list[dict[str, Any]] = []
        self.losses: list[tuple[float, float]] = []
        self._one_by_one = one_by_one
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: Any, _: Any, inputs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        self.batches.append({name: leaf.clone() if isinstance(leaf, Tensor) else leaf for name, leaf in inputs.items()})
        if self._one_by_one:
            given = {name: leaf for name, leaf in inputs.items() if name != "num_items_in_batch"}
            with torch.no_grad():
                self.losses.append((float(model(**given).loss), alone(model, inputs)))


def documents(batch: dict[str, Any]) -> list[Tensor]:
    """Tokens of each document of a flat row."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [batch["input_ids"][0, start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def alone(model: Any, batch: dict[str, Any]) -> float:
    """The mean loss of a batch's tokens when each document is given by itself."""
    losses = [(model(input_ids=one[None], labels=one[None]).loss, len(one) - 1) for one in documents(batch)]
    return float(sum(loss * tokens for loss, tokens in losses if tokens) / sum(tokens for _, tokens in losses))


def arguments(folder: Path, **keys: Any) -> TrainingArguments:
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": EXAMPLES, "use_cpu": True}
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    return TrainingArguments(str(folder), **settings, **quiet, **keys)


def job(
    folder: Path,
    collator: Any,
    section: dict[str, Any],
    attention: str = "sdpa",
    examples: Texts | None = None,
    **keys: Any,
) -> tuple[Trainer, Seen, RehearsalCallback]:
    model, callback = llama(attention), RehearsalCallback(section)
    seen = Seen(model, one_by_one=isinstance(collator, DataCollatorWithFlattening))
    rows: Any = examples or texts()
    trainer = Trainer(
        model, arguments(folder, **keys), train_dataset=rows, data_collator=collator, callbacks=[seen, callback]
    )
    trainer.train()
    return trainer, seen, callback


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize(("attention", "flash"), [("sdpa", False), ("eager", False), ("sdpa", True)])
def test_the_loss_is_that_of_the_documents_alone(attention: str, flash: bool, mode: str, tmp_path: Path) -> None:
    flatten: Any = DataCollatorWithFlattening
    collator = flatten(return_flash_attn_kwargs=flash, return_seq_idx=flash)
    _, seen, callback = job(tmp_path, collator, {**SECTION, "mode": mode}, attention)
    assert callback.rehearsal is not None
    replayed = callback.rehearsal.metrics()["rows_replayed"]
    callback.close()
    for whole, one_by_one in seen.losses:
        assert whole == pytest.approx(one_by_one, abs=2e-6)
    counts = [len(documents(batch)) for batch in seen.batches]
    expected = STEPS * EXAMPLES if mode == "replace" else STEPS * EXAMPLES + replayed
    assert sum(counts) == expected
    assert replayed > 8
    if flash:
        for batch in seen.batches:
            lengths = [len(one) for one in documents(batch)]
            assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, *np.cumsum(lengths)]
            assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
            assert batch["seq_idx"][0].tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]


def test_every_document_is_one_of_the_data(tmp_path: Path) -> None:
    flatten: Any = DataCollatorWithFlattening
    _, seen, callback = job(tmp_path, flatten(), {**SECTION, "ratio_in": "tokens"})
    callback.close()
    known = {tuple(text["input_ids"]) for text in texts()}
    assert {tuple(one.tolist()) for batch in seen.batches for one in documents(batch)} <= known


def tokenizer() -> Any:
    vocabulary = {f"w{number}": number for number in range(WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=words, pad_token="w1", model_max_length=16)


def padded_job(folder: Path) -> dict[str, Any]:
    """A job whose collator pads, without a word on padding in the section."""
    _, seen, callback = job(folder, DataCollatorForSeq2Seq(tokenizer(), padding=True), SECTION)
    assert callback.rehearsal is not None
    padding, metrics = callback.rehearsal.config.padding, callback.rehearsal.metrics()
    callback.close()
    assert padding is not None
    rows = [
        (ids[mask.bool()].tolist(), labels[: len(mask)][~mask.bool()].tolist(), ids[~mask.bool()].tolist())
        for batch in seen.batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    return {"length": padding.length, "token": padding.token_id, "rows": rows, "metrics": metrics}


def check_padded(found: dict[str, Any]) -> None:
    assert (found["length"], found["token"]) == (None, 1)  # rows are longer than the limit of the tokenizer
    known = [text["input_ids"] for text in texts()]
    for ids, unlabelled, padding in found["rows"]:
        assert ids in known
        assert set(unlabelled) <= {-100}
        assert set(padding) <= {1}
    assert max(len(ids) for ids, *_ in found["rows"]) > 16
    assert found["metrics"]["rows_replayed"] > 8


def test_rows_of_different_length_need_no_key_more(tmp_path: Path) -> None:
    check_padded(padded_job(tmp_path))


def test_rows_of_different_length_need_no_key_more_on_two_ranks(tmp_path: Path) -> None:
    for rank in run_ranks(padded_job, 2, tmp_path, timeout_s=120):
        check_padded(rank)


def test_without_a_token_to_pad_with_rows_have_one_length(tmp_path: Path) -> None:
    """Such a collator never pads, so there is no padding that `padding` could describe."""
    words = tokenizer()
    words.pad_token = None
    collator = DataCollatorForSeq2Seq(words, padding=False)
    even = [{"input_ids": one["input_ids"][:2], "labels": one["labels"][:2]} for one in texts()]
    _, _, callback = job(tmp_path, collator, SECTION, examples=even)
    assert callback.rehearsal is not None
    assert callback.rehearsal.config.padding is None
    assert callback.rehearsal.metrics()["rows_replayed"] > 8
    callback.close()


@pytest.mark.parametrize("own_loss", [True, False])
def test_logits_of_rows_that_differ_in_length_are_refused_before_the_first_step(own_loss: bool, tmp_path: Path) -> None:
    callback = RehearsalCallback({**SECTION, "strategy": {"name": "der"}})

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model, rows = llama("sdpa"), texts()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer(), padding=True),
        callbacks=[callback],
        compute_loss_func=callback.loss(criterion) if own_loss else None,
    )
    with pytest.raises(BatchError, match="positions of rows that differ in length"):
        trainer.train()
    callback.close()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_collator_that_nobody_knows_is_told_what_to_do(tmp_path: Path) -> None:
    def collate(rows: Texts) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        padded = [row["input_ids"] + [1] * (width - len(row["input_ids"])) for row in rows]
        return default_data_collator([{"input_ids": one, "labels": one} for one in padded])

    with pytest.raises(BatchError, match=r"naming it in rehearsal\.padding\.values"):
        job(tmp_path, collate, SECTION)
