"""Three languages of one text: the LibreOffice help, English, French and German, out of the Debian packages.

The packages hold the same pages in every language. They are fetched with `apt-get download` and unpacked with
`dpkg -x`, which needs no root; nothing is installed. A page is held out in all languages or in none, so that no model
sees a held-out page, not even translated. The tokenizer is a byte-level BPE trained on the spot, on the training pages
of all three languages together, so that it favours none of them.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = [
    "DOMAINS",
    "END",
    "LANGUAGES",
    "LENGTH",
    "VOCABULARY",
    "Corpus",
    "load",
    "rows_of",
    "text_of",
    "train_tokenizer",
]

LANGUAGES = {"english": "en-US", "french": "fr", "german": "de"}
"""The domains in the order in which they are learnt, and their folders in the packages."""

DOMAINS = {language: number for number, language in enumerate(LANGUAGES)}
"""Their numbers in the buffer."""

LENGTH = 128
"""Tokens of a row, and so the length of the model's context."""

VOCABULARY = 4096
END, END_TOKEN = "<|end|>", 0
"""Ends every page."""

SHARE_HELD_OUT = 10
FORMAT = 1  # of what is cached


@dataclass(frozen=True)
class Corpus:
    """One language: tokens to train on and those of pages that training never sees, packed to rows.

    Attributes:
        train: `[rows, length]` uint16.
        held_out: The same.
        bytes_per_token: UTF-8 bytes that a held-out token stands for, on average.
    """

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    bytes_per_token: float


def load(cache: Path, length: int, pages: Path | None = None) -> dict[str, Corpus]:
    """The rows of every language, from the cache or made now.

    Args:
        cache: Folder for packages, tokenizer and rows; made where it is missing.
        length: Tokens a row.
        pages: A folder `<language>/text/**/*.html` for every one of `LANGUAGES`; None fetches the packages.
    """
    cache.mkdir(parents=True, exist_ok=True)
    root = fetch(cache) if pages is None else pages
    key = hashlib.sha256(f"{FORMAT} {root.resolve()} {length}".encode()).hexdigest()[:8]
    path = cache / f"rows-{length}-{key}.safetensors"
    if not path.is_file():
        arrays = tokenise({name: read(root / folder) for name, folder in LANGUAGES.items()}, cache, length)
        partial = path.with_suffix(".partial")
        save_file(arrays, partial)
        partial.replace(path)
    rows: dict[str, NDArray[Any]] = load_file(path)
    return {
        name: Corpus(rows[f"{name}_train"], rows[f"{name}_held_out"], float(rows[f"{name}_bytes_per_token"][0]))
        for name in LANGUAGES
    }


def fetch(cache: Path) -> Path:
    """Download and unpack the packages where that was not done before; the folder of the languages.

    Raises:
        FileNotFoundError: This machine has no apt, or its package lists do not have them; the message says what to do.
    """
    root = cache / "usr/share/libreoffice/help"
    names = [f"libreoffice-help-{folder.lower()}" for folder in LANGUAGES.values()]
    if all((root / folder).is_dir() for folder in LANGUAGES.values()):
        return root
    try:
        run(["apt-get", "download", *names], cache)
        for package in sorted(cache.glob("libreoffice-help-*.deb")):
            run(["dpkg", "-x", package.name, "."], cache)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise FileNotFoundError(
            f"the Debian packages {', '.join(names)} cannot be fetched: {reason}; on Debian or Ubuntu run 'apt-get "
            f"update' once as root, elsewhere unpack them into {cache} by other means, or give --pages FOLDER"
        ) from error
    return root


def run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def read(folder: Path) -> dict[str, str]:
    """The text of every page under `folder`, by its path.

    Raises:
        FileNotFoundError: There are no pages.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("text/**/*.html")}
    if not paths:
        raise FileNotFoundError(f"{folder} has no pages (text/**/*.html)")
    return {name: text_of(paths[name].read_text(encoding="utf-8")) for name in sorted(paths)}


class _Text(HTMLParser):
    """The text of a page's content; a block ends a line."""

    BLOCKS = frozenset(("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "tr", "br", "pre", "table", "ul", "ol"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._depth = 0  # of <div>s inside the content; 0 outside

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and (self._depth or ("id", "DisplayArea") in attrs):
            self._depth += 1
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self._break(tag)
        if tag == "div" and self._depth:
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        if self._depth and tag in self.BLOCKS:
            self.parts.append("\0")


def text_of(page: str) -> str:
    """Text of a help page without its menus, a line a paragraph."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(parser.parts).split("\0"))
    return "\n".join(line for line in lines if line)


def held_out(name: str) -> bool:
    """Whether a page is held out: by its path, which is the same in every language."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % SHARE_HELD_OUT == 0


def tokenise(pages: Mapping[str, Mapping[str, str]], cache: Path, length: int) -> dict[str, NDArray[Any]]:
    """Train the tokenizer, keep it in `cache`, and pack both sides of every language to rows."""
    sides = {
        f"{language}_{side}": [text for name, text in texts.items() if text and held_out(name) == (side == "held_out")]
        for language, texts in pages.items()
        for side in ("train", "held_out")
    }
    tokenizer = train_tokenizer(text for side, texts in sides.items() if side.endswith("train") for text in texts)
    tokenizer.save(str(cache / "tokenizer.json"))
    arrays: dict[str, NDArray[Any]] = {}
    for side, texts in sides.items():
        tokens = [page.ids for page in tokenizer.encode_batch(texts)]
        arrays[side] = rows_of(tokens, length)
        language, _, kind = side.partition("_")
        if kind == "held_out":
            share = sum(len(text.encode()) + 1 for text in texts) / sum(len(page) + 1 for page in tokens)
            arrays[f"{language}_bytes_per_token"] = np.array([share])
    return arrays


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` tokens, of which the first is `END`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rows_of(pages: Iterable[list[int]], length: int) -> NDArray[np.uint16]:
    """Pages in an order of their own, one after the other with `END` behind each, cut to full rows.

    Raises:
        ValueError: Not even one row.
    """
    listed = list(pages)
    order = np.random.default_rng(0).permutation(len(listed))
    stream = np.array([token for index in order for token in (*listed[index], END_TOKEN)], dtype=np.uint16)
    rows = len(stream) // length
    if not rows:
        raise ValueError(f"{len(stream)} tokens of {len(listed)} pages do not fill one row of {length}")
    return stream[: rows * length].reshape(rows, length)
