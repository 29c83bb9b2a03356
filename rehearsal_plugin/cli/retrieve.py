"""`rehearsal retrieve`: search in a checkpoint by text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RetrievalConfig
from rehearsal_plugin.config.names import Pool
from rehearsal_plugin.config.section import refusing
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import DataError
from rehearsal_plugin.retrieval import Retrieved, Retriever, TextEmbedder, Where, unpack_texts
from rehearsal_plugin.retrieval.stored import stored_rows

__all__ = ["retrieve"]

Option = typer.Option

TEXT_FIELDS = ("text", "input_ids")
EMBEDDING_FIELDS = ("rehearsal.embedding", "embedding")

Texts = Callable[[Mapping[str, Tensor]], list[str]]


def retrieve(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint; the newest complete one in it is taken.")],
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    k: Annotated[int, Option("-k", min=1, help="Rows.")] = 5,
    text: Annotated[str | None, Option(help="Field with the text: UTF-8 bytes, or tokens with --tokenizer.")] = None,
    tokenizer: Annotated[Path | None, Option(help="Folder of the tokenizer of rows of tokens.")] = None,
    embedding: Annotated[
        str | None, Option(help="Field with the embedding; where there is none, embeddings are made of the texts.")
    ] = None,
    model: Annotated[
        Path | None, Option(help="Folder of the model that makes embeddings; all-MiniLM-L6-v2 when left out.")
    ] = None,
    module: Annotated[
        str | None, Option(help="Module of it whose hidden states are taken; else the last ones.")
    ] = None,
    pool: Annotated[str, Option(help="mean or last: of all tokens, or the last one.")] = "mean",
    metric: Annotated[str, Option(help="cosine, inner_product or l2.")] = "cosine",
    partition: Annotated[list[int] | None, Option(help="Only rows of this partition; several are fine.")] = None,
    origin: Annotated[list[int] | None, Option(help="Only rows admitted on this rank; several are fine.")] = None,
    max_age: Annotated[int | None, Option(min=0, help="Only rows admitted in that many steps before the end.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find the rows that are nearest to a text."""
    if pool not in ("mean", "last"):
        raise typer.BadParameter("--pool is mean or last")
    buffer, step = stored_rows(checkpoint)
    names = [field.name for field in (*buffer.layout.state, *buffer.layout.fields)]
    read_texts = _text_reader(buffer.layout, names, text, tokenizer)
    field = embedding or next((name for name in EMBEDDING_FIELDS if name in names), None)
    with refusing(RetrievalConfig):
        config = RetrievalConfig.model_validate({"metric": metric, **({} if field is None else {"embedding": field})})
    optional_import("transformers", extra="transformers").utils.logging.disable_progress_bar()
    pooling: Pool = "last" if pool == "last" else "mean"
    embedder = TextEmbedder(model, module=module, pool=pooling)
    embed = None if field is not None else lambda columns: embedder(read_texts(columns))
    where = Where(partition or None, origin or None, max_age=max_age)
    with Retriever(buffer, config, transport=LocalTransport(), embed=embed, now=step) as retriever:
        answer = retriever.search(_checked_query(embedder([query]), buffer.layout, field), k, where)
    _print_rows(_rows_in(answer, read_texts), as_json)


def _text_reader(layout: RowLayout, names: Sequence[str], name: str | None, tokenizer: Path | None) -> Texts:
    """A function from the fields of rows to their texts.

    Raises:
        DataError: There is no such field, or it holds tokens and no tokenizer is named.
    """
    name = name or next((field for field in TEXT_FIELDS if field in names), None)
    if name is None or name not in names:
        raise DataError(f"rows have no field '{name or 'text'}' but {sorted(names)}; name the one that holds the text")
    if layout.field(name).dtype == torch.uint8:
        return lambda columns: unpack_texts(columns[name])
    if layout.field(name).dtype not in (torch.int64, torch.int32, torch.int16):
        raise DataError(f"field '{name}' holds {layout.field(name).dtype}, which is neither bytes nor tokens of a text")
    if tokenizer is None:
        raise DataError(f"field '{name}' holds tokens; give --tokenizer FOLDER to read them")
    transformers = optional_import("transformers", extra="transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)

    def decode(columns: Mapping[str, Tensor]) -> list[str]:
        texts: list[str] = loaded.batch_decode(columns[name].tolist(), skip_special_tokens=True)
        return texts

    return decode


def _checked_query(query: Tensor, layout: RowLayout, field: str | None) -> Tensor:
    """The embedding `[1, width]` of a query, if it has the length of the embeddings in the field.

    Raises:
        DataError: It has another length, so it comes from another model.
    """
    width = query.shape[1] if field is None else math.prod(layout.field(field).shape)
    if query.shape[1] != width:
        raise DataError(
            f"field '{field}' holds embeddings of {width} numbers, and the model makes some of {query.shape[1]}; name "
            "the one that made those of the rows with --model, or with --embedding another field"
        )
    return query


def _rows_in(answer: Retrieved, read_texts: Texts) -> list[dict[str, Any]]:
    count = int(answer.found[0])
    texts = read_texts({name: column[0, :count] for name, column in answer.fields().items()}) if count else []
    numbers = (answer.scores, answer.partition, answer.origin, answer.written)
    columns = zip(texts, *(column[0, :count].tolist() for column in numbers), strict=True)
    return [dict(zip(("text", "score", "partition", "origin", "step"), row, strict=True)) for row in columns]


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table("score", "partition", "origin", "text")
    for row in rows:
        table.add_row(f"{row['score']:.4f}", str(row["partition"]), str(row["origin"]), row["text"])
    Console(markup=False, emoji=False).print(table)
