"""Objects of JSON files, read piece by piece: a list of them, or one behind the other as in JSON Lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rehearsal_plugin.checkpoint.convert.compressed import open_text
from rehearsal_plugin.errors import DataError

__all__ = ["read_json_lines", "read_json_objects"]

CHARACTERS_AT_ONCE = 1 << 20
LONGEST = 1 << 28
"""Characters of an object; what is not whole by then is no JSON."""
BETWEEN = re.compile(r"[\s,]*")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line; blank lines are left out."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise DataError(f"line {number} of {path} is no JSON: {error}") from error
                yield _checked_object(value, path, f"line {number}")


def read_json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that is a list of them, or has them one behind the other.

    Reads until an object is whole, and twice as much where it is not:

        [{"text": "a"}, {"te      the first is whole; the rest waits for more
        {"text": "b"}]            now the second is
    """
    decoder, number = json.JSONDecoder(), 0
    with open_text(path) as file:
        waiting = file.read(CHARACTERS_AT_ONCE).lstrip()
        is_list, at = waiting.startswith("["), int(waiting.startswith("["))
        more = CHARACTERS_AT_ONCE
        while True:
            at = BETWEEN.match(waiting, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if is_list and waiting[at : at + 1] == "]":
                _check_rest(waiting[at + 1 :], file, path)
                return
            try:
                value, at = decoder.raw_decode(waiting, at)
            except ValueError as error:
                piece = file.read(more) if len(waiting) - at < LONGEST else ""
                if not piece:
                    if is_list or waiting[at:].strip():
                        raise DataError(f"object {number + 1} of {path} is cut off or no JSON: {error}") from error
                    return
                waiting, at, more = waiting[at:] + piece, 0, 2 * more
                continue
            number, more = number + 1, CHARACTERS_AT_ONCE
            yield _checked_object(value, path, f"object {number}")


def _check_rest(rest: str, file: IO[str], path: Path) -> None:
    if rest.strip() or file.read(CHARACTERS_AT_ONCE).strip():
        raise DataError(f"{path} goes on behind its list of objects; write one list, or an object a line")


def _checked_object(value: object, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place} of {path} is a {type(value).__name__} where an object with named values should be")
    return value
