"""A new job that begins with rows of another: which rows a rank gets, when, and what they count as."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rehearsal_plugin
from rehearsal_plugin import Rehearsal, RehearsalConfig
from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.checkpoint.convert import Sample
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import CheckpointError, ConfigError
from rehearsal_plugin.integrations.peers import check_sequence_parallelism
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, ids_of, intact, new_batch, same, samples
from tests.helpers.seat import Seat

OLD = 900_000_000
"""Ids of rows from another job begin here."""

SIZE, AMOUNT = 6, 40
OLD_ROWS = list(range(OLD, OLD + AMOUNT))


def seeded(folder: Path, amount: int = AMOUNT, label: int | None = None, **keys: Any) -> Path:
    """A folder that `rehearsal seed` would write."""
    ids = torch.arange(OLD, OLD + amount)
    sample = Sample()
    sample.offer(samples(ids, None if label is None else torch.full((amount,), label)))
    sample.save(folder, **keys)
    return folder


def job(folder: Path, buffer: dict[str, Any] | None = None, **keys: Any) -> Rehearsal:
    block = {"capacity": 500, "preload": str(folder), **(buffer or {})}
    return Rehearsal({"buffer": block, "representatives": 4, **keys}, LocalTransport())


def stored(rehearsal: Rehearsal) -> Batch:
    """All rows of the buffer, by slot."""
    rehearsal._coordinator.drain()
    assert rehearsal.buffer is not None
    batch: Batch = rehearsal.buffer.layout.unpack(rehearsal.buffer.state_dict()["rows"])
    return batch


def old_rows(rehearsal: Rehearsal) -> list[int]:
    return sorted(row for row in ids_of(stored(rehearsal), 0) if row >= OLD)


def run(rehearsal: Rehearsal, steps: Sequence[int] = range(8), rank: int = 0) -> list[Batch]:
    return [rehearsal.update(new_batch(rank, step, SIZE)) for step in steps]


def nothing() -> Batch:
    """A batch without a row."""
    return new_batch(0, 0, 0)


# --- what a job begins with ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 3])
def test_the_buffer_holds_the_rows_before_the_first_batch_is_offered(files: int, tmp_path: Path) -> None:
    with job(seeded(tmp_path, ranks=files)) as rehearsal:
        assert rehearsal.buffer is None, "nothing is read before a batch comes"
        assert rehearsal.steps == 0
        (first,) = run(rehearsal, [0])
        assert same(first, new_batch(0, 0, SIZE))
        assert old_rows(rehearsal) == OLD_ROWS
        assert rehearsal.steps == 1


def test_they_are_replayed_from_the_third_step_on(tmp_path: Path) -> None:
    with job(seeded(tmp_path)) as rehearsal:
        seen = run(rehearsal, range(40))
    assert [len(batch["id"]) - SIZE for batch in seen] == [0, 0] + [4] * 38
    assert all(map(intact, seen))
    replayed = [row for batch in seen for row in ids_of(batch, SIZE)]
    assert set(ids_of(seen[2], SIZE)) <= {*OLD_ROWS, *range(SIZE)}
    assert len(set(OLD_ROWS) & set(replayed)) > AMOUNT / 2
    assert {row for row in replayed if row < OLD}, "and new ones"


def test_a_checkpoint_of_any_job_will_do(tmp_path: Path) -> None:
    for rank in range(3):
        section = {"buffer": {"capacity": 30}, "representatives": 4, "sampling": {"scope": "local"}}
        with Rehearsal(section, Seat(rank, 3)) as rehearsal:
            run(rehearsal, range(100, 120), rank)
            rehearsal.save(tmp_path)
    with job(tmp_path, {"policy": "balanced", "partition_by": "label"}) as rehearsal:
        rehearsal.update(nothing())
        assert intact(stored(rehearsal))
        assert rehearsal.steps == 1, "it is a new job, whatever the step of the checkpoint"
        rehearsal.save(tmp_path / "new")
    found = tools.inspect(tmp_path / "new")
    assert (found["step"], found["age_steps"]) == (1, [1.0] * 5), "rows of before are as old as the job"
    assert found["rows_by_origin"] == {0: 30, 1: 30, 2: 30}


def test_a_checkpoint_of_the_same_job_gives_its_rows_and_nothing_else(tmp_path: Path) -> None:
    with Rehearsal({"buffer": {"capacity": 500}, "representatives": 4}, LocalTransport()) as rehearsal:
        run(rehearsal, range(50, 60))
        rehearsal.save(tmp_path)
    with job(tmp_path) as rehearsal:
        seen = run(rehearsal)
        assert rehearsal.steps == 8
        assert rehearsal.metrics()["rows_offered"] == 8 * SIZE
    assert [len(batch["id"]) - SIZE for batch in seen] == [0, 0] + [4] * 6


@pytest.mark.parametrize("policy", ["reservoir", "balanced", "random_replace", "fifo", "score", "herding"])
def test_every_policy_takes_them(policy: str, tmp_path: Path) -> None:
    score = {"score": {"score_by": "half"}, "herding": {"score_by": "x"}}.get(policy, {})
    with job(seeded(tmp_path), {"policy": policy, "partition_by": "label", "capacity": 60, **score}) as rehearsal:
        run(rehearsal, [0])
        assert old_rows(rehearsal) == OLD_ROWS
        assert all(map(intact, run(rehearsal, range(1, 20))))
        assert len(stored(rehearsal)["id"]) == 60


def test_where_there_is_too_little_room_some_stay(tmp_path: Path) -> None:
    with job(seeded(tmp_path), {"capacity": 10}) as rehearsal:
        rehearsal.update(nothing())
        assert len(set(old_rows(rehearsal))) == 10
        assert rehearsal.buffer is not None
        assert rehearsal.buffer.slot_index.offered == AMOUNT


def test_rows_twice_in_the_data_are_stored_once_if_the_buffer_wants_it_so(tmp_path: Path) -> None:
    sample = Sample()
    for _ in range(2):
        sample.offer(samples(torch.tensor(OLD_ROWS)))
    sample.save(tmp_path)
    with job(tmp_path, {"deduplicate": True}) as rehearsal:
        run(rehearsal, [0, 0])
        assert old_rows(rehearsal) == OLD_ROWS
        rehearsal.update(samples(torch.tensor(OLD_ROWS)))
        assert rehearsal.metrics()["rows_duplicate"] == SIZE + AMOUNT


# --- what they count as ----------------------------------------------------------------------------------------------


def test_rows_count_as_offered_with_all_those_that_they_were_drawn_from(tmp_path: Path) -> None:
    with job(seeded(tmp_path, seen=4000), {"capacity": AMOUNT}) as rehearsal:
        run(rehearsal, range(50))
        assert rehearsal.buffer is not None
        assert rehearsal.buffer.slot_index.offered == 4000 + 50 * SIZE
        assert len(old_rows(rehearsal)) >= 30, "300 new rows beside 4000 old ones take few of 40 places"


def test_rows_that_stand_for_themselves_make_way_as_others_do(tmp_path: Path) -> None:
    with job(seeded(tmp_path), {"capacity": AMOUNT}, seed=1) as rehearsal:
        run(rehearsal, range(50))
        assert 0 < len(old_rows(rehearsal)) <= 15, "of 340 rows 40 are theirs"


def test_partitions_are_those_of_the_rows(tmp_path: Path) -> None:
    with job(seeded(tmp_path, label=7), {"partition_by": "label"}) as rehearsal:
        rehearsal.update(new_batch(0, 0, SIZE, label=2))
        metrics = rehearsal.metrics()
    assert {name: metrics[name] for name in metrics if "stored/" in name} == {
        "rows_stored/7": AMOUNT,
        "rows_stored/2": SIZE,
    }


# --- whether the batches fit -----------------------------------------------------------------------------------------


def test_batches_may_list_their_fields_in_another_order(tmp_path: Path) -> None:
    with job(seeded(tmp_path)) as rehearsal:
        for step in range(8):
            given = dict(reversed(new_batch(0, step, SIZE).items()))
            batch = rehearsal.update(given)
            assert list(batch) == list(given)
            assert intact({name: batch[name] for name in new_batch(0, 0, 1)})
        assert len(batch["id"]) == SIZE + 4
        assert old_rows(rehearsal) == OLD_ROWS
        assert intact({name: stored(rehearsal)[name] for name in new_batch(0, 0, 1)})


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: {**batch, "x": batch["x"].float()},
        lambda batch: {**batch, "label": batch["label"][:, None]},
        lambda batch: {**batch, "more": batch["id"]},
        lambda batch: {name: value for name, value in batch.items() if name != "odd"},
    ],
)
def test_batches_of_other_fields_are_refused_at_the_first(change: Any, tmp_path: Path) -> None:
    with job(seeded(tmp_path)) as rehearsal, pytest.raises(CheckpointError, match="batches of the same fields"):
        rehearsal.update(change(new_batch(0, 0, SIZE)))


def test_a_strategy_that_needs_records_refuses_rows_without_them(tmp_path: Path) -> None:
    seeded(tmp_path)
    for keys in ({"strategy": {"name": "der"}}, {"buffer": {"policy": "score", "score_by": "loss"}}):
        with job(tmp_path, keys.pop("buffer", None), **keys) as rehearsal:
            with pytest.raises(CheckpointError, match=r"rehearsal\.buffer\.preload: .*recorded"):
                rehearsal.augment(new_batch(0, 0, SIZE))
            assert rehearsal.buffer is None


@pytest.mark.parametrize("name", ["der", "x-der"])
def test_and_takes_those_that_it_recorded_itself(name: str, tmp_path: Path) -> None:
    def train(rehearsal: Rehearsal, steps: Sequence[int]) -> list[Batch]:
        seen = []
        for step in steps:
            seen.append(rehearsal.augment(new_batch(0, step, SIZE)))
            rehearsal.loss(cross_entropy, seen[-1]["x"].float().repeat(1, 2), seen[-1]["label"])
            rehearsal.step()
        return seen

    buffer = {"capacity": 500}
    strategy = {"strategy": {"name": name}}
    with Rehearsal({"buffer": buffer, "representatives": 4, **strategy}, LocalTransport()) as rehearsal:
        train(rehearsal, range(5))
        rehearsal.save(tmp_path)
    with job(tmp_path, **strategy) as rehearsal:
        seen = train(rehearsal, range(50, 60))
        assert set(range(5 * 100)) & set(ids_of(stored(rehearsal), 0))
    assert len(seen[-1]["id"]) > SIZE


# --- new jobs, and those that go on ----------------------------------------------------------------------------------


def test_a_job_that_goes_on_from_its_checkpoint_preloads_nothing(tmp_path: Path) -> None:
    with job(seeded(tmp_path / "old")) as rehearsal:
        run(rehearsal)
        rehearsal.save(tmp_path / "own")
        expected = run(rehearsal, range(8, 20))
    with job(tmp_path / "gone") as rehearsal:  # its rows are in the checkpoint
        rehearsal.load(tmp_path / "own")
        resumed = run(rehearsal, range(8, 20))
    assert all(same(one, other) for one, other in zip(expected, resumed, strict=True))


def test_what_is_loaded_later_takes_the_place_of_what_was_preloaded(tmp_path: Path) -> None:
    with Rehearsal({"buffer": {"capacity": 500}, "representatives": 4}, LocalTransport()) as rehearsal:
        run(rehearsal)
        rehearsal.save(tmp_path / "own")
    with job(seeded(tmp_path / "old")) as rehearsal:
        run(rehearsal)
        rehearsal.load(tmp_path / "own")
        run(rehearsal, range(8, 10))
        assert old_rows(rehearsal) == []


def test_a_job_that_saved_before_its_first_batch_begins_anew(tmp_path: Path) -> None:
    for folder in (None, tmp_path / "own"):
        with job(tmp_path / "old" if folder else seeded(tmp_path / "old")) as rehearsal:
            if folder is None:
                rehearsal.save(tmp_path / "own")
            else:
                rehearsal.load(folder)
            run(rehearsal, [0])
            assert old_rows(rehearsal) == OLD_ROWS


def test_where_no_checkpoint_was_found_it_preloads(tmp_path: Path) -> None:
    with job(seeded(tmp_path / "old")) as rehearsal:
        assert not rehearsal.load(tmp_path / "none", missing_ok=True)
        run(rehearsal, [0])
        assert old_rows(rehearsal) == OLD_ROWS


# --- an elastic job's state ------------------------------------------------------------------------------------------


def test_a_rollback_to_before_the_first_batch_keeps_them(tmp_path: Path) -> None:
    with job(seeded(tmp_path)) as rehearsal:
        rehearsal.commit()
        run(rehearsal)
        rehearsal.rollback()
        assert ids_of(stored(rehearsal), 0) == OLD_ROWS
        run(rehearsal)
        assert old_rows(rehearsal) == OLD_ROWS


def test_a_rank_that_joins_later_starts_empty(tmp_path: Path) -> None:
    with job(seeded(tmp_path)) as rehearsal:
        rehearsal.commit()
        rehearsal.restart(5)
        run(rehearsal)
        assert old_rows(rehearsal) == []


def test_ranks_that_begin_anew_together_read_them_anew(tmp_path: Path) -> None:
    with job(seeded(tmp_path)) as rehearsal:
        rehearsal.commit()
        rehearsal.augment(new_batch(0, 0, SIZE))
        rehearsal.rollback()
        rehearsal.restart(0, LocalTransport)
        assert rehearsal.buffer is None
        run(rehearsal)
        assert old_rows(rehearsal) == OLD_ROWS


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_folder_without_rows_is_named(tmp_path: Path) -> None:
    with Rehearsal({"buffer": {"capacity": 5}}, LocalTransport()) as rehearsal:
        rehearsal.save(tmp_path / "empty")
    for name, cause in (("missing", "has no rehearsal checkpoint"), ("empty", "holds no rows yet")):
        with job(tmp_path / name) as rehearsal:
            for _ in range(2):
                with pytest.raises(CheckpointError, match=rf"rehearsal\.buffer\.preload: .*/{name} {cause}"):
                    run(rehearsal, [0])


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    (path,) = seeded(tmp_path).iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with job(tmp_path) as rehearsal, pytest.raises(CheckpointError, match="changed since it was written"):
        run(rehearsal, [0])


# --- real ranks ------------------------------------------------------------------------------------------------------

SECTION = {"representatives": 6, "exchange": {"timeout_s": 20}}


def begin(folder: Path, capacity: int) -> tuple[list[int], list[int], list[int], bool]:
    """Old rows of this rank, old rows that it saw, rows replayed at every step, and whether all were whole."""
    buffer = {"capacity": capacity, "preload": str(folder)}
    with Rehearsal({**SECTION, "buffer": buffer}) as rehearsal:
        seen = run(rehearsal, range(30), dist.get_rank())
        replayed = [row for batch in seen for row in ids_of(batch, SIZE)]
        sizes = [len(batch["id"]) - SIZE for batch in seen]
        return old_rows(rehearsal), [row for row in replayed if row >= OLD], sizes, all(map(intact, seen))


@pytest.mark.parametrize(("ranks", "files"), [(2, 1), (2, 3), (3, 2)])
def test_ranks_share_out_the_rows_and_replay_those_of_all(ranks: int, files: int, tmp_path: Path) -> None:
    results = run_ranks(begin, ranks, seeded(tmp_path, ranks=files), 500)
    shares = [own for own, _, _, _ in results]
    assert sorted(row for own in shares for row in own) == OLD_ROWS, "each has one owner"
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank, (own, replayed, sizes, whole) in enumerate(results):
        assert sizes == [0, 0] + [6] * 28
        assert whole
        assert set(replayed) - set(own), f"rank {rank} saw rows that it does not hold"
        assert set(replayed) & set(own)


def fail_to_begin(folders: Sequence[Path]) -> list[str]:
    """What every rank is told, where each looks into a folder of its own; and that a second try may succeed."""
    told = []
    for folder in (folders[dist.get_rank()], folders[0]):
        with Rehearsal({**SECTION, "buffer": {"capacity": 500, "preload": str(folder)}}) as rehearsal:
            try:
                run(rehearsal, range(4), dist.get_rank())
                told.append(str(len(old_rows(rehearsal))))
            except CheckpointError as error:
                told.append(str(error))
    return told


def test_if_one_rank_cannot_begin_none_does(tmp_path: Path) -> None:
    broken = seeded(tmp_path / "broken")
    for path in broken.iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    told = run_ranks(fail_to_begin, 2, [seeded(tmp_path / "whole"), broken])
    for cause, (first, second) in zip(["rank 1 cannot load", "cannot be read"], told, strict=True):
        assert cause in first
        assert "rehearsal.buffer.preload" in first
        assert second == str(AMOUNT // 2)


def test_ranks_without_the_files_get_their_rows_from_those_that_have_them(tmp_path: Path) -> None:
    told = run_ranks(fail_to_begin, 2, [seeded(tmp_path / "whole"), tmp_path / "none"])
    assert told == [[str(AMOUNT // 2)] * 2] * 2
    assert not (tmp_path / "none").exists()


# --- DeepSpeed and Horovod -------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Notes the ids of the rows of every pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 5)
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor, half: Tensor, odd: Tensor, id: Tensor, label: Tensor) -> Tensor:
        self.seen.append(id.tolist())
        return cross_entropy(self.linear(x.float() / 1e7), label)


def train_with_deepspeed(folder: Path) -> list[list[list[int]]]:
    """What the model sees in a new job, and in one that goes on from its checkpoint."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take half a minute
    rank, found = dist.get_rank(), []
    for first, last in ((0, 6), (6, 12)):
        model = Model()
        engine, *_ = rehearsal_plugin.initialize(
            model=model,
            model_parameters=model.parameters(),
            config={
                "train_micro_batch_size_per_gpu": SIZE,
                "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
                "rehearsal": {**SECTION, "buffer": {"capacity": 500, "preload": str(folder / f"old-{first}")}},
            },
        )
        if first:
            engine.load_checkpoint(folder / "own")
        for step in range(first, last):
            engine.backward(engine(**new_batch(rank, step, SIZE)))
            engine.step()
        engine.save_checkpoint(folder / "own")
        found.append(model.seen)
        engine.destroy()
    return found


def test_under_deepspeed_only_a_new_job_begins_with_them(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    seeded(tmp_path / "old-0")
    for first, second in run_ranks(train_with_deepspeed, 2, tmp_path, timeout_s=200):
        assert [len(seen) - SIZE for seen in first] == [0] * 3 + [6] * 3
        assert [len(seen) - SIZE for seen in second] == [6] * 6
        assert {row for seen in (*first, *second) for row in seen} & set(OLD_ROWS)


@pytest.mark.parametrize("key", [{"preload": "old"}, {"deduplicate": True}])
def test_ranks_that_have_parts_of_samples_are_refused_what_goes_by_whole_ones(key: dict[str, Any]) -> None:
    config = RehearsalConfig.load({"buffer": key})
    check_sequence_parallelism(Namespace(sequence_parallel_size=1), config)
    with pytest.raises(ConfigError, match="goes by the content of rows"):
        check_sequence_parallelism(Namespace(sequence_parallel_size=2), config)


def train_with_horovod(folder: Path) -> tuple[list[list[int]], list[int]]:
    """What the model sees, and the old rows of this rank."""
    import horovod.torch as hvd

    model = Model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters())
    section = {**SECTION, "buffer": {"capacity": 500, "preload": str(folder)}}
    handle = rehearsal_plugin.attach(optimizer, model=model, config=section)
    for step in range(8):
        model(**new_batch(hvd.rank(), step, SIZE)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.rehearsal is not None
    own = old_rows(handle.rehearsal)
    handle.close()
    return model.seen, own


@pytest.mark.horovod
def test_ranks_of_horovod_share_them_out(tmp_path: Path) -> None:
    pytest.importorskip("horovod.torch")
    from tests.helpers.horovod_ranks import run_horovod

    results = run_horovod(train_with_horovod, 2, seeded(tmp_path))
    assert sorted(row for _, own in results for row in own) == OLD_ROWS
    for seen, _ in results:
        assert [len(rows) - SIZE for rows in seen] == [0] * 3 + [6] * 5
        assert {row for rows in seen for row in rows} & set(OLD_ROWS)


@pytest.mark.horovod
def test_a_survivor_of_an_elastic_job_keeps_them_even_before_the_first_commit(tmp_path: Path) -> None:
    pytest.importorskip("horovod.torch")
    from tests.integrations.horovod.test_elastic import ALL, SCRIPT, SECTION, Elastic

    ids, sample = torch.tensor(OLD_ROWS), Sample()
    sample.offer({"x": torch.stack((ids, -ids), 1).float(), "id": ids, "label": ids % 5})
    sample.save(tmp_path / "old")
    job = Elastic(tmp_path, ALL[:2])
    job.config.write_text(SECTION.replace("capacity: 40", f"capacity: 40, preload: {tmp_path / 'old'}"))
    job.run(2, SCRIPT, "--out", tmp_path, "--attach", job.config, "--steps", 6, "--kill", 2, "--want", 1).succeeded()
    (notes,) = [lines for lines in job.notes().values() if lines[-1]["what"] == "end"]
    first, again = (note for note in notes if note["what"] == "enter")
    assert first["stored"] == [], "no batch has come"
    share = again["stored"][0]
    assert len(share) == AMOUNT // 2
    assert set(share) <= set(OLD_ROWS)
    replayed = {row for note in notes if note["what"] == "step" and note["size"] == 1 for row in note["seen"][SIZE:]}
    assert replayed & set(share)
