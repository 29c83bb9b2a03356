"""A small tokenizer and a small language model, in folders as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["END", "PAD", "model_in", "tokenizer_in"]

END, PAD = "<end>", "<pad>"
TEXT = "the cat sat on the mat and the dog sat on the log while it was raining cats and dogs"


def tokenizer_in(folder: Path, **special: Any) -> Any:
    """A byte-level tokenizer with an end of document, saved in a folder with a `tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END, PAD], initial_alphabet=alphabet)
    encoder.train_from_iterator([TEXT], trainer)
    make: Any = PreTrainedTokenizerFast  # it has no types
    tokenizer = make(tokenizer_object=encoder, **({"eos_token": END} | special))
    tokenizer.save_pretrained(folder)
    return tokenizer


def model_in(folder: Path, *, vocabulary: int, positions: int = 32, scale: float = 1.0, **config: Any) -> Any:
    """A random GPT-2, saved in a folder; a larger `scale` makes it surer of what it says."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {"n_positions": positions, "n_embd": 16, "n_layer": 1, "n_head": 2, **config}
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **({"bos_token_id": None} | settings)))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(scale)
    model.save_pretrained(folder)
    return model.eval()
