"""TRL's preference trainers: samples of several rows are replayed whole, and their loss is that of each alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", minversion="1.0")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.errors import ConfigError
from tests.helpers.clients.tiny_llm import LONGEST, PAD

pytestmark = pytest.mark.clients

Batch = dict[str, Any]
BOTH = {"input_ids": PAD, "attention_mask": 0, "completion_mask": 0}
ANSWERS = {
    f"{answer}_{name}": value
    for answer in ("chosen", "rejected")
    for name, value in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100))
}
KTO = {**BOTH, **{f"KL_{name}": value for name, value in BOTH.items()}}


def train(
    tiny: Path,
    folder: Path,
    kinds: tuple[Any, Any],
    data: str = "pairs",
    replay: dict[str, Any] | None = None,
    watch: Callable[[Any, Any, Batch], None] | None = None,
    **keys: Any,
) -> tuple[list[Batch], list[float]]:
    """The micro-batches and losses of ten steps of 4 examples, which `watch(trainer, model, batch)` sees before."""
    trainer_class, config_class = kinds
    model_class = AutoModelForSequenceClassification if trainer_class is RewardTrainer else AutoModelForCausalLM
    labels = {"num_labels": 1} if trainer_class is RewardTrainer else {}
    rows = Dataset.from_json(str(tiny / data / "train.jsonl"), cache_dir=str(folder / "cache"))
    if trainer_class is TPOTrainer:
        rows = rows.add_column("reference", rows["chosen"])
    common = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": [], "seed": 1}
    config = config_class(
        str(folder / "out"), use_cpu=True, bf16=False, save_strategy="no", max_length=LONGEST, **common, **keys
    )
    torch.manual_seed(0)
    section = {"buffer": {"capacity": 200}, "representatives": 2, **(replay or {})}
    job = trainer_class(
        model=model_class.from_pretrained(tiny / "model", **labels),
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny / "model"),
        callbacks=[] if replay is None else [RehearsalCallback(section)],
    )
    batches, losses, step = list[Batch](), list[float](), job.training_step

    def training_step(model: Any, inputs: Batch, items: Any = None) -> Tensor:
        batches.append({name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()})
        if watch is not None:
            watch(job, model, inputs)
        loss: Tensor = step(model, inputs, items)
        losses.append(float(loss))
        return loss

    job.training_step = training_step
    job.train()
    return batches, losses


def rows_of(batch: Batch, name: str, fill: int) -> list[tuple[int, ...]]:
    """The rows of a field without the padding behind them."""
    rows = [row.tolist() for row in batch[name]]
    return [tuple(row[: max((i + 1 for i, token in enumerate(row) if token != fill), default=0)]) for row in rows]


def mask_of(name: str) -> str:
    """The attention mask of the sequence that a field belongs to."""
    return re.sub("(input_ids|labels|completion_mask)$", "attention_mask", name)


def samples(batch: Batch, fields: dict[str, int], rows: int) -> list[tuple[Any, ...]]:
    """The samples of a batch: all fields of all their rows, in the layout of halves."""
    columns = [rows_of(batch, name, fill) for name, fill in fields.items()]
    count = len(columns[0]) // rows
    parts = [column[part * count : (part + 1) * count] for column in columns for part in range(rows)]
    return list(zip(*parts, strict=True))


PREFERENCES = [
    pytest.param((DPOTrainer, DPOConfig), "pairs", BOTH, 2, id="DPO"),
    pytest.param((RewardTrainer, RewardConfig), "pairs", {"input_ids": PAD, "attention_mask": 0}, 2, id="reward"),
    pytest.param((TPOTrainer, TPOConfig), "pairs", BOTH, 3, id="TPO, triples"),
    pytest.param((KTOTrainer, KTOConfig), "unpaired", KTO, 1, id="KTO"),
    pytest.param((ORPOTrainer, ORPOConfig), "pairs", ANSWERS, 1, id="ORPO"),
    pytest.param((CPOTrainer, CPOConfig), "pairs", ANSWERS, 1, id="CPO"),
]


@pytest.mark.parametrize(("kinds", "data", "fields", "rows"), PREFERENCES)
def test_samples_are_replayed_whole(
    tiny: Path, tmp_path: Path, kinds: tuple[Any, Any], data: str, fields: dict[str, int], rows: int
) -> None:
    plain, _ = train(tiny, tmp_path / "plain", kinds, data)
    replayed, _ = train(tiny, tmp_path / "replayed", kinds, data, {})
    offered = {sample for batch in plain for sample in samples(batch, fields, rows)}
    for step, (without, batch) in enumerate(zip(plain, replayed, strict=True)):
        new, joined = samples(without, fields, rows), samples(batch, fields, rows)
        assert joined[: len(new)] == new
        assert len(joined) == len(new) + (2 if step >= 3 else 0)
        assert offered.issuperset(joined)
        assert all(batch[name].shape == batch[mask_of(name)].shape for name in fields)
    masks = {mask_of(name) for name in fields}
    assert len(masks) == 1 or any(len({batch[name].shape[1] for name in masks}) == 2 for batch in replayed[3:])


@pytest.mark.parametrize(
    ("kinds", "fields"),
    [
        pytest.param((DPOTrainer, DPOConfig), BOTH, id="DPO"),
        pytest.param((RewardTrainer, RewardConfig), {"input_ids": PAD, "attention_mask": 0}, id="reward"),
    ],
)
def test_the_loss_is_the_mean_over_its_pairs_alone(
    tiny: Path, tmp_path: Path, kinds: tuple[Any, Any], fields: dict[str, int]
) -> None:
    alone: list[float] = []

    def watch(job: Any, model: Any, batch: Batch) -> None:
        count = len(batch["input_ids"]) // 2
        with torch.no_grad():
            pairs = [{name: value[place::count] for name, value in batch.items()} for place in range(count)]
            alone.append(float(sum(job.compute_loss(model, pair) for pair in pairs)) / count)

    _, losses = train(tiny, tmp_path, kinds, replay={}, watch=watch)
    assert losses == pytest.approx(alone, rel=1e-5)


def test_reference_log_probabilities_go_with_their_pair(tiny: Path, tmp_path: Path) -> None:
    by_pair: dict[Any, tuple[float, float]] = {}

    def watch(job: Any, model: Any, batch: Batch) -> None:
        told = zip(batch["ref_chosen_logps"].tolist(), batch["ref_rejected_logps"].tolist(), strict=True)
        for pair, logps in zip(samples(batch, BOTH, 2), told, strict=True):
            assert by_pair.setdefault(pair, logps) == logps

    batches, _ = train(tiny, tmp_path, (DPOTrainer, DPOConfig), replay={}, watch=watch, precompute_ref_log_probs=True)
    assert [len(batch["ref_chosen_logps"]) for batch in batches[3:]] == [6] * 7


def test_a_trainer_that_generates_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    job = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny / "model"),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_completion_length=8),
        train_dataset=Dataset.from_json(str(tiny / "completion" / "train.jsonl"), cache_dir=str(tmp_path / "cache")),
        processing_class=AutoTokenizer.from_pretrained(tiny / "model"),
        callbacks=[RehearsalCallback({"buffer": {"capacity": 200}, "representatives": 2})],
    )
    with pytest.raises(ConfigError, match="GRPOTrainer trains on text that it generates"):
        job.train()
