"""`rehearsal seed`: which rows come out of a data set or a model, and how problems are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import chisquare
from torch import Tensor
from typer.testing import CliRunner

from rehearsal_plugin import Rehearsal, RehearsalConfig, cli
from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.checkpoint.convert import (
    Sample,
    Sampling,
    arrow_files,
    columns,
    load_tokenizer,
    read_packed_texts,
    synthesize_rows,
    text,
)
from rehearsal_plugin.checkpoint.record import rows_for_rank
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, CheckpointError, DataError, MissingDependencyError
from tests.helpers.chance import SIGNIFICANCE, equally_included
from tests.helpers.language import END, PAD, model_in, tokenizer_in
from tests.helpers.paths import ROOT
from tests.helpers.samples import Batch, same, samples

LENGTH = 8
SURER = 12.0
"""Times which the tokens of a random model are not all alike to it, and none is left out."""


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["seed", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.replace("│", " ").split())


def rows_in(folder: Path) -> Batch:
    """All rows of a checkpoint."""
    taken = rows_for_rank(tools.newest_files(folder), 0, 1)
    assert taken is not None
    batch: Batch = taken.layout.unpack(taken.rows.read_all()[:])
    return batch


def by_id(batch: Batch) -> Batch:
    return {name: value[batch["id"].argsort()] for name, value in batch.items()}


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


# --- columns ---------------------------------------------------------------------------------------------------------


def table(amount: int = 20) -> Batch:
    ids = torch.arange(amount)
    image = (ids[:, None, None] * torch.ones(2, 3)).to(torch.uint8)
    return {"image": image, "score": ids.float() / 7, "odd": ids % 2 == 1, "id": ids}


def as_safetensors(path: Path, batch: Batch) -> None:
    save_file(batch, path)


def as_npz(path: Path, batch: Batch) -> None:
    np.savez(path, **{name: value.numpy() for name, value in batch.items()})  # type: ignore[arg-type]


def arrow_of(batch: Batch, lists: str = "list") -> Any:
    def column(values: Tensor) -> Any:
        if values.ndim == 1:
            return pa.array(values.numpy())
        inner = column(values.flatten(0, 1))
        if lists == "fixed":
            return pa.FixedSizeListArray.from_arrays(inner, values.shape[1])
        return pa.ListArray.from_arrays(np.arange(len(values) + 1) * values.shape[1], inner)

    return pa.table({name: column(value) for name, value in batch.items()})


def as_arrow(path: Path, batch: Batch) -> None:
    feather.write_feather(arrow_of(batch, "fixed"), str(path), chunksize=7)


def as_stream(path: Path, batch: Batch) -> None:
    """As data sets of Hugging Face are stored."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, arrow_of(batch).schema) as writer:
        writer.write_table(arrow_of(batch), max_chunksize=6)


def as_parquet(path: Path, batch: Batch) -> None:
    parquet.write_table(arrow_of(batch), path, row_group_size=9)


FORMS: dict[str, tuple[str, Callable[[Path, Batch], None]]] = {
    "safetensors": (".safetensors", as_safetensors),
    "npz": (".npz", as_npz),
    "arrow": (".arrow", as_arrow),
    "arrow stream": (".arrow", as_stream),
    "parquet": (".parquet", as_parquet),
}
every_form = pytest.mark.parametrize("form", FORMS)


def written(folder: Path, form: str, batch: Batch | None = None, name: str = "data") -> Path:
    ending, write = FORMS[form]
    path = folder / f"{name}{ending}"
    write(path, table() if batch is None else batch)
    return path


@every_form
def test_columns_become_fields_bit_for_bit(form: str, tmp_path: Path) -> None:
    call("--data", written(tmp_path, form), "--out", tmp_path / "out")
    assert same(by_id(rows_in(tmp_path / "out")), table())


@every_form
def test_data_is_read_piece_by_piece(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_files, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(sys.modules["rehearsal_plugin.checkpoint.convert.columns"], "BYTES_AT_ONCE", 5 * 8 * 9)
    found = list(columns([written(tmp_path, form)]))
    assert max(len(batch["id"]) for batch in found) <= 5
    assert same(joined(found), table())


@every_form
def test_fields_can_be_chosen_and_cast(form: str, tmp_path: Path) -> None:
    path, out = written(tmp_path, form), tmp_path / "out"
    call("--data", path, "--fields", "id,image", "--cast", "image=int64", "--partition", "domain=-3", "--out", out)
    rows, whole = by_id(rows_in(out)), table()
    expected = {"image": whole["image"].long(), "id": whole["id"], "domain": torch.full((20,), -3)}
    assert set(rows) == set(expected)
    assert all(torch.equal(rows[name], expected[name]) for name in expected)
    assert tools.inspect(out)["offered_by_partition"] == {-3: 20}


def test_several_files_and_folders_are_one_data_set(tmp_path: Path) -> None:
    parts = [{name: value[first : first + 5] for name, value in table().items()} for first in range(0, 20, 5)]
    (tmp_path / "more" / "below").mkdir(parents=True)
    first = written(tmp_path, "npz", parts[0])
    second = written(tmp_path, "parquet", dict(reversed(parts[1].items())))  # fields go by their names
    written(tmp_path / "more", "safetensors", parts[2])
    written(tmp_path / "more" / "below", "arrow", parts[3])
    (tmp_path / "more" / "README.md").write_text("no data")
    call("--data", first, second, tmp_path / "more", "--out", tmp_path / "out")
    assert same(by_id(rows_in(tmp_path / "out")), table())


def test_what_was_exported_can_be_seeded(tmp_path: Path) -> None:
    call("--data", written(tmp_path, "npz"), "--out", tmp_path / "first")
    tools.export(tmp_path / "first", tmp_path / "rows.safetensors")
    call("--data", tmp_path / "rows.safetensors", "--out", tmp_path / "second")
    assert same(by_id(rows_in(tmp_path / "second")), table()), "without the columns of the export"


def test_it_tells_what_it_wrote(tmp_path: Path) -> None:
    path = written(tmp_path, "npz")
    shown = call("--data", path, "--rows", 12, "--partition", "domain=4", "--ranks", 2, "--out", tmp_path / "out")
    assert "step 0, 2 ranks, 12 rows of 80 bytes" in shown
    assert "rows only; policy reservoir, seeded from data" in shown
    assert "image uint8 [2, 3]" in shown
    assert "4 12 20" in shown, "12 rows of 20 that were offered"


# --- the sample ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_every_row_of_the_data_has_the_same_chance(batch_size: int) -> None:
    counts, trials = np.zeros(30, dtype=int), 300
    for seed in range(trials):
        sample = Sample(6, seed=seed)
        for first in range(0, 30, batch_size):
            sample.offer({"id": torch.arange(first, min(30, first + batch_size))})
        ids = sample._layout.unpack(sample._rows[:6])["id"] if sample._layout else None
        assert ids is not None
        counts[ids.numpy()] += 1
        assert sample.offered == 30
    assert counts.sum() == 6 * trials
    assert equally_included(counts.tolist(), trials, 6) > SIGNIFICANCE


def test_the_same_seed_draws_the_same_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "npz", table(200))
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        call("--data", path, "--rows", 20, "--seed", seed, "--out", tmp_path / name)
    one, again, other = (by_id(rows_in(tmp_path / name)) for name in ("one", "same", "other"))
    assert same(one, again)
    assert not same(one, other)


@pytest.mark.parametrize("ranks", [1, 3, 25])
def test_files_share_out_the_rows_and_what_they_stand_for(ranks: int, tmp_path: Path) -> None:
    path = written(tmp_path, "npz", table(100))
    call("--data", path, "--rows", 20, "--ranks", ranks, "--out", tmp_path / "out")
    found = tools.inspect(tmp_path / "out")
    assert (found["ranks"], found["rows"]) == (ranks, 20)
    assert max(found["rows_by_rank"]) - min(found["rows_by_rank"]) <= 1
    assert abs(found["offered_by_partition"][0] - 100) <= ranks
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "out").iterdir())


def test_rows_may_stand_for_more_or_less_than_was_read(tmp_path: Path) -> None:
    path = written(tmp_path, "npz")
    for seen in (12, 10**9):
        call("--data", path, "--rows", 12, "--seen", seen, "--out", tmp_path / str(seen))
        assert tools.inspect(tmp_path / str(seen))["offered_by_partition"] == {0: seen}


def test_a_sample_of_more_than_there_is_has_all_there_is(tmp_path: Path) -> None:
    call("--data", written(tmp_path, "npz"), "--rows", 1000, "--out", tmp_path / "out")
    assert same(by_id(rows_in(tmp_path / "out")), table())


def test_later_files_need_the_fields_of_the_first(tmp_path: Path) -> None:
    sample = Sample()
    sample.offer(samples(torch.arange(3)))
    with pytest.raises(BatchError, match=r"'x' was torch\.float64 .* now torch\.float32"):
        sample.offer({**samples(torch.arange(3)), "x": torch.zeros(3, 3)})


# --- texts -----------------------------------------------------------------------------------------------------------

DOCUMENTS = [f"the cat sat on mat number {number}\n" * (1 + number % 3) for number in range(40)]


def as_texts(folder: Path, form: str) -> list[Path]:
    """The documents as files."""
    if form == "txt":
        for number, document in enumerate(DOCUMENTS):
            (folder / f"{number:03}.txt").write_text(document)
        return [folder]
    path = folder / f"texts.{form}"
    if form == "jsonl":
        path.write_text("\n\n".join(json.dumps({"text": document, "more": 1}) for document in DOCUMENTS))
    elif form == "parquet":
        parquet.write_table(pa.table({"text": DOCUMENTS, "more": [1] * 40}), path)
    else:
        feather.write_feather(pa.table({"text": DOCUMENTS}), str(path))
    return [path]


def stream_of(tokenizer: Any) -> list[int]:
    """All documents, each with the end behind it."""
    return [token for one in DOCUMENTS for token in (*tokenizer(one)["input_ids"], tokenizer.eos_token_id)]


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet", "arrow"])
def test_documents_are_joined_and_cut_into_rows(form: str, tmp_path: Path) -> None:
    tokenizer, out = tokenizer_in(tmp_path / "model"), tmp_path / "out"
    (tmp_path / "data").mkdir()
    paths = as_texts(tmp_path / "data", form)
    call("--data", *paths, "--tokenizer", tmp_path / "model", "--length", LENGTH, "--out", out)
    stream, rows = stream_of(tokenizer), rows_in(out)
    count = len(stream) // LENGTH
    found, expected = sorted(rows["input_ids"].tolist()), np.array(stream[: count * LENGTH]).reshape(count, LENGTH)
    assert found == sorted(expected.tolist()), "every token but those left at the end, in its row"
    assert len(stream) % LENGTH, "there are some"
    assert tools.inspect(out)["offered_by_partition"] == {0: count}


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
def test_however_much_is_read_at_a_time(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHARACTERS_AT_ONCE", at_once)
    tokenizer = tokenizer_in(tmp_path / "model")
    paths = as_texts(tmp_path, "jsonl")
    found = joined(list(read_packed_texts(paths, load_tokenizer(tmp_path / "model"), LENGTH)))["input_ids"].flatten()
    assert found.tolist() == stream_of(tokenizer)[: len(found)]


@pytest.mark.parametrize("special", [{}, {"pad_token": PAD}, {"pad_token": END}])
def test_rows_are_as_the_data_collator_of_transformers_gives_them(special: dict[str, str], tmp_path: Path) -> None:
    from transformers import DataCollatorForLanguageModeling

    tokenizer = tokenizer_in(tmp_path / "model", **special)
    paths = as_texts(tmp_path, "jsonl")
    rows = joined(list(read_packed_texts(paths, load_tokenizer(tmp_path / "model"), LENGTH)))
    if not special:
        tokenizer.pad_token = PAD  # the collator needs one
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([{"input_ids": ids, "attention_mask": [1] * LENGTH} for ids in rows["input_ids"].tolist()])
    assert list(rows) == list(batch)
    assert all(torch.equal(rows[name], batch[name]) and rows[name].dtype == batch[name].dtype for name in rows)
    assert (rows["labels"] == -100).any() == (special.get("pad_token") == END)


def test_a_file_of_the_tokenizers_library_will_do(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "model")
    paths, file = as_texts(tmp_path, "jsonl"), tmp_path / "model" / "tokenizer.json"
    whole = joined(list(read_packed_texts(paths, load_tokenizer(tmp_path / "model"), LENGTH)))
    assert same(joined(list(read_packed_texts(paths, load_tokenizer(file, END), LENGTH))), whole)
    with pytest.raises(DataError, match="which token ends a document"):
        next(read_packed_texts(paths, load_tokenizer(file), LENGTH))
    with pytest.raises(DataError, match="no token '<nope>'"):
        load_tokenizer(file, "<nope>")


def test_the_text_may_be_under_another_key(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "the cat sat " * 10}))
    out = tmp_path / "out"
    line = ["--tokenizer", tmp_path / "model", "--length", 4, "--text-key", "body", "--fields", "labels", "--out", out]
    call("--data", tmp_path / "a.jsonl", *line)
    assert list(rows_in(out)) == ["labels"]


# --- what a model says -----------------------------------------------------------------------------------------------


def said(folder: Path, rows: int = 6, length: int = LENGTH, prompts: Path | None = None, **sampling: Any) -> Tensor:
    return joined(list(synthesize_rows(folder, rows, length, Sampling(**sampling), prompts)))["input_ids"]


def chances(model: Any, before: list[int]) -> np.ndarray[Any, Any]:
    """What the model gives each token behind others."""
    with torch.no_grad():
        scores = model(torch.tensor([before])).logits[0, -1].double()
    return np.asarray(scores.softmax(0).numpy())


@pytest.mark.parametrize(("bos", "eos"), [(3, None), (None, 3), (3, 5)])
def test_tokens_are_drawn_from_the_models_own_distribution(bos: int | None, eos: int | None, tmp_path: Path) -> None:
    model = model_in(tmp_path, vocabulary=12, scale=SURER, bos_token_id=bos, eos_token_id=eos)
    sharper = {"do_sample": True, "temperature": 0.1, "top_k": 2, "repetition_penalty": 2.0}
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": eos, **sharper}))
    rows = said(tmp_path, rows=4000, length=2, batch_size=1000).numpy()
    likely = chances(model, [3])
    assert 5 / 4000 < likely.min() < likely.max() / 4, "it is not all the same to the model"
    assert chisquare(np.bincount(rows[:, 0], minlength=12), 4000 * likely).pvalue > SIGNIFICANCE
    behind = rows[rows[:, 0] == likely.argmax(), 1]
    expected = len(behind) * chances(model, [3, int(likely.argmax())])
    assert expected.min() > 1
    assert chisquare(np.bincount(behind, minlength=12), expected).pvalue > SIGNIFICANCE


def test_all_tokens_are_drawn_from_unless_the_draw_is_narrowed(tmp_path: Path) -> None:
    model_in(tmp_path, vocabulary=80, eos_token_id=2)
    assert len(set(said(tmp_path, rows=2000, length=1, batch_size=2000).flatten().tolist())) > 70


def test_a_model_without_bos_and_eos_begins_with_any_token(tmp_path: Path) -> None:
    for token in (None, 50256):  # the second is not in the vocabulary
        model_in(tmp_path / str(token), vocabulary=12, scale=SURER, bos_token_id=token, eos_token_id=token)
        rows = said(tmp_path / str(token), rows=2000, length=2, batch_size=2000).numpy()
        assert chisquare(np.bincount(rows[:, 0], minlength=12)).pvalue > SIGNIFICANCE


def test_a_row_goes_on_behind_the_end_of_a_document(tmp_path: Path) -> None:
    model_in(tmp_path, vocabulary=4, eos_token_id=2)
    rows = said(tmp_path, rows=50, length=32)
    assert rows.shape == (50, 32)
    ended = (rows[:, :20] == 2).any(1)
    assert ended.all()
    assert len(torch.unique(rows[:, 20:], dim=0)) == 50, "it is no padding"


def test_the_same_seed_says_the_same_and_leaves_other_random_numbers_alone(tmp_path: Path) -> None:
    model_in(tmp_path, vocabulary=30, eos_token_id=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (said(tmp_path, rows=40, batch_size=16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(torch.unique(one, dim=0)) == 40, "batches do not repeat each other"


def test_the_draw_can_be_narrowed(tmp_path: Path) -> None:
    model = model_in(tmp_path, vocabulary=12, scale=SURER, eos_token_id=2)
    likeliest = torch.from_numpy(chances(model, [2])).argsort(descending=True)
    narrow: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}]
    for sampling in narrow:
        assert set(said(tmp_path, rows=20, length=1, **sampling).flatten().tolist()) == {likeliest[0].item()}
    drawn = said(tmp_path, rows=200, length=1, top_k=3)
    assert set(drawn.flatten().tolist()) == set(likeliest[:3].tolist())


def test_rows_begin_with_the_prompts_in_turn(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, pad_token=END)
    model_in(tmp_path, vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    lines = ["the cat", "the dog sat on", "it", "cats"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(lines))
    out = tmp_path / "out"
    more = ["--rows", 10, "--length", 16, "--prompts", tmp_path / "prompts.txt", "--batch-size", 2, "--out", out]
    shown = call("--from-model", tmp_path, *more)
    assert "seeded from a model" in shown
    rows = rows_in(out)
    assert list(rows) == ["input_ids", "attention_mask", "labels"]
    begins = [tokenizer(line)["input_ids"] for line in lines]
    found = [[ids[: len(begin)] == begin for begin in begins].index(True) for ids in rows["input_ids"].tolist()]
    assert np.bincount(found).tolist() == [3, 3, 2, 2]
    assert len(torch.unique(rows["input_ids"], dim=0)) == 10
    ends = rows["input_ids"] == tokenizer.eos_token_id
    assert torch.equal(rows["labels"], rows["input_ids"].masked_fill(ends, -100))


def test_a_job_rehearses_what_its_model_said(tmp_path: Path) -> None:
    model_in(tmp_path / "model", vocabulary=30, eos_token_id=2)
    call("--from-model", tmp_path / "model", "--rows", 40, "--length", LENGTH, "--out", tmp_path / "seed")
    rows = set(map(tuple, rows_in(tmp_path / "seed")["input_ids"].tolist()))
    section = {"buffer": {"capacity": 100, "preload": str(tmp_path / "seed")}, "representatives": 4}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for _ in range(10):
            ids = torch.full((6, LENGTH), 29)
            batch = rehearsal.update({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
        assert set(map(tuple, batch["input_ids"].tolist())) & rows


# --- failures --------------------------------------------------------------------------------------------------------


def failing(folder: Path) -> dict[str, list[Any]]:
    """Calls that cannot work, by what they say."""
    tokenizer_in(folder / "model")
    model_in(folder / "model", vocabulary=300, eos_token_id=2)
    data, out = written(folder, "npz"), ["--out", folder / "out"]
    ragged, nulls, words = folder / "ragged.parquet", folder / "nulls.parquet", folder / "words.parquet"
    parquet.write_table(pa.table({"x": [[1, 2], [3]]}), ragged)
    parquet.write_table(pa.table({"x": [1, None]}), nulls)
    parquet.write_table(pa.table({"x": ["a", "b"]}), words)
    save_file({"x": torch.zeros(3, 2), "y": torch.zeros(4)}, folder / "uneven.safetensors")
    (folder / "broken.npz").write_bytes(data.read_bytes()[:100])
    (folder / "broken.safetensors").write_bytes(b"x" * 20)
    (folder / "broken.parquet").write_bytes(b"x" * 20)
    (folder / "broken.arrow").write_bytes(b"x" * 20)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    (folder / "keyless.jsonl").write_text('{"body": "a"}')
    (folder / "number.jsonl").write_text('{"text": 5}')
    (folder / "short.jsonl").write_text('{"text": "a"}')
    (folder / "latin.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "long.txt").write_text("the cat " * 50)
    (folder / "empty").mkdir()
    text_of = ["--tokenizer", folder / "model", "--length", 8, *out, "--data"]
    model = ["--from-model", folder / "model", "--rows", 2, *out, "--length"]
    made = folder / "made"
    call("--data", data, "--out", made)
    return {
        "no file that ends in .arrow, .idx, .json, .jsonl, .npz": ["--data", folder / "rows.csv", *out],
        "and no folder of such files": ["--data", folder / "empty", *out],
        "missing.npz cannot be read": ["--data", folder / "missing.npz", *out],
        "has no columns ['z']; it has ['id', 'image', 'odd', 'score']": ["--data", data, "--fields", "z", *out],
        "ragged.parquet has rows of 1 to 2 entries": ["--data", ragged, *out],
        "has 1 nulls": ["--data", nulls, *out],
        "holds string, and fields are numbers": ["--data", words, *out],
        "have not one length but {'x': 3, 'y': 4}": ["--data", folder / "uneven.safetensors", *out],
        "broken.npz cannot be read": ["--data", folder / "broken.npz", *out],
        "broken.safetensors cannot be read": ["--data", folder / "broken.safetensors", *out],
        "broken.parquet cannot be read": ["--data", folder / "broken.parquet", *out],
        "broken.arrow cannot be read": ["--data", folder / "broken.arrow", *out],
        "has fields ['id'] already": ["--data", data, "--partition", "id=0", *out],
        "20 rows cannot stand for 3": ["--data", data, "--seen", 3, *out],
        "holds checkpoints already": ["--data", data, "--out", made],
        "line 2 of": [*text_of, folder / "broken.jsonl"],
        "has no 'text'": [*text_of, folder / "keyless.jsonl"],
        "holds a int where a text should be": [*text_of, folder / "number.jsonl"],
        "there are no rows to begin with": [*text_of, folder / "short.jsonl"],
        "latin.txt cannot be read": [*text_of, folder / "latin.txt"],
        "neither the folder nor the file of a tokenizer": ["--tokenizer", folder / "no", *text_of[2:], ragged],
        "is no file of a tokenizer": ["--tokenizer", ragged, *text_of[2:], folder / "short.jsonl"],
        "no config.json": ["--from-model", folder / "empty", *model[2:], 4],
        "sees at most 32 tokens, and rows shall have 33": [*model, 33],
        "holds no prompts": [*model, 4, "--prompts", folder / "empty" / ".." / "blank"],
        "tokens, and a row has 9; cut it": [*model, 9, "--prompts", folder / "long.txt"],
    }


def test_problems_are_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blank").write_text("\n  \n")
    for message, arguments in failing(tmp_path).items():
        monkeypatch.setattr(sys, "argv", ["rehearsal", "seed", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        told = capfd.readouterr().err.splitlines()[-1]
        assert (caught.value.code, told[:10]) == (1, "rehearsal:"), told
        assert message in told
        assert not (tmp_path / "out").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("either --data or --from-model", []),
        ("either --data or --from-model", ["--data", "a.npz", "--from-model", "model"]),
        ("--rows and --length", ["--from-model", "model", "--rows", "5"]),
        ("needs --length", ["--data", "a.jsonl", "--tokenizer", "model"]),
        ("texts and chats need --tokenizer and --length", ["--data", "a.txt"]),
        ("FIELD=INTEGER", ["--data", "a.npz", "--partition", "domain=x"]),
        ("FIELD=VALUE", ["--data", "a.npz", "--partition", "domain"]),
        ("no dtype of torch", ["--data", "a.npz", "--cast", "x=int65"]),
        ("above 0", ["--from-model", "model", "--rows", "5", "--length", "5", "--temperature", "0"]),
    ],
)
def test_calls_that_make_no_sense_are_refused(message: str, arguments: list[str], tmp_path: Path) -> None:
    assert message in call(*arguments, "--out", tmp_path, code=2)


@pytest.mark.parametrize("module", ["pyarrow", "transformers", "tokenizers"])
def test_what_is_not_installed_is_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "parquet")
    tokenizer_in(tmp_path / "model")
    monkeypatch.setitem(sys.modules, module, None)
    ways: dict[str, Callable[[], object]] = {
        "pyarrow": lambda: next(columns([path])),
        "transformers": lambda: load_tokenizer(tmp_path / "model"),
        "tokenizers": lambda: load_tokenizer(tmp_path / "model" / "tokenizer.json"),
    }
    with pytest.raises(MissingDependencyError, match=rf"{module}.* pip install 'rehearsal_plugin\[\w+\]'"):
        ways[module]()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    sample = Sample()
    sample.offer(table())
    with pytest.raises(CheckpointError, match="Not a directory"):
        sample.save(tmp_path / "file" / "out")


# --- the docs --------------------------------------------------------------------------------------------------------

DOC = (ROOT / "docs" / "guides" / "preloading.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def test_the_commands_of_the_docs_run_as_they_stand(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path / "model", pad_token=PAD)
    model_in(tmp_path / "model", vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    (tmp_path / "old").mkdir()
    lines = [json.dumps({"text": document}) for document in DOCUMENTS * 20]
    for half in range(2):
        (tmp_path / "old" / f"{half}.jsonl").write_text("\n".join(lines[half::2]))
    np.savez(tmp_path / "old" / "images.npz", image=np.zeros((60, 4, 4)), label=np.arange(60), name=np.array("x"))
    (commands,), (block,) = blocks("bash"), blocks("json")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    amounts = {name: tools.inspect(tmp_path / name)["rows"] for name in ("from-text", "from-columns", "from-model")}
    assert amounts == {"from-text": 200, "from-columns": 50, "from-model": 100}
    preloaded = RehearsalConfig.load(json.loads(block)).buffer.preload
    assert preloaded in amounts
