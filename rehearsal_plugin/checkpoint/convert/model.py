"""Rows that a language model generates, for jobs without its training data.

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

from rehearsal_plugin.checkpoint.convert.sources import name_unreadable
from rehearsal_plugin.checkpoint.convert.tokens import load_tokenizer, token_rows
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import DataError

__all__ = ["Sampling", "synthesize_rows"]


@dataclass(frozen=True)
class Sampling:
    """Sampling of tokens; the defaults draw from the model's own distribution.

    Attributes:
        temperature: Divisor of the logits, above 0.
        top_k: Number of the likeliest tokens to draw from; 0 draws from all.
        top_p: Draw from the likeliest tokens that have this probability together.
        batch_size: Rows in a batch.
        seed: Seed of the random numbers.
        device: Device of the model; None takes a GPU if there is one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 32
    seed: int = 0
    device: str | None = None


def synthesize_rows(
    folder: Path, rows: int, length: int, sampling: Sampling | None = None, prompts: Path | None = None
) -> Iterator[dict[str, Tensor]]:
    """Generate rows of `length` tokens with a causal language model; their fields are those of `token_rows`.

    Every row is one sample. It begins after the token that begins a document (BOS), or else the one that ends it
    (EOS), and that token is not part of it; in a model that has neither, with a token of the vocabulary, all with the
    same chance. A row goes on behind an EOS, as packed rows of text do.

    Args:
        folder: Folder of a model that `AutoModelForCausalLM` can load.
        rows: Number of rows.
        length: Tokens of a row.
        sampling: Sampling of tokens.
        prompts: File with one prompt a line, which rows begin with in turn; needs a tokenizer in the model's folder.

    Raises:
        DataError: The model or the prompts cannot be read, or rows of this length are too long for the model.
        MissingDependencyError: transformers is not installed.
    """
    sampling = sampling or Sampling()
    model = _load_model(folder, length, sampling.device)
    pad = load_tokenizer(folder).pad if _has_tokenizer(folder) else None
    first = _first_token(model)
    starts = _prompt_tokens(folder, rows, length, prompts) if prompts else [np.zeros((rows, 0), dtype=np.int64)]
    if first is None and prompts is None:
        vocabulary = model.config.get_text_config().vocab_size
        starts = [generator(sampling.seed, Purpose.SEEDING, 0).integers(0, vocabulary, (rows, 1))]
    size = sampling.batch_size
    batches = [group[at : at + size] for group in starts for at in range(0, len(group), size)]
    for number, start in enumerate(batches, 1):
        seed = int(generator(sampling.seed, Purpose.SEEDING, number).integers(1 << 62))
        before = start if first is None else np.insert(start, 0, first, axis=1)
        generated = _generate_tokens(model, before, length - start.shape[1], sampling, seed)
        yield token_rows(np.hstack((start, generated)), pad)


def _load_model(folder: Path, length: int, device: str | None) -> Any:
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is no folder of a model: it has no config.json")
    with name_unreadable(folder):
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


def _prompt_tokens(folder: Path, rows: int, length: int, prompts: Path) -> list[IntArray]:
    """Prompts of all rows, one array `[n, tokens]` int64 for every number of tokens."""
    with name_unreadable(prompts):
        texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    ids = [tokens for tokens in load_tokenizer(folder).encode(texts) if tokens] if texts else []
    if not ids:
        raise DataError(f"{prompts} holds no prompts, one a line")
    if max(map(len, ids)) >= length:
        raise DataError(f"a prompt in {prompts} has {max(map(len, ids))} tokens, and a row has {length}; cut it")
    in_turn = [ids[row % len(ids)] for row in range(rows)]
    widths = sorted({len(tokens) for tokens in in_turn})
    return [np.array([tokens for tokens in in_turn if len(tokens) == width], dtype=np.int64) for width in widths]


def _generate_tokens(model: Any, before: IntArray, count: int, sampling: Sampling, seed: int) -> IntArray:
    """Tokens `[n, count]` int64 that follow those `before` `[n, m]`."""
    transformers = optional_import("transformers", extra="transformers")
    # In place of the model's settings, which `generate` would mix in: they may stop at EOS or change the distribution.
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=count,
    )
    tokens = torch.from_numpy(before).to(model.device)
    devices = [tokens.device] if tokens.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        drawn: Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens))
    return drawn[:, before.shape[1] :].cpu().numpy()
