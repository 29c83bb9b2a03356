"""`rehearsal seed` from the data files of other tools: each row once, in order, and no file that is not the data's."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from rich.console import Console
from torch import Tensor

from rehearsal_plugin.checkpoint.convert import (
    Sample,
    columns,
    compressed,
    json_records,
    load_tokenizer,
    read_packed_texts,
    read_packed_tokens,
)
from rehearsal_plugin.checkpoint.convert import megatron as megatron_module
from rehearsal_plugin.errors import DataError, MissingDependencyError
from tests.checkpoint.test_convert import LENGTH, call, joined, rows_in
from tests.helpers.data_sets import save_to_disk, write_mds, write_megatron, write_tar
from tests.helpers.language import tokenizer_in

TEXTS = [f"the dog sat on log number {number}. " * (1 + number % 4) for number in range(50)]
LISTS = [list(range(100 * number, 100 * number + 1 + number % 7)) for number in range(60)]
"""Ragged lists of token ids, all of them different."""


def as_lines(values: list[Any], key: str) -> bytes:
    return "\n".join(json.dumps({"id": number, key: value}) for number, value in enumerate(values)).encode()


def as_list(values: list[Any], key: str) -> bytes:
    return json.dumps([{"id": number, key: value} for number, value in enumerate(values)], indent=1).encode()


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    return b"".join(zstandard.ZstdCompressor().compress(half) for half in halves)  # as `cat a.zst b.zst` gives


Writer: TypeAlias = Callable[[Path, list[Any], str], Path]


def write_file(ending: str, write: Callable[[bytes], bytes], form: Callable[[list[Any], str], bytes]) -> Writer:
    def write_values(folder: Path, values: list[Any], key: str) -> Path:
        path = folder / f"data{ending}"
        path.write_bytes(write(form(values, key)))
        return path

    return write_values


def write_mds_values(folder: Path, values: list[Any], key: str) -> Path:
    kind = "str" if isinstance(values[0], str) else "json"
    encoded = [value.encode() if kind == "str" else json.dumps(value).encode() for value in values]
    write_mds(folder / "mds", [{"skip": b"xx", key: value} for value in encoded], {"skip": "bytes", key: kind})
    return folder / "mds"


def write_tar_values(folder: Path, values: list[Any], key: str) -> Path:
    members = {}
    for number, value in enumerate(values):
        members[f"part/{number:04}.jpg"] = b"no text"
        members[f"part/{number:04}.json"] = json.dumps({key: value}).encode()
    write_tar(folder / "data.tar", members)
    return folder / "data.tar"


def write_saved(folder: Path, values: list[Any], key: str) -> Path:
    save_to_disk(folder / "saved", {"id": list(range(len(values))), key: values})
    return folder / "saved"


def write_parquet(folder: Path, values: list[Any], key: str) -> Path:
    parquet.write_table(pa.table({key: values}), folder / "data.parquet", row_group_size=9)
    return folder / "data.parquet"


def unchanged(data: bytes) -> bytes:
    return data


WRITERS: dict[str, Writer] = {
    "jsonl": write_file(".jsonl", unchanged, as_lines),
    "jsonl.gz": write_file(".jsonl.gz", gzip.compress, as_lines),
    "jsonl.zst": write_file(".jsonl.zst", zstd, as_lines),
    "json list": write_file(".json", unchanged, as_list),
    "json lines": write_file(".json", unchanged, as_lines),
    "json.gz": write_file(".json.gz", gzip.compress, as_list),
    "parquet": write_parquet,
    "save_to_disk": write_saved,
    "mds": write_mds_values,
    "webdataset": write_tar_values,
}
every_format = pytest.mark.parametrize("form", WRITERS)


@every_format
def test_texts_of_any_format_are_the_same_rows(form: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path / "model")
    path = WRITERS[form](tmp_path, TEXTS, "text")
    out = tmp_path / "out"
    call("--data", path, "--tokenizer", tmp_path / "model", "--length", LENGTH, "--out", out)
    stream = [token for one in TEXTS for token in (*tokenizer(one)["input_ids"], tokenizer.eos_token_id)]
    count = len(stream) // LENGTH
    assert rows_in(out)["input_ids"].tolist() == np.reshape(stream[: count * LENGTH], (count, LENGTH)).tolist()


def packed(lists: list[list[int]]) -> Tensor:
    stream = torch.tensor([token for one in lists for token in one])
    return stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)


@every_format
def test_lists_of_tokens_are_joined_and_cut_into_rows(form: str, tmp_path: Path) -> None:
    path = WRITERS[form](tmp_path, LISTS, "input_ids")
    call("--data", path, "--length", LENGTH, "--out", tmp_path / "out")
    rows = rows_in(tmp_path / "out")
    assert list(rows) == ["input_ids", "attention_mask", "labels"]
    assert torch.equal(rows["input_ids"], packed(LISTS))
    assert torch.equal(rows["labels"], rows["input_ids"])
    assert bool((rows["attention_mask"] == 1).all())


@every_format
def test_lists_of_one_length_are_fields(form: str, tmp_path: Path) -> None:
    values = [[number, number + 1, number + 2] for number in range(20)]
    path = WRITERS[form](tmp_path, values, "x")
    batch = joined(list(columns([path], ["x"])))
    assert torch.equal(batch["x"], torch.tensor(values))


@every_format
def test_memory_is_bounded(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["rehearsal_plugin.checkpoint.convert.token_columns"], "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(sys.modules["rehearsal_plugin.checkpoint.convert.arrow_files"], "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(json_records, "CHARACTERS_AT_ONCE", 3)
    monkeypatch.setattr(compressed, "BYTES_AT_ONCE", 16)
    found = list(read_packed_tokens([WRITERS[form](tmp_path, LISTS, "input_ids")], LENGTH))
    assert max(len(batch["input_ids"]) for batch in found) <= 4
    assert torch.equal(joined(found)["input_ids"], packed(LISTS))


def test_all_columns_of_tokens_are_cut_alike(tmp_path: Path) -> None:
    labels = [[-100, *one[1:]] for one in LISTS]
    save_to_disk(tmp_path / "d", {"input_ids": LISTS, "labels": labels, "score": [0.5] * 60, "name": ["a"] * 60})
    batch = joined(list(read_packed_tokens([tmp_path / "d"], LENGTH, cast={"labels": torch.int32})))
    assert torch.equal(batch["labels"], packed(labels).int())
    assert torch.equal(batch["input_ids"], packed(LISTS))


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_fields_of_tokens_can_be_chosen(name: str, tmp_path: Path) -> None:
    path = WRITERS["parquet"](tmp_path, LISTS, "input_ids")
    call("--data", path, "--length", LENGTH, "--fields", name, "--out", tmp_path / "out")
    rows = rows_in(tmp_path / "out")
    assert list(rows) == [name]
    assert torch.equal(rows[name], packed(LISTS))


def test_rows_of_arrays_may_be_cut_to_another_length(tmp_path: Path) -> None:
    ids = np.arange(60, dtype=np.int32).reshape(5, 12)
    np.savez(tmp_path / "a.npz", input_ids=ids, score=np.zeros(5))
    (batch,) = read_packed_tokens([tmp_path / "a.npz"], LENGTH)
    assert batch["input_ids"].tolist() == ids.ravel()[:56].reshape(7, 8).tolist()


@pytest.mark.parametrize("fields", [None, ["input_ids", "labels"]])
def test_padding_is_left_out_before_lists_are_joined(fields: list[str] | None, tmp_path: Path) -> None:
    padded = [one + [0] * (8 - len(one)) for one in LISTS]
    masks = [[1] * len(one) + [0] * (8 - len(one)) for one in LISTS]
    parquet.write_table(pa.table({"input_ids": padded, "attention_mask": masks}), tmp_path / "a.parquet")
    batch = joined(list(read_packed_tokens([tmp_path / "a.parquet"], LENGTH, fields)))
    assert torch.equal(batch["input_ids"], packed(LISTS))
    assert torch.equal(batch["labels"], packed(LISTS))
    assert bool(batch["attention_mask"].all())


def test_columns_that_are_not_asked_for_may_hold_anything(tmp_path: Path) -> None:
    odd = pa.array([[1, None]] * 60, pa.list_(pa.int64()))
    parquet.write_table(pa.table({"input_ids": LISTS, "odd": odd}), tmp_path / "a.parquet")
    batch = joined(list(read_packed_tokens([tmp_path / "a.parquet"], LENGTH, ["input_ids"])))
    assert torch.equal(batch["input_ids"], packed(LISTS))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + as_lines(LISTS, "input_ids"))
    assert torch.equal(joined(list(read_packed_tokens([tmp_path / "a.jsonl"], LENGTH)))["input_ids"], packed(LISTS))


# --- folders and splits ----------------------------------------------------------------------------------------------


def ids_of(path: Path, split: str | None = None) -> list[int]:
    found: list[int] = joined(list(columns([path], ["id"], split=split)))["id"].tolist()
    return found


def test_a_saved_data_set_is_the_files_that_it_lists(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "d", {"id": list(range(20))}, files=3)
    assert ids_of(tmp_path / "d") == list(range(20)), "the cache is not read"
    assert ids_of(tmp_path) == list(range(20)), "nor from the folder above"


def test_a_cache_is_refused_and_other_files_of_such_a_name_are_not(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "d", {"id": list(range(20))})
    with pytest.raises(DataError, match=r"is a cache of map\(\) or filter\(\)"):
        ids_of(next((tmp_path / "d").glob("cache-*.arrow")))
    (tmp_path / "cache-sizes").mkdir()
    np.savez(tmp_path / "cache-sizes" / "cache-2024.npz", id=np.arange(3))
    assert ids_of(tmp_path / "cache-sizes") == [0, 1, 2]


def test_a_selection_of_rows_is_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "d", {"id": list(range(20))})
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    (tmp_path / "d" / "state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="holds a selection of rows"):
        ids_of(tmp_path / "d")


def saved_splits(folder: Path) -> None:
    save_to_disk(folder / "train", {"id": list(range(20))}, split="train")
    save_to_disk(folder / "test", {"id": list(range(20, 25))}, split="test")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


def hub_splits(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        table = pa.table({"id": range(10 * number, 10 * number + 10)})
        parquet.write_table(table, folder / "data" / f"train-{number:05}-of-00002.parquet")
    parquet.write_table(pa.table({"id": range(20, 25)}), folder / "data" / "test-00000-of-00001.parquet")


def cached_splits(folder: Path) -> None:
    folder.mkdir()
    for name, values in {"train": range(20), "test": range(20, 25)}.items():
        with pa.OSFile(str(folder / f"wiki-{name}.arrow"), "wb") as file:
            table = pa.table({"id": values})
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)


def mds_splits(folder: Path) -> None:
    for name, values in {"train": range(20), "test": range(20, 25)}.items():
        write_mds(folder / name, [{"id": str(value).encode()} for value in values], {"id": "str_int"})


def tar_splits(folder: Path) -> None:
    folder.mkdir()
    for name, values in {
        "train-000000": range(10),
        "train-000001": range(10, 20),
        "test-000000": range(20, 25),
    }.items():
        write_tar(folder / f"{name}.tar", {f"{value}.id": str(value).encode() for value in values})


def line_splits(folder: Path) -> None:
    folder.mkdir()
    for name, values in {"train": range(20), "test": range(20, 25)}.items():
        lines = "\n".join(json.dumps({"id": value}) for value in values)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


@pytest.mark.parametrize("write", [saved_splits, hub_splits, cached_splits, mds_splits, tar_splits, line_splits])
def test_a_split_is_asked_for(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "d")
    for path in (tmp_path / "d", tmp_path):
        with pytest.raises(DataError, match=r"has the splits test, train; .*--split train"):
            ids_of(path)
    with pytest.raises(DataError, match="has no split 'dev'; it has test, train"):
        ids_of(tmp_path / "d", "dev")
    assert ids_of(tmp_path / "d", "train") == list(range(20))
    assert ids_of(tmp_path / "d", "test") == list(range(20, 25))


def test_the_command_takes_a_split(tmp_path: Path) -> None:
    saved_splits(tmp_path / "d")
    call("--data", tmp_path / "d", "--split", "test", "--out", tmp_path / "out")
    assert sorted(rows_in(tmp_path / "out")["id"].tolist()) == list(range(20, 25))


def test_a_split_that_nothing_has_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", id=np.arange(4))
    with pytest.raises(DataError, match="no split 'train': the data has none"):
        ids_of(tmp_path / "a.npz", "train")


def test_descriptions_and_hidden_files_are_no_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", id=np.arange(4))
    (tmp_path / "config.json").write_text('{"model": "x"}')
    (tmp_path / "notes.jsonl").write_text('{"text": "x"}')
    (tmp_path / ".cache").mkdir()
    np.savez(tmp_path / ".cache" / "b.npz", id=np.arange(9))
    assert ids_of(tmp_path) == [0, 1, 2, 3]


# --- Megatron, MDS, WebDataset ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4), (np.int64, 5)])
@pytest.mark.parametrize("name", ["corpus.idx", "corpus.bin", "corpus", ""])
def test_a_megatron_corpus_by_any_of_its_names(dtype: Any, code: int, name: str, tmp_path: Path) -> None:
    write_megatron(tmp_path / "corpus", LISTS, dtype, code)
    (batch,) = read_packed_tokens([tmp_path / name], LENGTH)
    assert torch.equal(batch["input_ids"], packed(LISTS))


def test_both_files_of_a_megatron_corpus_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_module, "TOKENS_AT_ONCE", 13)
    write_megatron(tmp_path / "corpus", LISTS)
    call("--data", tmp_path / "corpus.bin", tmp_path / "corpus.idx", "--length", LENGTH, "--out", tmp_path / "out")
    assert torch.equal(rows_in(tmp_path / "out")["input_ids"], packed(LISTS))


ARRAYS = {
    "ndarray": (bytes([33, 1 << 2 | 0, 3]), "int32"),  # dtype, dimensions and the kind of their sizes, sizes
    "ndarray:int32": (bytes([1 << 2 | 0, 3]), "int32"),
    "ndarray:int32:3": (b"", "int32"),
}


@pytest.mark.parametrize("encoding", ARRAYS)
def test_arrays_of_mds_in_each_form(encoding: str, tmp_path: Path) -> None:
    before, dtype = ARRAYS[encoding]
    values = np.arange(30, dtype=dtype).reshape(10, 3)
    write_mds(tmp_path / "d", [{"x": before + row.tobytes()} for row in values], {"x": encoding})
    assert torch.equal(joined(list(columns([tmp_path / "d"])))["x"], torch.from_numpy(values))


@pytest.mark.parametrize(("method", "ending", "squeeze"), [("gz", ".gz", gzip.compress), ("bz2", ".bz2", bz2.compress)])
def test_compressed_shards_of_mds(method: str, ending: str, squeeze: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write_mds(tmp_path / "d", [{"id": str(value).encode()} for value in range(9)], {"id": "str_int"})
    index = json.loads((tmp_path / "d" / "index.json").read_text())
    for shard in index["shards"]:
        raw = tmp_path / "d" / shard["raw_data"]["basename"]
        shard |= {"compression": f"{method}:6", "zip_data": {"basename": raw.name + ending}}
        (tmp_path / "d" / (raw.name + ending)).write_bytes(squeeze(raw.read_bytes()))
        raw.unlink()
    (tmp_path / "d" / "index.json").write_text(json.dumps(index))
    assert ids_of(tmp_path / "d") == list(range(9))


def test_members_of_a_tar_file_with_one_name_are_a_sample(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.arange(4))
    samples = {f"{number}.{ending}": data for number in range(3) for ending, data in {
        "cls": str(number).encode(), "x.npy": array.getvalue(), "jpg": b"no"}.items()}  # fmt: skip
    write_tar(tmp_path / "a.tar.gz", samples)
    batch = joined(list(columns([tmp_path / "a.tar.gz"])))
    assert batch["cls"].tolist() == [0, 1, 2]
    assert batch["x.npy"].tolist() == [[0, 1, 2, 3]] * 3


def test_texts_of_a_tar_file(tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "model")
    write_tar(tmp_path / "a.tar", {f"{number}.txt": text.encode() for number, text in enumerate(TEXTS)})
    found = joined(list(read_packed_texts([tmp_path / "a.tar"], load_tokenizer(tmp_path / "model"), LENGTH, "txt")))
    (tmp_path / "a.jsonl").write_bytes(as_lines(TEXTS, "text"))
    same = joined(list(read_packed_texts([tmp_path / "a.jsonl"], load_tokenizer(tmp_path / "model"), LENGTH)))
    assert torch.equal(found["input_ids"], same["input_ids"])


# --- the tools themselves --------------------------------------------------------------------------------------------


def test_what_datasets_itself_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"id": list(range(30))})
    datasets.DatasetDict({"train": whole.shuffle(seed=0), "test": whole.select([3])}).save_to_disk(tmp_path / "d")
    again = datasets.load_from_disk(str(tmp_path / "d"))
    again["train"].map(lambda row: {"id": row["id"] + 1000})
    assert list((tmp_path / "d" / "train").glob("cache-*.arrow")), "it leaves a cache beside the data"
    assert ids_of(tmp_path / "d", "train") == again["train"]["id"][:]
    assert ids_of(tmp_path / "d", "test") == [3]


@pytest.mark.parametrize("compression", [None, "zstd:7", "gz", "bz2"])
def test_what_mosaicml_streaming_itself_writes(compression: str | None, tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    kinds = {"id": "int", "few": "uint8", "x": "ndarray", "y": "ndarray:int32:3", "z": "ndarray:uint16", "t": "str"}
    with streaming.MDSWriter(
        out=str(tmp_path / "d"), columns=kinds, compression=compression, size_limit=1 << 10
    ) as writer:
        for number in range(60):
            array = np.arange(number, number + 3)
            row = {"x": array, "y": array.astype(np.int32), "z": array.astype(np.uint16), "t": "word"}
            writer.write({"id": number, "few": number, **row})
    assert ids_of(tmp_path / "d") == list(range(60))
    batch = joined(list(columns([tmp_path / "d"], ["few", "x", "y", "z"])))
    assert all(batch[name][:, 0].tolist() == list(range(60)) for name in "xyz")
    assert batch["few"].dtype == torch.uint8


def test_what_webdataset_itself_writes(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(20):
            writer.write({"__key__": f"s{number:04}", "cls": number, "json": {"id": number}, "x.npy": np.arange(3)})
    assert ids_of(tmp_path / "a.tar") == list(range(20))


# --- failures --------------------------------------------------------------------------------------------------------


def cut(path: Path, off: int = 20) -> None:
    path.write_bytes(path.read_bytes()[:-off])


def broken_files(folder: Path) -> dict[str, Path]:
    """Files that cannot be read as lists of tokens, by what is said of them."""

    def at(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    found = {
        "Compressed file ended before the end-of-stream": WRITERS["jsonl.gz"](at("a"), LISTS, "input_ids"),
        "object 60 of": WRITERS["json list"](at("b"), LISTS, "input_ids"),
        "is empty, cut off, or no tar file": WRITERS["webdataset"](at("c"), LISTS, "input_ids"),
    }
    with tarfile.open(folder / "c" / "data.tar") as archive:
        behind_last = (folder / "c" / "data.tar").stat().st_size - archive.getmembers()[-1].offset
    for path, off in zip(found.values(), (20, 20, behind_last), strict=True):
        cut(path, off)
    behind = WRITERS["json list"](at("d"), LISTS, "input_ids")
    behind.write_bytes(behind.read_bytes() + b'{"input_ids": [1]}')
    (folder / "number.json").write_text("[1, 2]")
    (folder / "empty.jsonl.gz").write_bytes(b"")
    (folder / "plain.jsonl.gz").write_bytes(as_lines(LISTS, "input_ids"))
    (folder / "words.jsonl").write_bytes(as_lines(TEXTS, "text"))
    (folder / "uneven.jsonl").write_text(
        '{"input_ids": [1, 2], "labels": [1, 2]}\n{"input_ids": [3], "labels": [3, 4]}'
    )
    (folder / "later.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": [3.5]}')
    nulls = folder / "nulls.parquet"
    parquet.write_table(pa.table({"input_ids": [[1, 2], None]}), nulls)
    return found | {
        "goes on behind its list": behind,
        "object 1 of": folder / "number.json",
        "empty.jsonl.gz is empty": folder / "empty.jsonl.gz",
        "Not a gzipped file": folder / "plain.jsonl.gz",
        "has no lists of integers; it has them in []; texts need --tokenizer": folder / "words.jsonl",
        "has rows of another length than 'input_ids'": folder / "uneven.jsonl",
        "holds a list where a list of integers should be": folder / "later.jsonl",
        "has nulls in it": nulls,
    }


def broken_corpora(folder: Path) -> dict[str, Path]:
    def corpus(name: str, **options: Any) -> Path:
        return write_megatron(folder / name, LISTS, **options)

    lone, cut_data, cut_index = corpus("lone"), corpus("data"), corpus("index")
    lone.with_suffix(".bin").unlink()
    cut(cut_data.with_suffix(".bin"))
    cut(cut_index)
    floats, other, gap = corpus("floats", code=7), corpus("other"), corpus("gap")
    other.write_bytes(b"TNTIDX\0\0" + other.read_bytes()[8:])
    bytes_of = bytearray(gap.read_bytes())
    bytes_of[34 + 4 * len(LISTS) + 8] += 2
    gap.write_bytes(bytes_of)
    short, zipped, lost = folder / "short", folder / "zipped", folder / "lost"
    for path in (short, zipped, lost):
        path.mkdir()
        WRITERS["mds"](path, LISTS, "input_ids")
    cut(short / "mds" / "shard.00001.mds")
    index = json.loads((zipped / "mds" / "index.json").read_text())
    index["shards"][0]["samples"] += 1
    (zipped / "mds" / "index.json").write_text(json.dumps(index))
    (lost / "mds" / "shard.00000.mds").unlink()
    save_to_disk(folder / "saved", {"input_ids": LISTS})
    next((folder / "saved").glob("data-*")).unlink()
    return {
        "has no lone.bin beside it": lone,
        "one of the two is of another corpus or cut off": cut_data,
        "its header lists": cut_index,
        "tokens of type 7": floats,
        "does not begin with MMIDIDX": other,
        "do not follow each other": gap,
        "shard.00001.mds is cut off": short,
        "does not fit its index.json": zipped,
        "shard.00000.mds cannot be read": lost,
        "which its state.json lists": folder / "saved",
    }


@pytest.mark.parametrize("broken", [broken_files, broken_corpora])
def test_what_cannot_be_read_is_named(broken: Callable[[Path], dict[str, Path]], tmp_path: Path) -> None:
    for message, path in broken(tmp_path).items():
        with pytest.raises(DataError) as caught:
            list(read_packed_tokens([path], LENGTH))
        assert message in str(caught.value), (path, str(caught.value))


@pytest.mark.parametrize("off", [1, 20, 200])
def test_a_zst_file_that_was_cut_off_is_named(off: int, tmp_path: Path) -> None:
    path = WRITERS["jsonl.zst"](tmp_path, LISTS, "input_ids")
    cut(path, off)
    with pytest.raises(DataError, match="ended before its end-of-stream marker"):
        list(read_packed_tokens([path], LENGTH))
    path.write_bytes(b"no frame at all")
    with pytest.raises(DataError, match="no Zstandard file, or damaged"):
        list(read_packed_tokens([path], LENGTH))


def test_columns_say_what_is_wrong_with_a_row(tmp_path: Path) -> None:
    (tmp_path / "ragged.jsonl").write_bytes(as_lines(LISTS, "x"))
    (tmp_path / "words.jsonl").write_bytes(as_lines(TEXTS, "x"))
    (tmp_path / "lacking.jsonl").write_text('{"x": 1}\n{"y": 1}')
    index = write_megatron(tmp_path / "corpus", LISTS)
    for message, path in {
        "give --length to join rows of tokens": tmp_path / "ragged.jsonl",
        "holds str, and fields are numbers; text needs --tokenizer": tmp_path / "words.jsonl",
        "row 2 of": tmp_path / "lacking.jsonl",
        "give --length to join and cut": index,
    }.items():
        with pytest.raises(DataError) as caught:
            list(columns([path]))
        assert message in str(caught.value)


def test_zstandard_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setattr(sys, "version_info", (3, 11))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependencyError, match=r"zstandard.* pip install 'rehearsal_plugin\[zstd\]'"):
        list(columns([tmp_path / "a.jsonl.zst"]))


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_rows_a_second_on_a_terminal_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    module, progress = (sys.modules[f"rehearsal_plugin.cli.{name}"] for name in ("seed", "progress"))
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=terminal, width=99))
    sample = Sample()
    module._offer_rows(sample, iter([{"id": torch.arange(50)}] * 4), None)
    assert sample.offered == 200
    assert ("rows/s" in screen.getvalue()) == terminal
    assert bool(screen.getvalue()) == terminal
