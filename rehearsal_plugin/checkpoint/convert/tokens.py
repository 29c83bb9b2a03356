"""Tokenizers, and rows of tokens as a language model's data collator gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.padding import IGNORED
from rehearsal_plugin.checkpoint.convert.sources import name_unreadable
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.errors import DataError

__all__ = ["Tokenizer", "load_pretrained_tokenizer", "load_tokenizer", "token_rows"]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of either library.

    Attributes:
        encode: Function from texts to their token ids, without special tokens.
        eos: Token that ends a document; None if there is none.
        pad: Token that pads rows; None if there is none.
    """

    encode: Callable[[list[str]], Sequence[Sequence[int]]]
    eos: int | None
    pad: int | None


def load_tokenizer(path: Path, eos: str | None = None) -> Tokenizer:
    """Load a tokenizer from a folder of transformers, or from a file of tokenizers.

    Args:
        path: The folder of a model or tokenizer, or a file such as `tokenizer.json`.
        eos: Token that ends a document; None takes that of the tokenizer.

    Raises:
        DataError: It cannot be read, or has no such token.
        MissingDependencyError: transformers or tokenizers is not installed.
    """
    if not path.exists():
        raise DataError(f"{path} is neither the folder nor the file of a tokenizer")
    with name_unreadable(path):
        return _load_folder(path, eos) if path.is_dir() else _load_file(path, eos)


def token_rows(ids: IntArray, pad: int | None) -> dict[str, Tensor]:
    """Rows `[n, length]` of token ids as `DataCollatorForLanguageModeling(mlm=False)` gives packed ones.

    Returns:
        `input_ids`, `attention_mask` (all ones), and `labels` (the ids, with -100 for the padding token), each
        `[n, length]` int64.
    """
    tokens = torch.from_numpy(ids)
    labels = tokens.clone()
    if pad is not None:
        labels[labels == pad] = IGNORED
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def load_pretrained_tokenizer(path: Path) -> Any:
    """The tokenizer of transformers in a folder."""
    transformers = optional_import("transformers", extra="transformers")
    return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)


def _load_folder(path: Path, eos: str | None) -> Tokenizer:
    tokenizer = load_pretrained_tokenizer(path)
    end = tokenizer.eos_token_id if eos is None else _checked_token(tokenizer.get_vocab().get(eos), eos, path)

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    return Tokenizer(encode, end, tokenizer.pad_token_id)


def _load_file(path: Path, eos: str | None) -> Tokenizer:
    tokenizers = optional_import("tokenizers", extra="transformers")
    try:
        encoder = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise DataError(f"{path} is no file of a tokenizer: {error}") from error
    encoder.no_padding()
    encoder.no_truncation()
    end = None if eos is None else _checked_token(encoder.token_to_id(eos), eos, path)
    return Tokenizer(
        lambda texts: [encoding.ids for encoding in encoder.encode_batch(texts, add_special_tokens=False)], end, None
    )


def _checked_token(token: int | None, name: str, path: Path) -> int:
    if token is None:
        raise DataError(f"the tokenizer in {path} has no token '{name}'")
    return token
