"""Rows from chats: messages are rendered by the tokenizer's chat template; only tokens of the assistant have labels.

A template with `{% generation %}` marks says itself which tokens these are. Without them, an answer is the text that
the template adds for the assistant's message, behind the prompt that it gives for generation:

    rendered up to the question, with the prompt      <user>2+2?</s><bot>
    rendered up to the answer                         <user>2+2?</s><bot>4</s>
    labels                                                               4</s>

That needs a template whose text only grows with each message. One that changes what it rendered before, such as those
that drop the reasoning of earlier turns, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.padding import IGNORED
from rehearsal_plugin.checkpoint.convert.packing import cut_rows, joined_arrays
from rehearsal_plugin.checkpoint.convert.records import RECORD_FORMS, read_values
from rehearsal_plugin.checkpoint.convert.sources import Source, find_sources, name_unreadable
from rehearsal_plugin.checkpoint.convert.tokens import load_pretrained_tokenizer, token_rows
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import DataError

__all__ = ["ChatEncoder", "load_chat_encoder", "read_packed_chats"]

ASIDES = {"json"}
CHATS_AT_ONCE = 256
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages: TypeAlias = list[dict[str, Any]]
ChatEncoder: TypeAlias = Callable[[Messages], tuple[Sequence[int], Sequence[int]]]
"""Function from messages to their token ids, and 1 for each token of the assistant."""


def load_chat_encoder(path: Path) -> ChatEncoder:
    """Load the tokenizer of a folder, with its chat template.

    Raises:
        DataError: It cannot be read, or has no chat template that can be followed.
        MissingDependencyError: transformers is not installed.
    """
    if not path.is_dir():
        raise DataError(f"{path} is no folder of a tokenizer; chats need its chat template, which a single file lacks")
    with name_unreadable(path):
        tokenizer = load_pretrained_tokenizer(path)
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is None:
        raise DataError(f"the tokenizer in {path} has no chat template; add chat_template.jinja, or give texts")
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer in {path} cannot say where a token stands in its text; save a fast one")
    encode = _encode_marked if GENERATION.search(template) else _encode_grown
    return lambda messages: encode(tokenizer, messages)


def read_packed_chats(
    paths: Sequence[Path], encode: ChatEncoder, length: int, key: str = "messages", split: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Read chats as rows of `length` tokens, with the fields of `token_rows`; labels are -100 but for the assistant's.

    Chats are joined as the template ends them, and cut. Rows without a label are left out, and so is the rest at the
    end.

    Args:
        paths: Files or folders in one of the forms `RECORD_FORMS`.
        encode: What `load_chat_encoder` gives.
        length: Tokens of a row.
        key: Key or column of the messages: a list of mappings with `role` and `content`.
        split: Split to take from data sets that have several.

    Raises:
        DataError: A file cannot be read, or the template cannot render its messages.
        MissingDependencyError: A library that reads the file is not installed.
    """
    sources = find_sources(paths, RECORD_FORMS, split, ASIDES)
    for rows in cut_rows(_token_streams(sources, encode, key), length):
        labelled = (rows["labels"] != IGNORED).any(axis=1)
        if labelled.any():
            batch = token_rows(rows["input_ids"][labelled], None)
            yield batch | {"labels": torch.from_numpy(rows["labels"][labelled])}


def _token_streams(sources: Sequence[Source], encode: ChatEncoder, key: str) -> Iterator[dict[str, IntArray]]:
    for source in sources:
        with name_unreadable(source.path):
            chats = read_values(source, key, "messages")
            while group := list(islice(chats, CHATS_AT_ONCE)):
                encoded = [_encode_chat(place, messages, encode) for place, messages in group]
                ids, mask = (joined_arrays(part) for part in zip(*encoded, strict=True))
                yield {"input_ids": ids, "labels": np.where(mask == 1, ids, IGNORED)}


def _encode_chat(place: str, messages: object, encode: ChatEncoder) -> tuple[Sequence[int], Sequence[int]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place} has no list of messages; name their key with --text-key")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{place} has a message without a role; give each message a 'role' and a 'content'")
        if not isinstance(message.get("content") or "", str):
            raise DataError(
                f"{place} has a message whose content is no text; give text, as there are no pictures in rows"
            )
    try:
        # Arrow gives each message all keys that one of them has.
        ids, mask = encode([{key: value for key, value in one.items() if value is not None} for one in messages])
    except DataError as error:
        raise DataError(f"{place} cannot be given labels: {error}") from error
    except Exception as error:  # templates raise anything
        raise DataError(f"{place} cannot be rendered by the tokenizer's chat template: {error}") from error
    if not any(mask) and any(one["role"] == "assistant" and one.get("content") for one in messages):
        raise DataError(f"{place} has an answer, and the chat template marks no token of it; mend its generation marks")
    return ids, mask


def _encode_marked(tokenizer: Any, messages: Messages) -> tuple[Sequence[int], Sequence[int]]:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def _encode_grown(tokenizer: Any, messages: Messages) -> tuple[Sequence[int], Sequence[int]]:
    """Tokens of the whole text, and those that begin in an answer."""

    def render(count: int, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        return text

    whole = render(len(messages))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    mask = np.zeros(len(starts), dtype=np.int64)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, upto = render(number, prompt=True) if number else "", render(number + 1)
            if not (upto.startswith(before) and whole.startswith(upto)):
                raise DataError(
                    "the chat template changes earlier turns, so the assistant's tokens cannot be told; put "
                    "{% generation %} and {% endgeneration %} around its answers in the template"
                )
            mask[(starts >= len(before)) & (starts < len(upto))] = 1
    return encoded["input_ids"], mask.tolist()
