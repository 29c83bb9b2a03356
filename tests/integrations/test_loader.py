"""Injection at the loader: for loops that compute the loss outside the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.handle import Handle
from rehearsal_plugin.integrations.inject.loader import RehearsalLoader
from rehearsal_plugin.rehearsal import Rehearsal
from tests.helpers.ranks import run_ranks
from tests.helpers.witness import BATCH, Failure, Witness, config_of, engine_of, payload, perform

NEW = 50  # rows of an epoch: six batches and a quarter


def dataset(epoch: int = 0) -> TensorDataset:
    rows = payload(torch.arange(NEW) + epoch * 1000, torch.float32)
    return TensorDataset(*rows.values())


def batches(epoch: int = 0, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(epoch), batch_size=BATCH, **options)


@pytest.fixture
def rehearse() -> Iterator[Any]:
    """Makes a rehearsal of one rank."""
    made: list[Rehearsal] = []

    def make(**section: Any) -> Rehearsal:
        config = {"inject": "loader", "buffer": {"capacity": 200}, "representatives": 3, **section}
        made.append(Rehearsal(config, LocalTransport()))
        return made[-1]

    yield make
    for rehearsal in made:
        rehearsal.close()


def epoch_of(loader: Any, rehearsal: Rehearsal) -> list[list[int]]:
    """Train an epoch: the uid of the rows of every batch, each row checked to be whole."""
    seen = []
    for x, labels, uid, even in loader:
        right = payload(uid, torch.float32)
        assert torch.equal(x, right["x"])
        assert torch.equal(labels, right["labels"])
        assert torch.equal(even, right["even"])
        seen.append(uid.tolist())
        rehearsal.step()
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_append_adds_rows_behind_the_batchs_own(rehearse: Any, workers: int) -> None:
    rehearsal = rehearse()
    loader = RehearsalLoader(batches(num_workers=workers), rehearsal)
    seen = epoch_of(loader, rehearsal)
    assert [len(uids) for uids in seen] == [8, 8, 8, 11, 11, 11, 5]
    assert [uid for uids in seen for uid in uids[:BATCH]][:48] == list(range(48))


def test_append_keeps_the_number_of_batches(rehearse: Any) -> None:
    assert len(RehearsalLoader(batches(), rehearse())) == 7


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("amount", [{"representatives": 3}, {"representatives": None, "ratio": 0.3}])
def test_replace_skips_no_new_row_and_keeps_the_batch_size(rehearse: Any, amount: Any, workers: int) -> None:
    rehearsal = rehearse(mode="replace", **amount)
    for epoch in range(3):
        loader = RehearsalLoader(batches(epoch, num_workers=workers), rehearsal)
        seen = epoch_of(loader, rehearsal)
        assert {len(uids) for uids in seen[:-1]} == {BATCH}
        assert len(seen[-1]) <= BATCH
        first_seen = dict.fromkeys(uid for uids in seen for uid in uids if uid // 1000 == epoch)
        assert list(first_seen) == list(range(epoch * 1000, epoch * 1000 + NEW))


def test_replace_displaces_no_row(rehearse: Any) -> None:
    rehearsal = rehearse(mode="replace")
    seen = epoch_of(RehearsalLoader(batches(), rehearsal), rehearsal)
    metrics = rehearsal.metrics()
    assert metrics["rows_displaced"] == 0
    assert metrics["rows_offered"] == NEW
    assert sum(map(len, seen)) == NEW + metrics["rows_replayed"]


def test_replace_meets_the_ratio(rehearse: Any) -> None:
    rehearsal = rehearse(mode="replace", representatives=None, ratio=0.25)
    seen = [uids for epoch in range(4) for uids in epoch_of(RehearsalLoader(batches(epoch), rehearsal), rehearsal)]
    replayed, total = rehearsal.metrics()["rows_replayed"], sum(len(uids) for uids in seen[3:])
    assert abs(replayed - total / 4) <= 2  # of an epoch's shorter last batch the share is that of a whole one


def test_almost_all_rows_may_be_replayed(rehearse: Any) -> None:
    rehearsal = rehearse(mode="replace", representatives=None, ratio=0.95)
    seen = epoch_of(RehearsalLoader(batches(), rehearsal), rehearsal)
    assert set(range(NEW)) <= {uid for uids in seen for uid in uids}
    assert {len(uids) for uids in seen[:-1]} == {BATCH}


def test_a_batch_of_nothing_but_replayed_rows_is_refused(rehearse: Any) -> None:
    loader = RehearsalLoader(batches(), rehearse(mode="replace", representatives=BATCH))
    with pytest.raises(ConfigError, match=r"rehearsal\.representatives is 8 and a batch has 8 rows"):
        next(iter(loader))


def test_replace_does_not_know_the_number_of_batches(rehearse: Any) -> None:
    with pytest.raises(TypeError, match="not known beforehand"):
        len(RehearsalLoader(batches(), rehearse(mode="replace")))


@pytest.mark.parametrize("form", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_numbers_in_any_form_are_batched_anew(rehearse: Any, form: Any) -> None:
    rehearsal = rehearse(mode="replace")
    given = [{"x": torch.arange(8.0) + 8 * number, "y": form(range(8 * number, 8 * number + 8))} for number in range(6)]
    seen = []
    for batch in RehearsalLoader(given, rehearsal):
        assert type(batch["y"]) is type(given[0]["y"])
        assert list(batch["y"]) == batch["x"].tolist()
        seen += list(batch["y"])
        rehearsal.step()
    assert set(seen) == set(range(48))


def test_batches_of_any_nesting_keep_it(rehearse: Any) -> None:
    rehearsal = rehearse(mode="replace")
    source = [{"pair": (torch.arange(8) + 8 * i, [torch.ones(8, 2)]), "tag": f"batch {i}"} for i in range(6)]
    seen = []
    for batch in RehearsalLoader(source, rehearsal):
        assert batch["pair"][1][0].shape == (len(batch["pair"][0]), 2)
        assert batch["tag"].startswith("batch")
        seen += batch["pair"][0].tolist()
        rehearsal.step()
    assert set(seen) == set(range(48))


def test_other_attributes_are_those_of_the_wrapped_loader(rehearse: Any) -> None:
    inner = batches()
    loader = RehearsalLoader(inner, rehearse())
    assert loader.dataset is inner.dataset
    assert loader.batch_size == BATCH
    loader.post_process_func = print
    assert inner.post_process_func is print  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = loader.no_such_thing


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_once_closed_batches_pass_through(rehearse: Any, mode: str) -> None:
    rehearsal = rehearse(mode=mode)
    loader = RehearsalLoader(batches(), rehearsal)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
        rehearsal.step()
    rehearsal.close()
    rest = [uid for _, _, uids, _ in iterator for uid in uids.tolist()]
    assert rest == list(range(NEW - len(rest), NEW))
    assert [len(uid) for _, _, uid, _ in loader] == [8, 8, 8, 8, 8, 8, 2]


def test_a_rehearsal_at_the_model_has_no_loader(rehearse: Any) -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.inject is 'forward'"):
        Handle(rehearse(inject="forward")).loader(batches())


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_loader_adds_nothing_while_the_model_is_in_evaluation_mode(rehearse: Any, mode: str) -> None:
    rehearsal, model = rehearse(mode=mode), nn.Linear(1, 1)
    handle = Handle(rehearsal, model=model)
    epoch_of(handle.loader(batches()), rehearsal)
    offered = rehearsal.metrics()["rows_offered"]
    model.eval()
    assert [uid.tolist() for _, _, uid, _ in handle.loader(batches(9))] == [uid.tolist() for _, _, uid, _ in batches(9)]
    model.train()
    with torch.no_grad():
        assert [len(uid) for _, _, uid, _ in handle.loader(batches(9))] == [8, 8, 8, 8, 8, 8, 2]
    assert rehearsal.metrics()["rows_offered"] == offered
    assert any(len(uids) > BATCH or mode == "replace" for uids in epoch_of(handle.loader(batches(1)), rehearsal))


# --- under DeepSpeed -------------------------------------------------------------------------------------------------

EPOCHS = 3


class Logits(nn.Module):
    """A model without a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x / 97)
        return logits


def learn(engine: Any, loader: Any) -> dict[str, Any]:
    """Epochs with the loss outside the model: sizes of the batches, their uid, and rows that were not whole."""
    witness, epochs = Witness(), []
    for _ in range(EPOCHS):
        epochs.append(0)
        for x, labels, uid, even in loader:
            witness.note({"x": x, "labels": labels, "uid": uid, "even": even})
            loss = nn.functional.cross_entropy(engine(x), labels)
            engine.backward(loss)
            engine.step()
            epochs[-1] += 1
    return {"seen": witness.seen, "torn": witness.torn, "epochs": epochs, "metrics": engine.rehearsal.metrics()}


def own_loader(folder: Path) -> dict[str, Any]:
    """The user's own `DataLoader`; the next batch is loaded by worker processes while rows are exchanged."""
    # A rank of `run_ranks` is a daemon, and daemons may not start the loader's workers.
    torch.multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    engine = engine_of(config_of(section(), gas=2), Logits())
    rows = payload(torch.arange(NEW) + 1000 * dist.get_rank(), torch.float32)
    loader = DataLoader(TensorDataset(*rows.values()), batch_size=BATCH, num_workers=2, shuffle=True)
    return learn(engine, engine.rehearsal.loader(loader))


def deepspeeds_loader(folder: Path) -> dict[str, Any]:
    """The loader that DeepSpeed makes of `training_data`, as its `initialize` returns it."""
    rows = payload(torch.arange(2 * NEW), torch.float32)
    model = Logits()
    from rehearsal_plugin import initialize

    engine, _, loader, _ = initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=TensorDataset(*rows.values()),
        config=config_of(section()),
    )
    # No worker processes, which a daemon may not have.
    loader.num_local_io_workers = 0
    found = learn(engine, loader)
    engine.destroy()
    return {**found, "wrapped": engine.training_dataloader is loader, "size": loader.batch_size}


def section() -> dict[str, Any]:
    return {"inject": "loader", "mode": "replace", "representatives": 2, "buffer": {"capacity": 400}}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    scenarios = {"own_loader": own_loader, "deepspeeds_loader": deepspeeds_loader}
    return run_ranks(perform, 2, scenarios, tmp_path_factory.mktemp("scenarios"))


@pytest.fixture(params=["own_loader", "deepspeeds_loader"])
def found(request: pytest.FixtureRequest, outcomes: list[dict[str, Any]]) -> list[Any]:
    ranks = [rank[request.param] for rank in outcomes]
    for rank in ranks:
        assert not isinstance(rank, Failure), rank.trace
    return ranks


def test_ranks_see_each_of_their_rows_in_every_epoch(found: list[Any]) -> None:
    for rank in found:
        counts = Counter(uid for uids in rank["seen"] for uid in uids)
        assert sum(count >= EPOCHS for count in counts.values()) >= NEW
        assert sum(counts.values()) == EPOCHS * NEW + rank["metrics"]["rows_replayed"]
        assert rank["metrics"]["rows_replayed"] > 0
    assert {uid % 1000 for rank in found for uids in rank["seen"] for uid in uids} >= set(range(NEW))


def test_ranks_get_batches_of_one_size_and_equally_many(found: list[Any]) -> None:
    assert found[0]["epochs"] == found[1]["epochs"]
    for rank in found:
        ends = {sum(rank["epochs"][: i + 1]) - 1 for i in range(EPOCHS)}
        assert {len(uids) for i, uids in enumerate(rank["seen"]) if i not in ends} == {BATCH}


def test_rows_from_the_other_rank_arrive_whole(found: list[Any]) -> None:
    assert [rank["torn"] for rank in found] == [0, 0]
    assert all(rank["metrics"]["rows_received"] > 0 for rank in found)


def test_the_loader_of_training_data_is_wrapped(outcomes: list[dict[str, Any]]) -> None:
    assert all(rank["deepspeeds_loader"]["wrapped"] for rank in outcomes)
    assert all(rank["deepspeeds_loader"]["size"] == BATCH for rank in outcomes)
