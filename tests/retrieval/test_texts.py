"""Embeddings of texts by a model of Hugging Face in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import DataError
from rehearsal_plugin.retrieval import TextEmbedder
from tests.helpers.language import model_in, tokenizer_in

TEXTS = ["the cat sat", "a dog", "it was raining cats and dogs while the cat sat on the log", "mat"]
POSITIONS = 32


def saved(folder: Path, **special: Any) -> tuple[Any, Any]:
    """Model and tokenizer in a folder."""
    tokenizer = tokenizer_in(folder, **special)
    return model_in(folder, vocabulary=len(tokenizer), positions=POSITIONS, n_layer=2), tokenizer


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, text: str, module: str, pool: str) -> Tensor:
    """The embedding as it is defined, of a text alone."""
    seen: list[Tensor] = []
    hook = model.transformer.get_submodule(module).register_forward_hook(lambda *given: seen.append(given[2]))
    model(torch.tensor([tokenizer(text)["input_ids"]]))
    hook.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return hidden[0].mean(0) if pool == "mean" else hidden[0, -1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("module", ["ln_f", "h.0"])
def test_an_embedding_is_that_of_the_text_alone(module: str, pool: Any, side: str, tmp_path: Path) -> None:
    model, tokenizer = saved(tmp_path, padding_side=side)
    embed = TextEmbedder(tmp_path, module=module, pool=pool, batch_size=3)
    expected = torch.stack([by_hand(model, tokenizer, text, module, pool) for text in TEXTS])
    torch.testing.assert_close(embed(TEXTS), expected, atol=1e-5, rtol=1e-5)
    assert embed([]).shape[0] == 0


def test_without_a_module_the_last_hidden_states_are_taken(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.testing.assert_close(TextEmbedder(tmp_path)(TEXTS), TextEmbedder(tmp_path, module="ln_f")(TEXTS))


def test_a_text_that_is_longer_than_the_model_reads_is_cut(tmp_path: Path) -> None:
    _, tokenizer = saved(tmp_path)
    long = "the cat sat on the mat and " * 20
    tokens = tokenizer(long)["input_ids"]
    assert len(tokens) > POSITIONS
    embed = TextEmbedder(tmp_path)
    torch.testing.assert_close(embed([long]), embed([tokenizer.decode(tokens[:POSITIONS])]))


def test_a_module_may_be_called_as_in_the_model_that_trained(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    assert "transformer.h.0" in dict(model.named_modules())
    assert torch.equal(
        TextEmbedder(tmp_path, module="transformer.h.0")(TEXTS), TextEmbedder(tmp_path, module="h.0")(TEXTS)
    )


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        TextEmbedder(tmp_path)
