"""Rows from texts: documents are tokenised, joined with EOS behind each, and cut into rows of one length.

documents "a b c", "d e" with rows of 4 tokens:  [a b c EOS] [d e EOS ...
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from torch import Tensor

from rehearsal_plugin.checkpoint.convert.sources import find_files, name_unreadable, read_arrow_batches
from rehearsal_plugin.checkpoint.convert.tokens import Tokenizer, token_rows
from rehearsal_plugin.errors import DataError

__all__ = ["read_packed_texts"]

CHARACTERS_AT_ONCE = 1 << 20
TEXT_ENDINGS = (".txt", ".jsonl", ".parquet", ".arrow")

Piece: TypeAlias = tuple[str, bool]
"""A piece of text, and whether its document ends there."""


def read_packed_texts(
    paths: Sequence[Path], tokenizer: Tokenizer, length: int, key: str = "text"
) -> Iterator[dict[str, Tensor]]:
    """Read texts as rows of `length` tokens, with the fields of `token_rows`.

    Args:
        paths: Files, or folders of them: `.txt` (each one document), `.jsonl` (a document a line, under `key`),
            `.parquet` or `.arrow` (a document a row, in the column `key`).
        tokenizer: The tokenizer, with the token that ends a document.
        length: Tokens of a row; the rest at the end is dropped.
        key: Key or column of the text.

    Raises:
        DataError: A file cannot be read or has no text under `key`, or the tokenizer has no token that ends a document.
        MissingDependencyError: pyarrow is needed and not installed.
    """
    if tokenizer.eos is None:
        raise DataError("the tokenizer does not say which token ends a document; name it")
    left = np.zeros(0, dtype=np.int64)
    for texts in _in_groups(_read_pieces(paths, key)):
        ids = tokenizer.encode([text for text, _ in texts])
        stream = [left]
        for tokens, (_, ends) in zip(ids, texts, strict=True):
            stream.append(np.asarray([*tokens, tokenizer.eos] if ends else tokens, dtype=np.int64))
        joined = np.concatenate(stream)
        count = len(joined) // length
        if count:
            yield token_rows(joined[: count * length].reshape(count, length), tokenizer.pad)
        left = joined[count * length :]


def _read_pieces(paths: Sequence[Path], key: str) -> Iterator[Piece]:
    for path in find_files(paths, TEXT_ENDINGS):
        with name_unreadable(path):
            if path.suffix == ".txt":
                yield from _pieces_of_text(path)
            elif path.suffix == ".jsonl":
                yield from _pieces_of_lines(path, key)
            else:
                for batch in read_arrow_batches(path, [key]):
                    yield from ((_checked_text(path, key, value), True) for value in batch.column(key).to_pylist())


def _pieces_of_text(path: Path) -> Iterator[Piece]:
    """The pieces of one document, cut at ends of lines."""
    with path.open(encoding="utf-8", newline="") as file:
        while lines := file.readlines(CHARACTERS_AT_ONCE):
            yield "".join(lines), False
    yield "", True


def _pieces_of_lines(path: Path, key: str) -> Iterator[Piece]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except ValueError as error:
                raise DataError(f"line {number} of {path} is no JSON: {error}") from error
            if not isinstance(document, dict) or key not in document:
                raise DataError(f"line {number} of {path} has no '{key}'; name the key that holds the text")
            yield _checked_text(path, key, document[key]), True


def _checked_text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"'{key}' of {path} holds a {type(value).__name__} where a text should be")
    return value


def _in_groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of about a million characters."""
    waiting, size = [], 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece[0])
        if size >= CHARACTERS_AT_ONCE:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting
