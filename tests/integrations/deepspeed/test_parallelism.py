"""Tensor and sequence parallelism beside data parallelism under DeepSpeed, on four gloo ranks.

Two ranks that are peers see the same samples, and two pairs of them see different ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import TorchDistributedTransport
from rehearsal_plugin.errors import BatchError, CheckpointError, ConfigError
from tests.helpers.errors import message
from tests.helpers.parallel_jobs import (
    BASE,
    DIGITS,
    MESH,
    RESUMED,
    SAVED,
    SECTION,
    TENSOR,
    Part,
    Split,
    fed,
    llama,
    place,
    resumed,
    shared,
    spelt,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.witness import BATCH, Failure, Witness, config_of, engine_of, owner, perform, samples

pytest.importorskip("deepspeed")

# --- tensor parallelism ----------------------------------------------------------------------------------------------


def tensor(folder: Path, **section: Any) -> dict[str, Any]:
    return resumed(folder, config_of({**SECTION, **section}, stage=1, tensor_parallel=TENSOR), Split)


def strayed(folder: Path) -> str:
    """From the second step on, each rank goes by its own number."""
    engine = engine_of(config_of(SECTION, tensor_parallel=TENSOR), Split())
    fed(engine, range(1))
    fed(engine, range(1, 3), owner=dist.get_rank())
    return message(BatchError, lambda: engine.save_checkpoint(shared(folder)))


# --- sequence parallelism --------------------------------------------------------------------------------------------


def sequence(folder: Path) -> dict[str, Any]:
    """Both peers see whole samples, as where the model itself takes its part."""
    return resumed(folder, config_of(SECTION, **MESH), Witness)


def parts(folder: Path) -> dict[str, Any]:
    """Each peer sees its part of the samples, as where the loader cuts them."""
    half = dist.get_rank() % 2
    return resumed(folder, config_of(SECTION, **MESH), partial(Part, half), half=half)


def unreadable(folder: Path) -> str:
    """A checkpoint of which the files of one peer were damaged."""
    config, half, folder = config_of(SECTION, **MESH), dist.get_rank() % 2, shared(folder)
    engine = engine_of(config, Part(half))
    fed(engine, range(4), half=half)
    engine.save_checkpoint(folder)
    if dist.get_rank() == 0:
        path = next(folder.rglob("rehearsal-peer1-of-2/rehearsal-step*rank1*"))
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    again = engine_of(config, Part(half))
    return message(CheckpointError, lambda: again.load_checkpoint(folder))


def strayed_at_once(folder: Path) -> str:
    """Peers are given rows of different classes from the first step on."""
    engine, rank = engine_of(config_of(SECTION, **MESH)), dist.get_rank()
    return message(BatchError, lambda: fed(engine, range(rank, rank + 1)))


def by_content(folder: Path) -> list[str]:
    sections: list[dict[str, Any]] = [
        {"padding": {"length": 8, "values": {"x": 0}}},
        {"non_finite": "skip"},
        {"buffer": {"deduplicate": True}},
    ]
    configs = [config_of({**SECTION, **section}, **MESH) for section in sections]
    return [message(ConfigError, partial(engine_of, config)) for config in configs]


def ulysses(folder: Path) -> dict[str, Any]:
    """A model of transformers whose attention and loader share out the sequence, as DeepSpeed's own do.

    Every rank reads batches of its own, and sees its part of those of its peer too. The first half of a row's tokens
    spells its `uid`, and so does the second.
    """
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter

    deepspeed.init_distributed()
    model = llama()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", 2, micro_batch_size=BATCH, seq_length=2 * DIGITS, seq_length_is_variable=False
    )
    section = {"buffer": {"capacity": 500}, "ratio": 0.25, "mode": "replace", "inject": "loader"}
    engine = engine_of(config_of(section), model, mpu=mpu)
    assert engine.data_parallel_group is None
    side = mpu.get_sequence_parallel_rank()
    own = [spelt(number) for number in range(SAVED)]
    parts = UlyssesSPDataLoaderAdapter(own, side, mpu.get_sequence_parallel_group(), 2, torch.device("cpu"))
    seen, torn = [], 0
    for batch in islice(engine.rehearsal.loader(parts), SAVED):
        labels = batch.pop("shift_labels")
        torn += int((batch["position_ids"] != torch.arange(DIGITS) + DIGITS * side).any(1).sum())
        seen.append((batch["input_ids"] * BASE ** torch.arange(DIGITS)).sum(1).tolist())
        engine.backward(nn.functional.cross_entropy(engine(**batch).logits.mT, labels))
        engine.step()
    engine.destroy()
    return {"whole": {"place": place(engine), "seen": seen, "torn": torn, "metrics": engine.rehearsal.metrics()}}


def mesh(folder: Path) -> dict[str, Any]:
    """A loop of its own on a device mesh, without an engine."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    place, folder = both.get_local_rank("data"), shared(folder)
    tag = folder / f"global_step{SAVED}"

    def run(rehearsal: Rehearsal, steps: range) -> dict[str, Any]:
        seen = [rehearsal.update(samples(step, rank=place))["uid"].tolist() for step in steps]
        return {"place": place, "seen": seen, "torn": 0}

    def started() -> Rehearsal:
        return Rehearsal(SECTION, TorchDistributedTransport(both.get_group("data")))

    def counted(rehearsal: Rehearsal) -> dict[str, float]:
        rehearsal.close()
        return {name: value for name, value in rehearsal.metrics().items() if not name.endswith("_ms")}

    whole, again = started(), started()
    before = run(whole, range(SAVED))
    whole.save(tag, write=both.get_local_rank("tensor") == 0)
    after = run(whole, range(SAVED, SAVED + RESUMED))
    dist.barrier()
    again.load(tag)
    resumed = run(again, range(SAVED, SAVED + RESUMED))
    return {
        "whole": {**before, "seen": before["seen"] + after["seen"], "metrics": counted(whole)},
        "again": {**resumed, "metrics": counted(again)},
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*rehearsal-step*")),
    }


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "tensor": tensor,
    "tensor asynchronous": partial(tensor, checkpoint={"asynchronous": True, "incremental": True}),
    "strayed": strayed,
    "sequence": sequence,
    "parts": parts,
    "unreadable": unreadable,
    "strayed at once": strayed_at_once,
    "by content": by_content,
    "ulysses": ulysses,
    "mesh": mesh,
}


def in_new_groups(folder: Path, function: Callable[[Path], Any]) -> Any:
    """As in a process of its own; DeepSpeed keeps the groups of the first engine for all later ones."""
    from deepspeed.utils import groups

    groups._release_process_group_references()
    return function(folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    scenarios = {name: partial(in_new_groups, function=function) for name, function in SCENARIOS.items()}
    return run_ranks(perform, 4, scenarios, tmp_path_factory.mktemp("parallel"), timeout_s=240)


@pytest.fixture
def found(request: pytest.FixtureRequest, outcomes: list[dict[str, Any]]) -> list[Any]:
    """What each rank found in the scenario that the test names."""
    ranks = [outcome[request.param] for outcome in outcomes]
    for rank, outcome in enumerate(ranks):
        if isinstance(outcome, Failure):
            pytest.fail(f"rank {rank} raised:\n{outcome.trace}")
    return ranks


def scenario(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", names, indirect=True)


PARALLEL = ("tensor", "tensor asynchronous", "sequence", "parts", "mesh")


@scenario(*PARALLEL, "ulysses")
def test_peers_see_the_same_rows_in_every_step_and_other_ranks_see_others(found: list[Any]) -> None:
    assert [rank["whole"]["place"] for rank in found] == [0, 0, 1, 1]
    first, first_peer, second, second_peer = (rank["whole"]["seen"] for rank in found)
    assert first == first_peer
    assert second == second_peer
    assert all(set(mine) != set(other) for mine, other in zip(first, second, strict=True))


@scenario(*PARALLEL, "ulysses")
def test_replayed_rows_are_whole_and_come_from_both_data_parallel_ranks(found: list[Any]) -> None:
    owners = [{owner(uids[0]) for uids in rank["whole"]["seen"]} for rank in found]
    for number, rank in enumerate(found):
        seen = [uid for uids in rank["whole"]["seen"] for uid in uids]
        assert {owner(uid) for uid in seen} == owners[0] | owners[2] > owners[number]
        assert rank["whole"]["metrics"]["rows_replayed"] > 0
        assert rank["whole"]["torn"] == 0


@scenario(*PARALLEL)
def test_a_job_with_peers_goes_on_bit_for_bit(found: list[Any]) -> None:
    for rank in found:
        assert rank["again"]["seen"] == rank["whole"]["seen"][SAVED:]
        assert rank["again"]["metrics"] == rank["whole"]["metrics"]


@scenario("tensor", "sequence", "mesh")
def test_peers_with_the_same_rows_save_them_once(found: list[Any]) -> None:
    tag = f"global_step{SAVED}"
    assert found[0]["files"] == [f"{tag}/rehearsal-step{SAVED}-rank{rank}-of-2.safetensors" for rank in range(2)]


@scenario("parts")
def test_peers_with_parts_of_the_samples_save_their_own(found: list[Any]) -> None:
    names = [f"rehearsal-step{SAVED}-rank{rank}-of-2.safetensors" for rank in range(2)]
    folders = [f"global_step{SAVED}/rehearsal-peer{peer}-of-2" for peer in range(2)]
    assert found[0]["files"] == [f"{folder}/{name}" for folder in folders for name in names]


@scenario("strayed", "strayed at once")
def test_peers_that_were_given_different_batches_are_told_on_every_rank(found: list[Any]) -> None:
    for text in found:
        assert "the ranks 0 and 1 hold different rows, and both have rank 0 in their data-parallel groups" in text


@scenario("unreadable")
def test_what_one_rank_cannot_load_nobody_loads(found: list[Any]) -> None:
    for rank, text in enumerate(found):
        assert "cannot be read" in text if rank == 3 else "rank 1 failed" in text or "rank 1 cannot load" in text


@scenario("by content")
def test_what_goes_by_the_content_of_rows_is_refused_where_ranks_may_have_parts_of_them(found: list[Any]) -> None:
    for rank in found:
        assert ["rehearsal.padding" in rank[0], "'skip'" in rank[1], "deduplicate" in rank[2]] == [True] * 3
