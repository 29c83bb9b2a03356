"""Embeddings of rows from the model that trains on them, and how stale they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin import BatchError, CheckpointError, ConfigError, Rehearsal, RehearsalBuffer, RowLayout
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.retrieval import HiddenStates, Retriever
from tests.helpers.hidden_model import Model, by_hand, tokens
from tests.helpers.ranks import run_ranks
from tests.helpers.retrieval_rows import batch_of, buffer_of, random

pytest.importorskip("faiss")

FOUND = {"module": "body", "metric": "l2"}


# --- in training -----------------------------------------------------------------------------------------------------


def train(rehearsal: Rehearsal, model: Model, steps: range, rank: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        batch = rehearsal.augment(tokens(step, rank))
        loss = rehearsal.loss(cross_entropy, model(**batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rehearsal.step()


def rehearsing(capacity: int = 500, strategy: str = "er", **found: Any) -> Rehearsal:
    section = {"buffer": {"capacity": capacity}, "representatives": 4, "strategy": {"name": strategy}}
    return Rehearsal({**section, "retrieval": {**FOUND, **found}}, LocalTransport())


def stored(rehearsal: Rehearsal) -> tuple[dict[str, Tensor], Tensor]:
    """Fields of all rows, and their embeddings."""
    assert rehearsal.buffer is not None
    rehearsal.drain()
    rows = rehearsal.buffer.state_dict()["rows"]
    layout = rehearsal.buffer.layout
    return {field.name: field.view(rows) for field in layout.fields}, layout.field("rehearsal.embedding").view(rows)


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("strategy", ["er", "der", "der++", "x-der", "er-ace"])
def test_a_row_carries_the_hidden_states_of_the_forward_in_which_it_was_new(strategy: str, pool: str) -> None:
    model = Model()
    with rehearsing(strategy=strategy, pool=pool, refresh=False) as rehearsal:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
        expected = []
        for step in range(4):
            expected.append(by_hand(model, tokens(step), pool))
            train(rehearsal, model, range(step, step + 1))
        columns, embeddings = stored(rehearsal)
        assert torch.equal(columns["input_ids"], torch.cat([tokens(step)["input_ids"] for step in range(4)]))
        torch.testing.assert_close(embeddings, torch.cat(expected))


@pytest.mark.parametrize("strategy", ["er", "der", "der++"])
def test_new_rows_get_theirs_where_the_model_computes_its_loss_itself(strategy: str) -> None:
    model = Model()
    with rehearsing(strategy=strategy) as rehearsal:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
        expected = []
        for step in range(5):
            expected.append(by_hand(model, tokens(step), "mean"))
            batch = rehearsal.augment(tokens(step))
            logits = model(**batch)
            own = cross_entropy(logits, batch["labels"])
            loss = rehearsal.complete({"loss": own, "logits": logits})["loss"]
            assert strategy != "er" or torch.equal(loss, own), "nothing is added"
            rehearsal.step()
        torch.testing.assert_close(stored(rehearsal)[1], torch.cat(expected))


@pytest.mark.parametrize("strategy", ["er", "der", "der++", "x-der"])
def test_rows_that_are_replayed_get_the_embedding_of_the_model_as_it_is(strategy: str) -> None:
    model = Model()
    with rehearsing(strategy=strategy) as rehearsal:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
        train(rehearsal, model, range(3))
        columns, before = stored(rehearsal)
        before = before.clone()
        for parameter in model.parameters():
            parameter.data.mul_(3)  # everything is elsewhere now
        frozen = torch.optim.SGD(model.parameters(), lr=0.0)
        for step in range(3, 12):
            batch = rehearsal.augment(tokens(step))
            rehearsal.loss(cross_entropy, model(**batch), batch["labels"])
            frozen.step()
            rehearsal.step()
        columns, embeddings = stored(rehearsal)
        now = by_hand(model, columns, "mean")
        right = torch.isclose(embeddings, now, atol=1e-5).all(1)
        old = torch.isclose(embeddings[:18], before, atol=1e-5).all(1)
        assert (right[:18] | old).all(), "an embedding is that of the row, old or new"
        assert right[:18].sum() >= 5, "some of the first rows were replayed since"
        assert right[18:].all()


def test_evaluation_in_between_leaves_the_embeddings_alone() -> None:
    model = Model()
    with rehearsing() as rehearsal:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
        batch = rehearsal.augment(tokens(0))
        outputs, expected = model(**batch), by_hand(model, tokens(0), "mean")
        model.eval()
        model(**tokens(5, rows=3))
        model.train()
        rehearsal.loss(cross_entropy, outputs, batch["labels"])
        rehearsal.step()
        torch.testing.assert_close(stored(rehearsal)[1], expected)


def test_what_is_missing_is_told() -> None:
    with rehearsing() as rehearsal:
        with pytest.raises(ConfigError, match=r"retrieval\.module stores hidden states"):
            rehearsal.update(tokens(0))
        batch = rehearsal.augment(tokens(0))
        with pytest.raises(ConfigError, match="watch"):
            rehearsal.loss(cross_entropy, Model()(**batch), batch["labels"])


def test_a_rehearsal_that_was_closed_listens_to_no_model() -> None:
    model = Model()
    with rehearsing() as rehearsal:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
    hooks = (model._forward_hooks, model._forward_pre_hooks, model.body._forward_hooks)
    assert not any(hooks)


def on_two_ranks() -> bool:
    """Embeddings of replayed rows find their way back to their owners, and all rows can be asked for."""
    model, rank = Model(), dist.get_rank()
    section = {"buffer": {"capacity": 300}, "representatives": 6, "retrieval": FOUND}
    with Rehearsal(section) as rehearsal, Retriever(rehearsal) as retriever:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
        for step in range(15):
            train(rehearsal, model, range(step, step + 1), rank)
            retriever.sync()
        model.eval()
        listener = HiddenStates("body")
        listener.watch(model)
        model(**tokens(14, rank))
        found = retriever.search(listener.take(), 1)
        newest = found.fields()["input_ids"][:, 0]
        metrics = retriever.metrics()
        assert metrics["rows_indexed"] == 90
        assert 0 < metrics["staleness_mean"] < 7.5, "less than the mean age, as some rows were replayed since"
        return bool((newest == tokens(14, rank)["input_ids"]).all(1).float().mean() > 0.8)


def test_rows_of_two_ranks_are_found_by_what_the_model_makes_of_them() -> None:
    assert run_ranks(on_two_ranks, 2) == [True, True]


def test_a_checkpoint_keeps_the_embeddings_and_one_without_is_refused(tmp_path: Path) -> None:
    model = Model()
    with rehearsing() as rehearsal:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
        train(rehearsal, model, range(3))
        expected = stored(rehearsal)[1].clone()
        rehearsal.save(tmp_path)
    with Retriever.of_checkpoint(tmp_path, {"metric": "l2"}, transport=LocalTransport()) as retriever:
        found = retriever.search(expected, 1)
        assert torch.equal(found.fields()["rehearsal.embedding"][:, 0], expected)
    with rehearsing() as rehearsal:
        assert rehearsal.load(tmp_path)
        assert torch.equal(stored(rehearsal)[1], expected)
    plain = {"buffer": {"capacity": 500}, "representatives": 4}
    with Rehearsal(plain, LocalTransport()) as rehearsal, pytest.raises(CheckpointError, match="retrieval"):
        rehearsal.load(tmp_path)


# --- refreshed by the retriever --------------------------------------------------------------------------------------


def test_the_stalest_rows_are_refreshed_first_and_staleness_is_told() -> None:
    config = {"buffer": {"capacity": 100}, "retrieval": {"embedding": "embedding", "metric": "cosine"}}
    with (
        Rehearsal(config, LocalTransport()) as rehearsal,
        Retriever(rehearsal, transport=LocalTransport()) as retriever,
    ):
        for step in range(5):
            rehearsal.update(batch_of(random(10, seed=step), first_id=10 * step))
        retriever.sync()
        assert retriever.metrics()["staleness_mean"] == 3.0  # of rows from the steps 0 to 4, at step 5
        assert retriever.metrics()["staleness_max"] == 5
        assert retriever.refresh(lambda columns: -columns["embedding"], rows=20) == 20
        metrics = retriever.metrics()
        assert metrics["staleness_max"] == 3
        assert metrics["staleness_mean"] == (0 * 20 + (1 + 2 + 3) * 10) / 50
        assert metrics["rows_refreshed"] == 20
        assert metrics["drift"] == pytest.approx(2), "1 - cosine of opposite vectors"
        index = retriever.index
        assert index is not None
        turned = retriever.search(-random(10, seed=0), 1).fields()["id"][:, 0]
        assert turned.tolist() == list(range(10))
        retriever.refresh(lambda columns: columns["embedding"], rows=50)
        assert retriever.metrics()["staleness_max"] == 0, "computed anew, and the same"


def test_an_embedding_that_was_computed_anew_is_not_replaced_by_the_one_before() -> None:
    """Rows that are replayed meanwhile bring their state back as they took it along."""
    model = Model()
    with rehearsing() as rehearsal, Retriever(rehearsal, transport=LocalTransport()) as retriever:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
        for step in range(12):
            batch = rehearsal.augment(tokens(step))
            logits = model(**batch)
            rehearsal.complete({"loss": cross_entropy(logits, batch["labels"]), "logits": logits})
            if step == 6:
                retriever.refresh(lambda columns: torch.full((len(columns["labels"]), 8), 7.0), rows=1000)
            rehearsal.step()
        assert (stored(rehearsal)[1][:36] == 7).all()


def test_rows_that_get_no_embedding_leave_their_turn_to_others() -> None:
    vectors = random(30)
    vectors[20:] = torch.nan
    with Retriever(buffer_of(vectors), {"embedding": "embedding"}, transport=LocalTransport(), now=5) as retriever:
        asked = []

        def embed(columns: Any) -> Tensor:
            asked.append(columns["id"].tolist())
            return torch.where(columns["id"][:, None] < 25, torch.ones(1, 24), torch.nan)

        for _ in range(3):
            retriever.refresh(embed, rows=10)
    assert asked == [list(range(20, 30)), list(range(10)), list(range(10, 20))], "those without one come first"
    assert retriever.metrics()["rows_skipped"] == 5


def test_embeddings_may_be_computed_from_rows_that_have_none() -> None:
    scale = 1.0

    def embed(columns: Any) -> Tensor:
        return torch.stack([columns["id"].float() * scale, torch.ones(len(columns["id"]))], dim=1)

    buffer = buffer_of(random(40), capacity=60)
    with Retriever(buffer, {"metric": "l2"}, embed=embed, transport=LocalTransport(), now=1) as retriever:
        assert retriever.search([[7.2, 1.0]], 2).fields()["id"].tolist() == [[7, 8]]
        buffer.offer(batch_of(random(1), first_id=1000))
        assert retriever.search([[990.0, 1.0]], 1).fields()["id"].tolist() == [[1000]]
        scale = 10.0
        assert retriever.search([[70.0, 1.0]], 1).fields()["id"].tolist() == [[39]], "as of when it was computed"
        assert retriever.refresh(rows=1000) == 41
        assert retriever.search([[70.0, 1.0]], 1).fields()["id"].tolist() == [[7]]


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros((3, 2, 2)), np.zeros((9, 2))])
def test_a_function_that_gives_no_embeddings_is_refused(wrong: Any) -> None:
    with Retriever(buffer_of(random(3)), {"metric": "l2"}, embed=lambda _: torch.from_numpy(wrong)) as retriever:
        with pytest.raises(BatchError, match="one vector a row"):
            retriever.search(random(1))
        with pytest.raises(ConfigError, match="missing"):
            Retriever(buffer_of(random(3)))
    retriever = Retriever(buffer_of(random(3)), {"embedding": "embedding"})
    with retriever, pytest.raises(ConfigError, match="refresh"):
        retriever.refresh()


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_rows_are_found_although_their_embeddings_could_not_be_made_at_first(kind: str) -> None:
    failing = False

    def embed(columns: Any) -> Tensor:
        if failing:
            raise RuntimeError("out of memory")
        return torch.clone(columns["embedding"])

    vectors, config = random(90), {"metric": "l2", "index": kind, "exact_below": 10}
    buffer = buffer_of(vectors[:60], capacity=90)
    with Retriever(buffer, config, embed=embed, transport=LocalTransport()) as retriever:
        assert retriever.search(vectors[:60], 1).found.all()
        failing = True
        buffer.offer(batch_of(vectors[60:], first_id=60))
        with pytest.raises(RuntimeError, match="out of memory"):
            retriever.search(vectors, 1)
        failing = False
        assert retriever.search(vectors, 1).fields()["id"][:, 0].tolist() == list(range(90))


@pytest.mark.parametrize("shape", [(3,), (2, 24), (0, 24), (3, 23), (3, 2, 24)])
def test_what_is_no_embedding_is_not_stored(shape: tuple[int, ...]) -> None:
    buffer = buffer_of(random(3))
    with Retriever(buffer, {"embedding": "embedding"}, transport=LocalTransport()) as retriever:
        before = retriever.search(random(1), 3).rows.clone()
        with pytest.raises(BatchError, match="one vector a row"):
            retriever.refresh(lambda _: torch.zeros(shape))
        assert torch.equal(retriever.search(random(1), 3).rows, before)


def test_an_embedding_may_have_several_dimensions() -> None:
    batch = {"embedding": torch.arange(24.0).reshape(4, 2, 3)}
    buffer = RehearsalBuffer(BufferConfig(capacity=4), RowLayout.infer(batch))
    buffer.offer(batch)
    with Retriever(buffer, {"embedding": "embedding", "metric": "l2"}, transport=LocalTransport()) as retriever:
        assert retriever.refresh(lambda columns: -columns["embedding"]) == 4
        assert retriever.search([[-6.0, -7, -8, -9, -10, -11]], 1).slot.tolist() == [[1]]
