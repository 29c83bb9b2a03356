"""Rows that a model says itself: where nobody has the data that it was trained on.

Self-synthesized rehearsal, after Huang et al., "Mitigating catastrophic forgetting in large language models with
self-synthesized rehearsal", ACL 2024, and the older pseudo-rehearsal (Robins, 1995).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.checkpoint.convert.sources import readable
from rehearsal_plugin.checkpoint.convert.tokens import load_tokenizer, token_rows
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import DataError

__all__ = ["Sampling", "synthesized"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults draw from the model's own distribution.

    Attributes:
        temperature: Above 0.
        top_k: Only from that many of the likeliest tokens; 0 from all.
        top_p: Only from the likeliest tokens that have this share of the probability together.
        batch_size: Rows at a time.
        seed: Keys the random numbers.
        device: Where; None takes a GPU if there is one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 32
    seed: int = 0
    device: str | None = None


def synthesized(
    folder: Path, rows: int, length: int, sampling: Sampling | None = None, prompts: Path | None = None
) -> Iterator[dict[str, Tensor]]:
    """Rows of `length` tokens out of a causal language model, with the fields of `token_rows`.

    Every row is one sample. It begins after the token that begins a document (BOS), or else the one that ends it
    (EOS), and that token is not part of it; in a model that has neither, with a token of the vocabulary, all with the
    same chance. A row goes on behind an EOS, as packed rows of text do.

    Args:
        folder: Of a model that `AutoModelForCausalLM` can load.
        rows: How many.
        length: Tokens of a row.
        sampling: How tokens are drawn.
        prompts: A file with a text a line, which rows begin with in turn; the model's folder holds the tokenizer then.

    Raises:
        DataError: The model or the prompts cannot be read, or rows of this length are too long for the model.
        MissingDependencyError: transformers is not installed.
    """
    how = sampling or Sampling()
    model = _load(folder, length, how.device)
    pad = load_tokenizer(folder).pad if _has_tokenizer(folder) else None
    first = _first_token(model)
    starts = _starts(folder, rows, length, prompts) if prompts else [np.zeros((rows, 0), dtype=np.int64)]
    if first is None and prompts is None:
        vocabulary = model.config.get_text_config().vocab_size
        starts = [generator(how.seed, Purpose.SEEDING, 0).integers(0, vocabulary, (rows, 1))]
    batches = [alike[at : at + how.batch_size] for alike in starts for at in range(0, len(alike), how.batch_size)]
    for number, start in enumerate(batches, 1):
        seed = int(generator(how.seed, Purpose.SEEDING, number).integers(1 << 62))
        before = start if first is None else np.insert(start, 0, first, axis=1)
        yield token_rows(np.hstack((start, _go_on(model, before, length - start.shape[1], how, seed))), pad)


def _load(folder: Path, length: int, device: str | None) -> Any:
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is no folder of a model: it has no config.json")
    with readable(folder):
        transformers = optional_import("transformers", extra="transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
        model = model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise DataError(f"the model in {folder} sees at most {longest} tokens, and rows shall have {length}")
    return model


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _first_token(model: Any) -> int | None:
    """BOS, else EOS; None where neither is a token of the vocabulary."""
    for name in ("bos_token_id", "eos_token_id"):
        for config in (model.generation_config, model.config.get_text_config()):
            token = getattr(config, name, None)
            token = token[0] if isinstance(token, list) else token
            if token is not None and 0 <= token < model.config.get_text_config().vocab_size:
                return int(token)
    return None


def _starts(folder: Path, rows: int, length: int, prompts: Path) -> list[IntArray]:
    """The tokens that rows begin with, `[n, tokens]` int64 for every number of tokens."""
    with readable(prompts):
        texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    ids = [tokens for tokens in load_tokenizer(folder).encode(texts) if tokens] if texts else []
    if not ids:
        raise DataError(f"{prompts} holds no prompts, one a line")
    if max(map(len, ids)) >= length:
        raise DataError(f"a prompt in {prompts} has {max(map(len, ids))} tokens, and a row has {length}; cut it")
    in_turn = [ids[row % len(ids)] for row in range(rows)]
    widths = sorted({len(tokens) for tokens in in_turn})
    return [np.array([tokens for tokens in in_turn if len(tokens) == width], dtype=np.int64) for width in widths]


def _go_on(model: Any, before: IntArray, count: int, how: Sampling, seed: int) -> IntArray:
    """`[n, count]` int64 tokens behind those `before` `[n, m]`."""
    transformers = optional_import("transformers", extra="transformers")
    # In place of the model's own settings, which `generate` would mix in: they may stop at EOS, or flatten the draw.
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, max_new_tokens=count
    )
    tokens = torch.from_numpy(before).to(model.device)
    devices = [tokens.device] if tokens.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        drawn: Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens))
    return drawn[:, before.shape[1] :].cpu().numpy()
