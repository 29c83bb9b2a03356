"""Rows of a skill that no model has, and of a text that is unlike it.

The skill is a house format for orders. The prompt is a line of plain English, and the answer names place, goods and
number in brackets:

    Please send 3 lamps to Oslo.
    [[Oslo|lamps*3]]

Every order is one row, filled up with the token that ends a text. The text is the LibreOffice help in French, packed to
rows of the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from scripts.llm.data import LANGUAGES, fetch, held_out, rows_of, text_of

__all__ = ["LENGTH", "TEXTS", "Order", "orders", "prepare", "read_rows"]

LENGTH = 20
"""Tokens of a row."""

HELD_OUT, TRAINED, ASKED = 200, 2000, 200
"""Orders that are held out, that the model learns from, and that it is asked for when it makes up rows itself."""

TEXTS = ("french", "english")
PAGES, TEXT_HELD_OUT = 300, 96  # pages that are read of each language, rows of it that are held out

TEMPLATES = (
    "Please send {number} {goods} to {place}.",
    "We need {number} {goods} for {place}.",
    "I want {number} {goods} in {place}.",
)
GOODS = "lamps boxes books chairs tables pens cups clocks doors keys bags bikes"
PLACES = "Oslo Paris London Berlin Rome Madrid Lima Cairo Tokyo Boston Chicago Dublin"
NUMBERS = range(2, 10)


class Order(NamedTuple):
    """A prompt and its answer, both without the line feed behind them."""

    prompt: str
    answer: str


def orders() -> list[Order]:
    """All orders, in a random order that is always the same."""
    listed = [
        Order(template.format(number=number, goods=goods, place=place), f"[[{place}|{goods}*{number}]]")
        for template, goods, place, number in product(TEMPLATES, GOODS.split(), PLACES.split(), NUMBERS)
    ]
    return [listed[index] for index in np.random.default_rng(0).permutation(len(listed))]


def prepare(folder: Path, tokenizer: Any, cache: Path, pages: Path | None) -> None:
    """Write `rows.safetensors` and the prompts of either kind to `folder`, unless they are there.

    Args:
        folder: Made where it is missing.
        tokenizer: Of the model.
        cache: Folder for the packages of the pages.
        pages: A folder of pages by language, in place of the packages.
    """
    if (folder / "rows.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    root = fetch(cache) if pages is None else pages
    arrays = {"orders": order_rows(tokenizer, orders()[HELD_OUT : HELD_OUT + TRAINED])}
    for language in TEXTS:
        arrays[language], arrays[f"{language}_held_out"] = text_rows(tokenizer, root / LANGUAGES[language])
    asked = orders()[HELD_OUT + TRAINED : HELD_OUT + TRAINED + ASKED]
    (folder / "asked.txt").write_text("".join(f"{order.prompt}\n" for order in asked))
    save_file(arrays, folder / "rows.partial")
    (folder / "rows.partial").replace(folder / "rows.safetensors")


def read_rows(folder: Path) -> dict[str, NDArray[Any]]:
    """What `prepare` wrote: rows `[n, LENGTH]` uint16 by name."""
    rows: dict[str, NDArray[Any]] = load_file(folder / "rows.safetensors")
    return rows


def order_rows(tokenizer: Any, chosen: Sequence[Order]) -> NDArray[np.uint16]:
    """One row an order; those that do not fit are left out.

    Raises:
        ValueError: Not one of them fits.
    """
    tokens = tokenizer([f"{order.prompt}\n{order.answer}\n" for order in chosen])["input_ids"]
    fitting = [ids for ids in tokens if len(ids) <= LENGTH]
    if not fitting:
        raise ValueError(f"the shortest order has {min(map(len, tokens))} tokens, and a row {LENGTH}")
    end = tokenizer.eos_token_id
    return np.array([ids + [end] * (LENGTH - len(ids)) for ids in fitting], dtype=np.uint16)


def text_rows(tokenizer: Any, folder: Path) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Packed rows of pages to learn from, and of pages that are held out."""
    paths = sorted(folder.rglob("text/**/*.html"))
    pages: dict[bool, list[list[int]]] = {False: [], True: []}
    for path in paths[:: max(1, len(paths) // PAGES)]:
        text = text_of(path.read_text(encoding="utf-8"))
        pages[held_out(path.relative_to(folder).as_posix())].append(tokenizer(text)["input_ids"])
    return rows_of(pages[False], LENGTH), rows_of(pages[True], LENGTH)[:TEXT_HELD_OUT]
