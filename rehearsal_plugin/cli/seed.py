"""`rehearsal seed`: rows to preload, from data or from a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.checkpoint.convert import (
    Sample,
    Sampling,
    columns,
    load_chat_encoder,
    load_tokenizer,
    read_packed_chats,
    read_packed_texts,
    read_packed_tokens,
    synthesize_rows,
)
from rehearsal_plugin.cli.progress import ProgressBar, busy
from rehearsal_plugin.cli.tables import print_summary

__all__ = ["seed"]

Option = typer.Option


def seed(
    out: Annotated[Path, Option(help="Folder of the new checkpoint.")],
    paths: Annotated[list[Path] | None, typer.Argument(help="More of --data.", show_default=False)] = None,
    data: Annotated[
        list[Path] | None,
        Option(
            help="Files, or folders of them: .jsonl, .json (and .gz, .zst), .parquet, .arrow, .npz, .safetensors, "
            ".txt, WebDataset .tar, Megatron .idx, MDS shards, and what save_to_disk wrote."
        ),
    ] = None,
    from_model: Annotated[
        Path | None, Option(help="Folder of a causal language model that makes up the rows; needs --rows and --length.")
    ] = None,
    rows: Annotated[int | None, Option(min=1, help="Rows, drawn uniformly; all of the data when left out.")] = None,
    length: Annotated[int | None, Option(min=1, help="Tokens of a row.")] = None,
    tokenizer: Annotated[Path | None, Option(help="Folder, or file such as tokenizer.json.")] = None,
    eos: Annotated[str | None, Option(help="Token that ends a document; else the tokenizer's own.")] = None,
    text_key: Annotated[str | None, Option(help="Key or column of the text; else text, or messages.")] = None,
    chat: Annotated[bool, Option("--chat", help="Rows are chats, for the template of --tokenizer.")] = False,
    split: Annotated[str | None, Option(help="Split of a data set that has several, such as train.")] = None,
    fields: Annotated[str | None, Option(help="Fields of a row, with commas between; all when left out.")] = None,
    cast: Annotated[list[str] | None, Option(help="FIELD=DTYPE, such as input_ids=int64.")] = None,
    partition: Annotated[list[str] | None, Option(help="FIELD=INTEGER that all rows get, such as domain=0.")] = None,
    seen: Annotated[int | None, Option(min=1, help="Rows that these stand for; else as many as were read.")] = None,
    ranks: Annotated[int, Option(min=1, help="Files that the rows are shared out between.")] = 1,
    prompts: Annotated[Path | None, Option(help="File with a text a line, which samples begin with.")] = None,
    temperature: Annotated[float, Option(help="Above 0; 1 is the model's own distribution.")] = 1.0,
    top_k: Annotated[int, Option(min=0, help="Draw from that many of the likeliest tokens; 0 from all.")] = 0,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens with that probability together.")] = 1.0,
    batch_size: Annotated[int, Option(min=1, help="Rows that the model makes up at a time.")] = 32,
    device: Annotated[str | None, Option(help="Of the model; a GPU if there is one.")] = None,
    random_seed: Annotated[int, Option("--seed", min=0, help="Of the draw.")] = 0,
) -> None:
    """Write rows that jobs begin with: a sample of a data set, or of what a model says."""
    files, chosen = [*(data or []), *(paths or [])], None if fields is None else fields.split(",")
    if bool(files) == (from_model is not None):
        raise typer.BadParameter("give either --data or --from-model")
    if from_model is not None:
        if rows is None or length is None:
            raise typer.BadParameter("--from-model needs --rows and --length")
        if temperature <= 0 or not 0 < top_p <= 1:
            raise typer.BadParameter("--temperature is above 0, and --top-p above 0 and at most 1")
        sampling = Sampling(temperature, top_k, top_p, batch_size, random_seed, device)
        batches = synthesize_rows(from_model, rows, length, sampling, prompts)
    else:
        needs = Content(tokenizer, eos, length, text_key, chat, split)
        batches = _read_data(files, needs, chosen, _parse_casts(cast or []))
    sample = Sample(rows, fields=chosen, constants=_parse_partitions(partition or []), seed=random_seed)
    _offer_rows(sample, batches, rows if from_model is not None else None)
    with busy(f"writing {out}"):
        sample.save(out, ranks, seen, source="data" if from_model is None else "a model")
        summary = tools.inspect(out)
    print_summary(summary)


@dataclass(frozen=True)
class Content:
    """What the options say of the content of the data."""

    tokenizer: Path | None
    eos: str | None
    length: int | None
    text_key: str | None
    chat: bool
    split: str | None


def _read_data(
    files: list[Path], content: Content, fields: list[str] | None, casts: dict[str, torch.dtype]
) -> Iterator[dict[str, Tensor]]:
    """Chats, texts, lists of tokens or columns, as the options say."""
    tokenizer, length, split = content.tokenizer, content.length, content.split
    if tokenizer is None:
        if content.chat or any(".txt" in path.suffixes for path in files):
            raise typer.BadParameter("texts and chats need --tokenizer and --length")
        if length is None:
            return columns(files, fields, casts, split)
        return read_packed_tokens(files, length, fields, casts, split)
    if length is None:
        raise typer.BadParameter("--tokenizer needs --length")
    if content.chat:
        return read_packed_chats(files, load_chat_encoder(tokenizer), length, content.text_key or "messages", split)
    return read_packed_texts(files, load_tokenizer(tokenizer, content.eos), length, content.text_key or "text", split)


def _offer_rows(sample: Sample, batches: Iterator[dict[str, Tensor]], total: int | None) -> None:
    """Offer all rows, with a progress bar on a terminal."""
    with ProgressBar("rows", total) as progress:
        start = time.monotonic()
        for batch in batches:
            sample.offer(batch)
            speed = sample.offered / max(1e-9, time.monotonic() - start)
            progress.set(sample.offered, f"{speed:,.0f} rows/s")


def _split_pairs(pairs: list[str], option: str) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        name, equals, value = pair.rpartition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{option} takes FIELD=VALUE, and not '{pair}'")
        yield name, value


def _parse_casts(pairs: list[str]) -> dict[str, torch.dtype]:
    dtypes = {name: getattr(torch, value, None) for name, value in _split_pairs(pairs, "--cast")}
    for name, dtype in dtypes.items():
        if not isinstance(dtype, torch.dtype):
            raise typer.BadParameter(f"--cast {name}=... names no dtype of torch")
    return {name: dtype for name, dtype in dtypes.items() if isinstance(dtype, torch.dtype)}


def _parse_partitions(pairs: list[str]) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in _split_pairs(pairs, "--partition")}
    except ValueError as error:
        raise typer.BadParameter(f"--partition takes FIELD=INTEGER: {error}") from error
