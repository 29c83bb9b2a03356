"""`sampling.weights: retrieved` replays the stored rows of all ranks that are nearest to what was new."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from rehearsal_plugin import ConfigError, ExchangeError, MissingDependencyError, Rehearsal, RehearsalConfig
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.checkpoint.test_checkpoint import compare
from tests.helpers.chance import SIGNIFICANCE, equally_included
from tests.helpers.horovod_ranks import run_horovod
from tests.helpers.ranks import run_ranks
from tests.helpers.retrieval_rows import Vectors, brute_force, random
from tests.helpers.samples import Batch
from tests.helpers.witness import config_of, engine_of, perform

pytest.importorskip("faiss")

NEW, NEAR, WIDTH, STEPS = 3, 4, 6, 14
DELAY = 3  # steps from a batch to the neighbours of its rows
RETRIEVAL = {"embedding": "embedding", "metric": "l2"}


def section(share: float = 1.0, near: int = NEAR, **keys: Any) -> dict[str, Any]:
    return {
        "buffer": {"capacity": 1000},
        "representatives": near,
        "sampling": {"weights": "retrieved", "retrieved_share": share},
        "retrieval": RETRIEVAL,
        "exchange": {"timeout_s": 20},
        **keys,
    }


def batch_at(step: int, rank: int, rows: int = NEW) -> Batch:
    ids = torch.arange(rows) + 1000 * step + 100 * rank
    return {"id": ids, "embedding": torch.from_numpy(random(rows, seed=1000 * step + rank, width=WIDTH))}


def replayed(rehearsal: Rehearsal, rank: int, steps: int = STEPS) -> list[list[int]]:
    """The ids that came behind the new rows, step by step; every row is whole."""
    came = []
    for step in range(steps):
        seen = rehearsal.update(batch_at(step, rank))
        ids = seen["id"][NEW:].tolist()
        for sample, vector in zip(ids, seen["embedding"][NEW:], strict=True):
            whole = batch_at(sample // 1000, sample % 1000 // 100)
            assert torch.equal(vector, whole["embedding"][sample % 100])
        came.append(ids)
    return came


def nearest(step: int, rank: int, size: int, metric: str, owners: range) -> list[int]:
    """By definition: the rows of earlier steps that are nearest to any new row of a step, the nearest first."""
    earlier = [batch_at(before, owner) for before in range(step) for owner in owners]
    ids = [sample for batch in earlier for sample in batch["id"].tolist()]
    every: Vectors = np.concatenate([batch["embedding"].numpy() for batch in earlier])
    scores, places = brute_force(batch_at(step, rank)["embedding"].numpy(), every, len(every), metric)
    best: dict[int, float] = {}
    for score, place in zip(scores.ravel().tolist(), places.ravel().tolist(), strict=True):
        best[ids[place]] = max(score, best.get(ids[place], -np.inf))
    return sorted(best, key=lambda sample: -best[sample])


def retrieves(metric: str, index: str, launch: str, scope: str = "global") -> int:
    """How many steps were checked against the definition."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = {"metric": metric, "index": index, "exact_below": 0} if index != "flat" else {"metric": metric}
    config = section(retrieval={**RETRIEVAL, **found}, exchange={"launch": launch, "timeout_s": 20})
    config["sampling"]["scope"] = scope
    with Rehearsal(config) as rehearsal:
        came = replayed(rehearsal, rank)
        owners = range(size) if scope == "global" else range(rank, rank + 1)
        checked = 0
        for step in range(3, STEPS - DELAY):  # before, ranks have told each other of no request
            expected = nearest(step, rank, size, metric, owners)[:NEAR]
            assert Counter(came[step + DELAY]) == Counter(expected), (step, came[step + DELAY], expected)
            checked += 1
        total = sum(map(len, came))
        assert rehearsal.metrics()["rows_retrieved"] >= checked * NEAR
        assert total > checked * NEAR  # the first ones were drawn uniformly
        return checked


@pytest.mark.parametrize("launch", ["thread", "inline"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "inner_product"])
def test_one_rank_replays_what_is_nearest(metric: str, launch: str) -> None:
    assert retrieves(metric, "flat", launch) == STEPS - DELAY - 3


@pytest.mark.parametrize(("metric", "launch"), [("l2", "thread"), ("cosine", "inline")])
def test_four_ranks_replay_what_is_nearest_among_the_rows_of_all(metric: str, launch: str) -> None:
    assert run_ranks(retrieves, 4, metric, "flat", launch) == [STEPS - DELAY - 3] * 4


def test_the_own_rows_alone_with_a_local_scope() -> None:
    assert run_ranks(retrieves, 2, "l2", "flat", "thread", "local") == [STEPS - DELAY - 3] * 2


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_index_finds_so_few_rows_exactly(index: str) -> None:
    assert retrieves("l2", index, "thread") == STEPS - DELAY - 3


def under_horovod() -> int:
    import horovod.torch as hvd

    from rehearsal_plugin import HorovodTransport

    with Rehearsal(section(), HorovodTransport()) as rehearsal:
        came = replayed(rehearsal, hvd.rank())
    steps = range(3, STEPS - DELAY)
    right = [
        Counter(came[step + DELAY]) == Counter(nearest(step, hvd.rank(), hvd.size(), "l2", range(hvd.size()))[:NEAR])
        for step in steps
    ]
    return sum(right)


@pytest.mark.horovod
def test_two_ranks_of_horovod() -> None:
    pytest.importorskip("horovod.torch")
    assert run_horovod(under_horovod, 2) == [STEPS - DELAY - 3] * 2


def test_a_share_is_met_in_the_mean() -> None:
    with Rehearsal(section(0.3, near=2), LocalTransport()) as rehearsal:
        replayed(rehearsal, 0, 2000)
        metrics = rehearsal.metrics()
    trials, chance = 2000, 0.6  # 2 rows of which 0.3 are near: one with the chance 0.6
    deviation = (trials * chance * (1 - chance)) ** 0.5
    assert abs(metrics["rows_retrieved"] - trials * chance) < 4 * deviation + 4
    assert metrics["rows_replayed"] == 2 * (trials - 2)


def test_the_rest_is_drawn_uniformly() -> None:
    rows, trials = 40, 2000
    config = section(0.5, near=2, buffer={"capacity": 50, "deduplicate": True})
    counts = Counter[int]()
    with Rehearsal(config, LocalTransport()) as rehearsal:
        rehearsal.update(batch_at(0, 0, rows))
        for step in range(trials + 8):  # a duplicate, which does not come in; the nearest is the row itself
            seen = rehearsal.update({name: column[:1] for name, column in batch_at(0, 0, rows).items()})
            if step >= 8:
                counts.update(seen["id"][1:].tolist())
    counts[0] -= trials
    assert sum(counts.values()) == trials
    assert equally_included([counts[row] for row in range(rows)], trials, 1) > SIGNIFICANCE


def test_what_was_replaced_meanwhile_is_represented_by_what_took_its_place() -> None:
    config = section(buffer={"capacity": 5, "policy": "fifo"})
    with Rehearsal(config, LocalTransport()) as rehearsal:
        came = replayed(rehearsal, 0, 40)  # checks that rows are whole
    assert all(came[4:])
    assert all(step - sample // 1000 >= 2 for step, ids in enumerate(came) for sample in ids)


def test_no_more_queries_than_asked_for_and_none_without_a_number() -> None:
    config = section(near=2)
    config["sampling"]["queries"] = 2
    with Rehearsal(config, LocalTransport()) as rehearsal:
        for step in range(12):
            batch = batch_at(step, 0, rows=9)
            if step % 3 == 1:
                batch["embedding"][:] = float("nan")
            rehearsal.update(batch)
        assert rehearsal.metrics()["rows_retrieved"] > 0


def test_two_draws_share_the_nearest_rows() -> None:
    config = section(near=2, strategy={"name": "der++", "outputs": ["output"]})
    with Rehearsal(config, LocalTransport()) as rehearsal:
        came: list[list[int]] = []
        for step in range(12):
            seen = rehearsal.augment(batch_at(step, 0))
            outputs = seen["embedding"][:, :2]
            rehearsal.loss(cross_entropy, outputs, torch.zeros(len(outputs), dtype=torch.int64))
            rehearsal.step()
            came.append(seen["id"][NEW:].tolist())
    for step in range(4, 8):
        expected = nearest(step, 0, 1, "l2", range(1))[:4]
        assert Counter(came[step + DELAY + 1]) == Counter(expected)
        assert set(came[step + DELAY + 1][:2]) == {expected[0], expected[2]}


def with_a_module(steps: int = 10) -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Linear(8, 3))
    config = section(retrieval={"module": "0", "metric": "cosine"}, representatives=2)
    with Rehearsal(config) as rehearsal:
        assert rehearsal.hidden_states is not None
        rehearsal.hidden_states.watch(model)
        for step in range(steps):
            seen = rehearsal.augment(batch_at(step, dist.get_rank()))
            loss = rehearsal.loss(cross_entropy, model(seen["embedding"]), seen["id"] % 3)
            loss.backward()  # type: ignore[no-untyped-call]
            rehearsal.step()
        return rehearsal.metrics()["rows_retrieved"]


def test_embeddings_may_come_from_the_model_that_trains() -> None:
    assert all(rows > 0 for rows in run_ranks(with_a_module, 2))


class Model(torch.nn.Module):
    """Notes the ids that it is given, and is not given the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = torch.nn.Linear(1, 1), list[list[int]]()

    def forward(self, id: torch.Tensor) -> torch.Tensor:
        self.seen.append(id[NEW:].tolist())
        loss: torch.Tensor = self.linear(id[:, None].float() / 1e5).mean()
        return loss


def under_deepspeed(folder: Path) -> int:
    rank, size, model = dist.get_rank(), dist.get_world_size(), Model()
    engine = engine_of(config_of(section(hidden=["embedding"]), stage=1), model)
    for step in range(STEPS):
        engine.backward(engine(**batch_at(step, rank)))
        engine.step()
    steps = range(3, STEPS - DELAY - 1)  # the hook sees a step when it ends, so rows come one step later
    nearby = [Counter(nearest(step, rank, size, "l2", range(size))[:NEAR]) for step in steps]
    return sum(Counter(model.seen[step + DELAY + 1]) == wanted for step, wanted in zip(steps, nearby, strict=True))


def test_an_engine_of_deepspeed_gets_them_and_not_the_embeddings() -> None:
    found = run_ranks(perform, 2, {"job": under_deepspeed}, Path())
    assert [result["job"] for result in found] == [STEPS - DELAY - 4] * 2


def test_an_exchange_that_begins_anew_follows_the_buffer_once() -> None:
    with Rehearsal(section(), LocalTransport()) as rehearsal:
        replayed(rehearsal, 0, 6)
        assert rehearsal.buffer is not None
        before = list(rehearsal.buffer._storage._followers)
        rehearsal.restart(rehearsal.steps)
        assert len(rehearsal.buffer._storage._followers) == len(before) == 1
        rehearsal.commit()
        replayed(rehearsal, 0, 6)
        rehearsal.rollback()
        assert any(replayed(rehearsal, 0, 8)[-2:])
    assert rehearsal.metrics()["rows_retrieved"] > 0


def resumes(folder: str, launch: str) -> list[str]:
    place = Path(folder) / str(dist.get_rank()) if dist.is_initialized() else Path(folder)
    sampling = {"weights": "retrieved", "retrieved_share": 0.4, "queries": 5}
    return compare(
        Path(folder) if dist.is_initialized() else place,
        sampling=sampling,
        retrieval={"embedding": "x", "metric": "l2"},
        exchange={"launch": launch, "timeout_s": 20},
    )


@pytest.mark.parametrize("launch", ["thread", "inline"])
def test_a_job_goes_on_bit_for_bit(tmp_path: Path, launch: str) -> None:
    assert resumes(str(tmp_path), launch) == []


def test_two_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    assert run_ranks(resumes, 2, str(tmp_path), "thread") == [[], []]


def disagrees() -> str:
    """One rank draws uniformly, the other by nearness."""
    config = section() if dist.get_rank() else {**section(), "sampling": {"weights": "uniform"}}
    with Rehearsal(config) as rehearsal, pytest.raises(ExchangeError, match=r"another rehearsal.seed or sampl") as told:
        replayed(rehearsal, dist.get_rank(), 4)
    return str(told.value)


def test_ranks_with_other_weights_say_so() -> None:
    assert len(run_ranks(disagrees, 2)) == 2


def test_without_a_section_on_retrieval_the_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.retrieval is missing.*which field is the embedding"):
        RehearsalConfig.load({"sampling": {"weights": "retrieved"}})


def test_without_faiss_the_first_batch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with (
        Rehearsal(section(), LocalTransport()) as rehearsal,
        pytest.raises(MissingDependencyError, match="pip install"),
    ):
        rehearsal.update(batch_at(0, 0))


def test_no_collective_comes_on_top() -> None:
    assert run_ranks(collectives, 2, "retrieved") == run_ranks(collectives, 2, "uniform")


def collectives(weights: str) -> float:
    config = {**section(), "sampling": {"weights": weights}}
    with Rehearsal(config) as rehearsal:
        replayed(rehearsal, dist.get_rank(), 10)
        rehearsal.drain()
        return rehearsal.metrics()["collectives"]
