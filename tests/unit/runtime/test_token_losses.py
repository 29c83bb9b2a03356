"""Losses of rows and tokens, and how many tokens count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.token_losses import LabelShift, counted_tokens, predicts_next, token_losses
from tests.helpers.samples import language

# --- losses of rows --------------------------------------------------------------------------------------------------


def test_token_losses_are_those_of_a_causal_model() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = language(0)
    sums, counts = token_losses(logits, labels)
    assert counts.tolist() == [2, 6, 0, 6, 6, 6]
    expected = ForCausalLMLoss(logits, labels, vocab_size=11)
    assert float(sums.sum() / counts.sum()) == pytest.approx(float(expected), rel=1e-6)
    for row in (0, 1, 3):
        alone = ForCausalLMLoss(logits[row : row + 1], labels[row : row + 1], vocab_size=11)
        assert float(sums[row] / counts[row]) == pytest.approx(float(alone), rel=1e-6)


def test_a_classifiers_rows_have_one_loss_each() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, -100, 1])
    sums, counts = token_losses(logits, labels)
    assert counts.tolist() == [1, 1, 0, 1]
    assert float(sums.sum() / 3) == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-6)


@torch.no_grad()
def test_many_logits_are_taken_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from rehearsal_plugin.runtime import token_losses as losses

    logits, labels = language(1)
    whole, _ = token_losses(logits, labels)
    monkeypatch.setattr(losses, "MOST", 150)
    assert torch.equal(token_losses(logits, labels)[0], whole)


def test_no_rows_have_no_losses() -> None:
    sums, counts = token_losses(torch.zeros(0, 4, 3), torch.zeros(0, 4, dtype=torch.int64))
    assert len(sums) == len(counts) == 0


def language_models() -> dict[str, nn.Module]:
    """One of each kind: what its positions predict is a matter of its own."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "num_labels": 13}
    bert = transformers.BertConfig(**sizes)
    gpt2 = transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=2)
    t5 = transformers.T5Config(vocab_size=13, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    t5.decoder_start_token_id = 0
    return {
        "causal": transformers.GPT2LMHeadModel(gpt2),
        "masked": transformers.BertForMaskedLM(bert),
        "tokens": transformers.BertForTokenClassification(bert),
        "sequence to sequence": transformers.T5ForConditionalGeneration(t5),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "masked", "tokens", "sequence to sequence"])
def test_losses_of_rows_add_up_to_the_loss_of_the_model_whichever_it_is(kind: str) -> None:
    torch.manual_seed(0)
    model = language_models()[kind].eval()
    ids = torch.randint(13, (5, 9))
    labels = ids.clone()
    labels[1, 4:], labels[3] = -100, -100
    outputs = model(input_ids=ids, labels=labels)
    sums, counts = token_losses(outputs.logits, labels, shifted=predicts_next(outputs))
    assert float(sums.sum() / counts.sum()) == pytest.approx(float(outputs.loss), rel=1e-5)


@torch.no_grad()
def test_the_logits_of_one_long_row_are_taken_some_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from rehearsal_plugin.runtime import token_losses as losses

    taken = []

    def counting(logits: Tensor, *args: Any, **keys: Any) -> Tensor:
        taken.append(logits.numel())
        return cross_entropy(logits, *args, **keys)

    monkeypatch.setattr(losses, "MOST", 50)
    monkeypatch.setattr(losses, "cross_entropy", counting)
    token_losses(torch.zeros(1, 40, 11), torch.zeros(1, 40, dtype=torch.int64))
    assert max(taken) <= 50


@pytest.mark.parametrize("labels", [torch.rand(4), torch.rand(4, 3)])
def test_labels_that_are_no_classes_are_refused_with_the_cure(labels: Tensor) -> None:
    with pytest.raises(BatchError, match=r"rehearsal.loss\(criterion"):
        token_losses(torch.zeros(4, 3), labels)


def test_other_shapes_are_refused_with_the_cure() -> None:
    with pytest.raises(BatchError, match=r"rehearsal.loss\(criterion"):
        token_losses(torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64))


def test_tokens_are_counted_by_labels_else_by_the_mask() -> None:
    _, labels = language(0)
    mask = torch.ones(6, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    counted = counted_tokens(flatten({"labels": labels, "attention_mask": mask}))
    assert counted is not None
    assert counted.sum(1).tolist() == [3, 7, 0, 7, 7, 7]
    masked = counted_tokens(flatten({"attention_mask": mask}))
    assert masked is not None
    assert masked.sum(1).tolist() == [7, 5, 7, 7, 7, 7]
    assert counted_tokens(flatten({"labels": torch.zeros(4)})) is None


def own_loss(logits: Tensor, labels: Tensor, *, shifted: bool, smoothing: float = 0.0) -> Tensor:
    """As a model of one's own computes it, with labels that are shifted by it or were before."""
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)


@pytest.mark.parametrize("shifted", [True, False])
def test_the_loss_of_a_model_tells_whether_it_shifts_its_labels(shifted: bool) -> None:
    torch.manual_seed(0)
    shift, labels = LabelShift(), torch.randint(13, (3, 7))
    labels[0, 4:] = -100
    logits = torch.randn(3, 7, 13)
    outputs = {"logits": logits, "loss": own_loss(logits, labels, shifted=shifted)}
    assert shift(outputs, logits, labels) is shifted
    assert shift({"logits": logits}, logits, labels) is shifted  # from then on


def test_where_the_loss_does_not_tell_the_type_of_the_outputs_does() -> None:
    torch.manual_seed(0)
    shift, logits, labels = LabelShift(), torch.randn(3, 7, 13), torch.randint(13, (3, 7))
    outputs = {"logits": logits, "loss": own_loss(logits, labels, shifted=False, smoothing=0.3)}
    assert shift(outputs, logits, labels) is predicts_next(outputs) is True
