"""Pipeline parallelism of DeepSpeed on four gloo ranks: two stages beside data parallelism, and four stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx

import rehearsal_plugin
from rehearsal_plugin.errors import BatchError, ConfigError
from tests.helpers.errors import message
from tests.helpers.parallel_jobs import shared
from tests.helpers.pipeline_jobs import GAS, SECTION, Job, batch_of, pipeline_of
from tests.helpers.ranks import run_ranks
from tests.helpers.witness import BATCH, Failure, config_of, owner, perform

pytest.importorskip("deepspeed")

SAVED, RESUMED = 14, 8
LEAD = 3  # optimizer steps from offering a row to seeing it at the earliest


def two_stages(folder: Path) -> dict[str, Any]:
    """A run with a checkpoint in its middle, and another that goes on from it."""
    folder = shared(folder)
    whole = Job(SECTION)
    whole.train(SAVED)
    whole.engine.save_checkpoint(folder)
    whole.train(RESUMED)
    again = Job(SECTION)
    again.number = SAVED * GAS
    again.engine.load_checkpoint(folder)
    again.train(RESUMED)
    files = sorted(path.name for path in folder.rglob("*rehearsal*"))
    return {"whole": whole.outcome(), "again": again.outcome(), "files": files}


def four_stages(folder: Path) -> dict[str, Any]:
    folder = shared(folder)
    job = Job(SECTION, stages=4)
    job.train(SAVED)
    job.engine.save_checkpoint(folder)
    job.engine.load_checkpoint(folder)
    job.train(2)
    files = sorted(path.name for path in folder.rglob("*rehearsal*"))
    rows = 0 if job.engine.rehearsal.rehearsal is None else len(job.engine.rehearsal.rehearsal.buffer)
    return {"whole": job.outcome(), "files": files, "rows": rows}


def both_ways(folder: Path) -> dict[str, Any]:
    job = Job(SECTION, gas=4, both_ways=True)
    job.train(SAVED)
    return {"whole": job.outcome()}


def growing(folder: Path) -> dict[str, Any]:
    job = Job({**SECTION, "mode": "append"}, dynamic=True)
    job.train(SAVED)
    return {"whole": job.outcome()}


def evaluation(folder: Path) -> dict[str, Any]:
    job = Job(SECTION)
    job.train(6)
    batches = [batch_of(900 + i, job.place) for i in range(GAS)]
    job.engine.eval_batch(iter(batches))
    job.train(1)
    return {"whole": job.outcome(), "own": [batch[2].tolist() for batch in batches]}


def composed(folder: Path) -> dict[str, Any]:
    """What a script does with micro-batches itself, given before `attach` or after it."""

    def unpacked(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(batch.values())

    def named(number: int) -> dict[str, Tensor]:
        return dict(zip(("x", "y", "uid"), batch_of(number, 0), strict=True))

    found = {}
    for first in (True, False):
        engine = pipeline_of(config_of(None), 2)
        if first:
            engine.set_batch_fn(unpacked)
        rehearsal_plugin.attach(engine, SECTION)
        if not first:
            engine.set_batch_fn(unpacked)
        for number in range(5):
            engine.train_batch(iter([named(number)]))
        engine.destroy()
        found["before" if first else "after"] = engine.rehearsal.metrics()["rows_replayed"]
    return found


def compiled(folder: Path) -> dict[str, Any]:
    """Graphs of this stage up to each step, and what they call."""
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    job = Job(SECTION)
    job.engine.compile(backend=backend)
    counts = []
    for _ in range(LEAD + 4):
        job.train(1)
        counts.append(len(graphs))
    return {"whole": job.outcome(), "counts": counts, "calls": [call for calls in graphs for call in calls]}


def closed(folder: Path) -> dict[str, Any]:
    job = Job(SECTION)
    job.train(5)
    job.engine.rehearsal.close()
    job.train(2)
    job.engine.save_checkpoint(shared(folder))
    job.attach(SECTION)
    job.train(5)
    return {"whole": job.outcome()}


def strayed(folder: Path) -> str:
    """Each rank goes by its own number, a stage in the middle included."""
    job = Job(SECTION, stages=4)
    return message(BatchError, lambda: job.train(1, owner=dist.get_rank()))


def refusals(folder: Path) -> dict[str, str]:
    def refused(**section: Any) -> str:
        return message(ConfigError, lambda: rehearsal_plugin.attach(engine, {**SECTION, **section}))

    engine = pipeline_of(config_of(None), 2)
    return {
        "append": refused(mode="append"),
        "padding": refused(padding={"length": 8, "values": {"0": 0}}),
        "loader": refused(inject="loader"),
        "der": refused(strategy={"name": "der"}),
        "loss_weight": refused(strategy={"loss_weight": 0.5}),
        "losses_every": refused(losses_every=1),
        "budget": refused(ratio={"budget": 0.02}, buffer={"partition_by": "y", "capacity": 9}),
        "score": refused(buffer={"policy": "score", "score_by": "loss", "capacity": 9}),
    }


SCENARIOS = (
    two_stages, four_stages, both_ways, growing, evaluation, composed, compiled, closed, strayed, refusals,
)  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    scenarios = {scenario.__name__: scenario for scenario in SCENARIOS}
    return run_ranks(perform, 4, scenarios, tmp_path_factory.mktemp("pipelines"), timeout_s=240)


@pytest.fixture
def found(request: pytest.FixtureRequest, outcomes: list[dict[str, Any]]) -> list[Any]:
    """What each rank found in the scenario that the test names."""
    ranks = [outcome[request.param.__name__] for outcome in outcomes]
    for rank, outcome in enumerate(ranks):
        if isinstance(outcome, Failure):
            pytest.fail(f"rank {rank} raised:\n{outcome.trace}")
    return ranks


def scenario(*functions: Callable[[Path], Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", functions, indirect=True, ids=[one.__name__ for one in functions])


def pulling(found: list[Any]) -> list[dict[str, Any]]:
    """What the ranks whose stage pulls batches saw."""
    return [rank["whole"] for rank in found if rank["whole"]["seen"]]


@scenario(two_stages, growing)
def test_the_first_and_the_last_stage_get_the_same_rows(found: list[Any]) -> None:
    ranks = pulling(found)
    assert [rank["place"] for rank in ranks] == [0, 1, 0, 1]
    assert ranks[0]["seen"] == ranks[2]["seen"]
    assert ranks[1]["seen"] == ranks[3]["seen"]
    assert ranks[0]["seen"] != ranks[1]["seen"]


@scenario(four_stages)
def test_stages_in_the_middle_pull_no_batches_and_keep_no_rows(found: list[Any]) -> None:
    first, *middle, last = found
    assert first["whole"]["seen"] == last["whole"]["seen"]
    assert first["rows"] == last["rows"] == 200
    for rank in middle:
        assert rank["rows"] == 0
        assert rank["whole"]["metrics"] == {}


@scenario(two_stages, four_stages, both_ways, growing)
def test_replayed_rows_are_whole_and_come_from_all_data_parallel_ranks(found: list[Any]) -> None:
    ranks = pulling(found)
    for rank in ranks:
        own = {rank["place"]}
        replayed = {owner(uid) for uids in rank["seen"] for uid in uids} | own
        assert replayed == {other["place"] for other in ranks}
        assert rank["metrics"]["rows_replayed"] > 0
        assert rank["torn"] == 0


@scenario(two_stages, four_stages, both_ways, growing)
def test_the_model_learns(found: list[Any]) -> None:
    for rank in found:
        losses = rank["whole"]["losses"]
        assert losses[-1] < losses[0] / 2


@scenario(two_stages, four_stages, both_ways)
def test_with_replace_micro_batches_keep_their_size(found: list[Any]) -> None:
    assert all(len(uids) == BATCH for rank in pulling(found) for uids in rank["seen"])


@scenario(growing)
def test_with_append_micro_batches_grow_where_shapes_may_change(found: list[Any]) -> None:
    for rank in pulling(found):
        sizes = [len(uids) for uids in rank["seen"]]
        assert sizes[: LEAD * GAS] == [BATCH] * LEAD * GAS
        assert sum(sizes[LEAD * GAS :]) == (SAVED - LEAD) * GAS * BATCH + rank["metrics"]["rows_replayed"]


@scenario(two_stages)
def test_a_pipeline_goes_on_bit_for_bit_and_its_first_stage_saves(found: list[Any]) -> None:
    for rank in found:
        assert rank["again"]["seen"] == rank["whole"]["seen"][SAVED * GAS :]
        assert rank["again"]["losses"] == rank["whole"]["losses"][SAVED:]
        assert rank["again"]["metrics"] == rank["whole"]["metrics"]
        assert rank["files"] == [f"rehearsal-step{SAVED}-rank{place}-of-2.safetensors" for place in range(2)]


@scenario(evaluation)
def test_evaluation_is_left_alone(found: list[Any]) -> None:
    for rank in found:
        assert rank["whole"]["evaluated"] == rank["own"]
        assert len(rank["whole"]["seen"]) == 7 * GAS
        assert rank["whole"]["metrics"]["rows_offered"] == 7 * GAS * BATCH


@scenario(composed)
def test_what_the_script_does_with_micro_batches_comes_first(found: list[Any]) -> None:
    assert found == [{"before": 4.0, "after": 4.0}] * 4


@scenario(compiled)
def test_a_compiled_pipeline_is_compiled_once(found: list[Any]) -> None:
    for rank in found:
        assert rank["whole"]["metrics"]["rows_replayed"] > 0
        assert rank["counts"][0] > 0
        assert len(set(rank["counts"])) == 1
        assert not [call for call in rank["calls"] if call.startswith("<built-in method cat ")]


@scenario(closed)
def test_after_close_training_goes_on_without_rows_and_attach_may_follow(found: list[Any]) -> None:
    for rank in pulling(found):
        foreign = [any(owner(uid) != rank["place"] for uid in uids) for uids in rank["seen"]]
        assert not any(foreign[5 * GAS : 10 * GAS])
        assert any(foreign[10 * GAS :])


@scenario(strayed)
def test_stages_that_were_given_different_batches_are_told_on_every_rank(found: list[Any]) -> None:
    assert all("the ranks 0 and 3 hold different rows" in text for text in found)


@scenario(refusals)
def test_what_a_pipeline_cannot_do_is_refused_with_the_way_out(found: list[Any]) -> None:
    for rank in found:
        assert "'replace'" in rank["append"]
        assert "dynamic_shape=True" in rank["append"]
        assert "rehearsal.padding" in rank["padding"]
        assert "'forward'" in rank["loader"]
        assert "'der' needs the model's outputs" in rank["der"]
        assert "'er' needs the model's outputs" in rank["loss_weight"]
        assert "rehearsal.losses_every needs" in rank["losses_every"]
        assert "score_by 'loss' needs" in rank["score"]
        assert "rehearsal.ratio.budget" in rank["budget"]
