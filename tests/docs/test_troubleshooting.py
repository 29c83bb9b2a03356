"""The messages that the page on troubleshooting lists are those that the package has."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.helpers.paths import ROOT

ROWS = [
    line.split("|")[1].strip()
    for line in (ROOT / "docs" / "reference" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| message")
]
FREE = re.compile(
    r"\.\.\.|\b[NM0-9,]+\b|'[^']*'|`|\(warning[^)]*\)|; batch field|rehearsal\.(?:sampling\.weights|padding)|\bmust\b"
    r"|the batch is|was torch|was a value without entries|no rank has held a row"
)
"""What a message fills in or puts together, and the page's own words."""


@cache
def messages() -> str:
    """All texts of the package, values left out."""
    texts = []
    for path in sorted((ROOT / "rehearsal_plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def fragments(row: str) -> list[str]:
    """The fixed words of a message: `batch field '...' is sparse` has `batch field` and `is sparse`."""
    return [part for part in (piece.strip(" ;:,") for piece in FREE.split(row)) if " " in part]


@pytest.mark.parametrize("row", ROWS)
def test_a_message_is_one_of_the_package(row: str) -> None:
    assert fragments(row)
    assert all(fragment in messages() for fragment in fragments(row)), fragments(row)
