"""Trainers that compute their loss from the log-probabilities of a fused head, as TRL's do, in stand-ins for these."""

from __future__ import annotations

import functools
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import GPT2LMHeadModel, Trainer

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.transformers.own_loss import has_fused_head
from tests.helpers.fused_outputs import FusedOutput, fused
from tests.helpers.trainer_jobs import VOCABULARY, losses, model, trainer

SECTION: dict[str, Any] = {"representatives": 2, "exchange": {"timeout_s": 20}}
NEW = 4


def section(**keys: Any) -> dict[str, Any]:
    return {**SECTION, "buffer": {"capacity": 60, **keys.pop("buffer", {})}, **keys}


def add_fused_head(network: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """As `trl.trainer.utils.add_fused_lm_head`, with the whole logits."""
    original = network.forward

    @functools.wraps(type(network).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        return fused({"labels": labels}, original(*args, **kwargs).logits)

    network.forward = types.MethodType(forward, network)
    return network


class FusedLoss(Trainer):
    """Trains on the log-probabilities, as TRL's `SFTTrainer.compute_loss`, and notes its outputs."""

    seen: list[tuple[Any, Any]]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.compute_loss_func is not None:
            labels = inputs.pop("labels")
            return self.compute_loss_func(model(**inputs), labels, num_items_in_batch=num_items_in_batch)
        outputs = model(**inputs, fused_lm_head=True)
        self.seen.append((inputs, outputs))
        return -outputs.log_probs.sum() / num_items_in_batch


def kind_of(name: str = "SFTTrainer", module: str = "trl.trainer.sft_trainer") -> type[FusedLoss]:
    return type(name, (FusedLoss,), {"__module__": module, "seen": []})


def job(folder: Path, keys: dict[str, Any], kind: Any, **arguments: Any) -> tuple[Any, RehearsalCallback]:
    callback = RehearsalCallback(keys)
    made, _ = trainer(folder, callbacks=[callback], network=add_fused_head(model()), kind=kind, **arguments)
    return made, callback


def by_hand(network: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """Sums and tokens of each row."""
    with torch.no_grad():
        logits = network(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    outputs = fused(inputs, logits)
    assert outputs.log_probs is not None
    assert outputs.label_mask is not None
    return -outputs.log_probs.sum(1), outputs.label_mask.sum(1)


def test_losses_and_weights_come_from_the_log_probabilities(tmp_path: Path) -> None:
    keys = section(losses_every=1, strategy={"loss_weight": 0.25}, buffer={"policy": "score", "score_by": "loss"})
    made, callback = job(tmp_path, keys, kind_of(), learning_rate=0.0)
    made.train()
    callback.close()
    measured = [entry for entry in made.state.log_history if "rehearsal/loss_new" in entry]
    assert len(made.seen) == len(measured) == 8
    for (inputs, _), loss, entry in zip(made.seen, losses(made), measured, strict=True):
        sums, counts = by_hand(made.model, inputs)
        weights = torch.ones(len(sums))
        weights[NEW:] = 0.25
        # Trainers before 5.0 round the loss in their log to four decimals.
        assert loss == pytest.approx(float((weights * sums).sum() / counts.sum()), abs=6e-5)
        assert entry["rehearsal/loss_new"] == pytest.approx(float(sums[:NEW].sum() / counts[:NEW].sum()), abs=1e-5)
        if len(sums) > NEW and "rehearsal/loss_replayed" in entry:
            mean = float(sums[NEW:].sum() / counts[NEW:].sum())
            assert entry["rehearsal/loss_replayed"] == pytest.approx(mean, abs=1e-5)
    assert len(made.seen[-1][0]["labels"]) == NEW + 2


def test_what_the_trainer_reads_beside_the_loss_stays(tmp_path: Path) -> None:
    made, callback = job(tmp_path, section(strategy={"loss_weight": 3.0}), kind_of())
    made.train()
    callback.close()
    for inputs, outputs in made.seen:
        assert type(outputs) is FusedOutput
        assert outputs.label_mask is not None
        assert outputs.entropy is not None
        assert torch.equal(outputs.label_mask, inputs["labels"][:, 1:] != -100)
        assert (outputs.entropy >= 0).all()
        assert (outputs.entropy <= torch.tensor(VOCABULARY).log() + 1e-4).all()


@pytest.mark.parametrize("name", ["der", "der++", "topk", "x-der", "er-ace"])
def test_a_strategy_that_needs_logits_is_refused_before_the_first_step(tmp_path: Path, name: str) -> None:
    made, _ = job(tmp_path, section(strategy={"name": name}), kind_of())
    with pytest.raises(
        ConfigError, match=rf"strategy '{re.escape(name)}' needs logits, and SFTTrainer .*compute_loss_func=call"
    ):
        made.train()
    assert not made.seen
    assert made.state.global_step == 0


def test_with_a_criterion_the_model_gives_logits(tmp_path: Path) -> None:
    made, callback = job(tmp_path, section(strategy={"name": "topk", "k": 3}, losses_every=1), kind_of())

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    made.compute_loss_func = callback.loss(criterion)
    made.train()
    callback.close()
    assert made.state.global_step == 8
    assert "rehearsal/loss_replayed" in made.state.log_history[-2]


@pytest.mark.parametrize(
    ("keys", "setting"),
    [
        (section(losses_every=1), r"rehearsal\.losses_every"),
        (section(buffer={"policy": "score", "score_by": "loss"}), r"rehearsal\.buffer\.score_by"),
        (section(strategy={"loss_weight": 2.0}), r"rehearsal\.strategy\.loss_weight"),
    ],
)
def test_a_loss_that_is_another_one_is_refused(tmp_path: Path, keys: dict[str, Any], setting: str) -> None:
    made, _ = job(tmp_path, keys, kind_of("KTOTrainer", "trl.trainer.kto_trainer"))
    with pytest.raises(ConfigError, match=rf"{setting} takes the loss of a row from .* of KTOTrainer is another one"):
        made.train()
    assert not made.seen


def test_weights_of_a_loss_that_is_no_sum_are_refused(tmp_path: Path) -> None:
    made, _ = job(tmp_path, section(strategy={"loss_weight": 2.0}), kind_of())
    made.args.loss_type = "dft"
    with pytest.raises(ConfigError, match=r"loss_weight weighs log-probabilities, of which the loss_type 'dft'"):
        made.train()
    measured, callback = job(tmp_path, section(losses_every=1), kind_of())
    measured.args.loss_type = "dft"
    measured.train()
    callback.close()
    assert measured.state.global_step == 8


def test_a_fused_head_is_found_under_what_wraps_it() -> None:
    plain, head = model(), add_fused_head(model())
    assert not has_fused_head(plain)
    assert has_fused_head(head)
    assert has_fused_head(nn.Sequential(head)), "as with PEFT"
    inner = head.forward

    def precise(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    precise.__wrapped__ = inner  # type: ignore[attr-defined]
    head.forward = precise
    assert has_fused_head(head), "as accelerate does for mixed precision"
