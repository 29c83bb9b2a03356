"""A capacity as a number of rows, or as bytes with a unit."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

__all__ = ["INT64", "Size", "parse_size"]

INT64 = 2**63  # rows, bytes, steps and seeds travel as int64

PATTERN = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(?:([kmgtp])(i?))?b(?:ytes?)?\s*", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Bytes of a size with a unit (`"4GiB"`, `"1.5 GB"`, `"64B"`), or None when it is no such size."""
    match = PATTERN.fullmatch(text)
    if match is None:
        return None
    number, prefix, binary = match.groups()
    return int(Fraction(number) * (1024 if binary else 1000) ** " kmgtp".index((prefix or " ").lower()))


def _check_size(value: object) -> object:
    size = parse_size(value) if isinstance(value, str) else value
    if type(size) is not int or not 0 < size < INT64:
        raise PydanticCustomError("size", "Input should be a whole number of rows above 0, or a size such as '4GiB'")
    return value


Size = Annotated[int | str, BeforeValidator(_check_size)]
