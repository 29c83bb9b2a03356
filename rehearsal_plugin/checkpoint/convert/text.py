"""Rows from texts: documents are tokenised, joined with EOS behind each, and cut into rows of one length.

documents "a b c", "d e" with rows of 4 tokens:  [a b c EOS] [d e EOS ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from rehearsal_plugin.checkpoint.convert.compressed import open_text
from rehearsal_plugin.checkpoint.convert.packing import cut_rows, joined_arrays
from rehearsal_plugin.checkpoint.convert.records import RECORD_FORMS, read_values
from rehearsal_plugin.checkpoint.convert.sources import Source, find_sources, name_unreadable
from rehearsal_plugin.checkpoint.convert.tokens import Tokenizer, token_rows
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import DataError

__all__ = ["read_packed_texts"]

CHARACTERS_AT_ONCE = 1 << 20
TEXT_FORMS = {"text", *RECORD_FORMS}
ASIDES = {"json"}

Piece: TypeAlias = tuple[str, bool]
"""A piece of text, and whether its document ends there."""


def read_packed_texts(
    paths: Sequence[Path], tokenizer: Tokenizer, length: int, key: str = "text", split: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Read texts as rows of `length` tokens, with the fields of `token_rows`.

    Args:
        paths: Files or folders: texts (each one document), or data sets in one of the forms `RECORD_FORMS` (a document
            a row, under `key`).
        tokenizer: The tokenizer, with the token that ends a document.
        length: Tokens of a row; the rest at the end is dropped.
        key: Key or column of the text.
        split: Split to take from data sets that have several.

    Raises:
        DataError: A file cannot be read or has no text under `key`, or the tokenizer has no token that ends a document.
        MissingDependencyError: A library that reads the file is not installed.
    """
    if tokenizer.eos is None:
        raise DataError("the tokenizer does not say which token ends a document; name it")
    sources = find_sources(paths, TEXT_FORMS, split, ASIDES)
    for rows in cut_rows(_token_streams(sources, tokenizer, key), length):
        yield token_rows(rows["input_ids"], tokenizer.pad)


def _token_streams(sources: Sequence[Source], tokenizer: Tokenizer, key: str) -> Iterator[dict[str, IntArray]]:
    """Tokens of texts, with EOS behind each document."""
    for texts in _in_groups(_read_pieces(sources, key)):
        ids = tokenizer.encode([text for text, _ in texts])
        ended = [[*tokens, tokenizer.eos] if ends else tokens for tokens, (_, ends) in zip(ids, texts, strict=True)]
        yield {"input_ids": joined_arrays(ended)}


def _read_pieces(sources: Sequence[Source], key: str) -> Iterator[Piece]:
    for source in sources:
        with name_unreadable(source.path):
            if source.form == "text":
                yield from _pieces_of_text(source.path)
            else:
                for place, value in read_values(source, key, "text"):
                    yield _checked_text(place, key, value), True


def _pieces_of_text(path: Path) -> Iterator[Piece]:
    """The pieces of one document, cut at ends of lines."""
    with open_text(path) as file:
        while lines := file.readlines(CHARACTERS_AT_ONCE):
            yield "".join(lines), False
    yield "", True


def _checked_text(place: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        chat = "; chats need --chat" if isinstance(value, list) else ""
        raise DataError(f"'{key}' of {place} holds a {type(value).__name__} where a text should be{chat}")
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
