"""A job that was saved and loaded goes on as if it had never stopped; what is written, and when."""

from __future__ import annotations

import errno
import functools
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.checkpoint import format as files
from rehearsal_plugin.checkpoint import increments, saver
from rehearsal_plugin.checkpoint.format import Content, RankFile
from rehearsal_plugin.checkpoint.increments import read_checkpoint
from rehearsal_plugin.checkpoint.timeline import find_newest
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, CheckpointError, ClosedError, RehearsalError
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, new_batch, same, samples

SIZE, HALF = 8, 12
EXCHANGE = {"timeout_s": 20}


class Job:
    """A model, its optimizer and a rehearsal.

    Args:
        micro: Micro-batches a step.
        transform: As for `Rehearsal`.
        labels: Classes of the samples.
        keys: The section.
    """

    def __init__(self, *, micro: int = 1, transform: Any = None, labels: int = 5, **keys: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 5)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        amount = {} if "ratio" in keys else {"representatives": 4}
        section = {"buffer": {"capacity": 40}, "exchange": EXCHANGE, **amount, **keys}
        grouped = dist.is_initialized()
        self.rehearsal = Rehearsal(section, None if grouped else LocalTransport(), transform=transform)
        self.rank, self._micro, self._labels = dist.get_rank() if grouped else 0, micro, labels

    def train(self, first: int, last: int) -> list[Batch]:
        """Steps `first` to `last - 1`; what the model saw in each micro-batch."""
        return [self.micro_batch(step, micro) for step in range(first, last) for micro in range(self._micro)]

    def micro_batch(self, step: int, micro: int) -> Batch:
        """One micro-batch; a step ends with its last one."""
        number = step * self._micro + micro
        own = new_batch(self.rank, number, SIZE - number % 3)
        seen: Batch = self.rehearsal.augment(samples(own["id"], own["id"] % self._labels))
        outputs = self.model((seen["x"] % 97).float() / 97)
        torch.autograd.backward(self.rehearsal.loss(cross_entropy, outputs, seen["label"] % 5))
        if micro == self._micro - 1:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.rehearsal.step()
        return seen

    def resumed(self, folder: Path, **arguments: Any) -> Job:
        """Another job with this one's model and the rehearsal's checkpoint."""
        other = Job(**arguments)
        other.model.load_state_dict(self.model.state_dict())
        other.rehearsal.load(folder)
        return other


def timeless(value: Any) -> Any:
    """JSON without the times that were measured."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.endswith("_ms")}
    return value


def content(folder: Path, rank: int = 0) -> Content:
    """The newest file of a rank, without times."""
    found = find_newest(folder)
    assert found is not None
    read = read_checkpoint(folder, found[rank])
    return Content(timeless({**read.meta, "parts": None}), read.tensors)


def alike(first: Content, second: Content) -> bool:
    """Bit for bit the same, whatever it took."""
    names = first.tensors.keys() == second.tensors.keys()
    return (
        names
        and first.meta == second.meta
        and all(_bits(first.tensors[name]) == _bits(second.tensors[name]) for name in first.tensors)
    )


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def counts(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith("_ms")}


def compare(folder: Path, *, stop: int = HALF, last: int = 2 * HALF, **arguments: Any) -> list[str]:
    """What differs between a job and one that was stopped, saved and loaded."""
    whole, first = Job(**arguments), Job(**arguments)
    seen = whole.train(0, last)
    begun = first.train(0, stop)
    with waiting(first.rehearsal):
        first.rehearsal.save(folder / "stopped")
    second = first.resumed(folder / "stopped", **arguments)
    rest = second.train(stop, last)
    for job, name in ((whole, "whole"), (second, "resumed")):
        with waiting(job.rehearsal):
            job.rehearsal.save(folder / name)
    facts = {
        "batches": all(same(a, b) for a, b in zip(seen, begun + rest, strict=True)),
        "replay": any(len(batch["id"]) > SIZE or whole.rehearsal.metrics()["rows_displaced"] for batch in rest),
        "metrics": counts(whole.rehearsal.metrics()) == counts(second.rehearsal.metrics()),
        "model": all(map(torch.equal, whole.model.state_dict().values(), second.model.state_dict().values())),
        "state": alike(*(content(folder / name, whole.rank) for name in ("whole", "resumed"))),
        "steps": whole.rehearsal.steps == second.rehearsal.steps == last,
    }
    return [name for name, right in facts.items() if not right]


@contextmanager
def waiting(rehearsal: Rehearsal) -> Iterator[None]:
    """Save inside, and close: no file is read before all ranks have written theirs."""
    yield
    rehearsal.close()
    if dist.is_initialized():
        dist.barrier()


def shift(batch: Batch) -> Batch:
    """An augmentation that does not change by itself."""
    return {**batch, "x": batch["x"] + batch["id"][:, None] % 7}


CLASSES = {"capacity": 40, "partition_by": "label"}
VARIANTS: dict[str, dict[str, Any]] = {
    "er": {},
    "er with weights": {"strategy": {"name": "er", "loss_weight": 0.5}},
    "er-ace": {"strategy": {"name": "er-ace"}},
    "der": {"strategy": {"name": "der"}},
    "der++": {"strategy": {"name": "der++"}},
    "x-der": {"strategy": {"name": "x-der"}, "micro": 2},
    "topk": {"strategy": {"name": "topk", "k": 2}},
    "loss": {
        "buffer": {"capacity": 40, "policy": "score", "score_by": "loss"},
        "sampling": {"weights": "score"},
        "strategy": {"name": "der++"},
    },
    "reservoir of classes": {"buffer": CLASSES},
    "balanced": {"buffer": {**CLASSES, "policy": "balanced"}, "sampling": {"weights": "balanced"}},
    "random": {"buffer": {"capacity": 40, "policy": "random_replace"}},
    "fifo": {"buffer": {**CLASSES, "policy": "fifo"}},
    "score": {"buffer": {"capacity": 40, "policy": "score", "score_by": "half"}},
    "herding": {"buffer": {**CLASSES, "policy": "herding", "score_by": "x"}},
    "closest": {"buffer": {"capacity": 40, "policy": "closest_to_centre", "score_by": "x"}},
    "mmap": {},
    "ratio": {"ratio": 0.3},
    "ratio of two draws": {"ratio": 0.3, "strategy": {"name": "der++"}},
    "replace": {"mode": "replace", "ratio": 0.3, "strategy": {"name": "der++"}},
    "micro-batches": {"micro": 3, "ratio": 0.3},
    "candidates": {"candidates": 3, "micro": 2},
    "late start": {"start_step": HALF + 4},
    "start at the save": {"start_step": HALF},
    "local": {"sampling": {"scope": "local"}},
    "transform": {"transform": shift},
    "transform of all": {"transform": shift, "strategy": {"name": "der", "transform": "all"}},
    "inline": {"exchange": {"launch": "inline", **EXCHANGE}},
    "asynchronous": {"checkpoint": {"asynchronous": True}},
    "incremental": {"checkpoint": {"asynchronous": True, "incremental": True}},
    "seed": {"seed": 2**62, "candidates": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_job_that_was_stopped_goes_on_bit_for_bit(variant: str, tmp_path: Path) -> None:
    keys = dict(VARIANTS[variant])
    if variant == "mmap":
        keys["buffer"] = {"capacity": 40, "storage": "mmap", "path": str(tmp_path / "rows")}
    assert compare(tmp_path, **keys) == []


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("variant", ["er", "x-der", "micro-batches", "ratio"])
def test_it_does_whenever_it_is_saved(variant: str, stop: int, tmp_path: Path) -> None:
    assert compare(tmp_path, stop=stop, last=10, **VARIANTS[variant]) == []


@pytest.mark.parametrize("variant", ["er", "x-der"])
def test_a_save_before_any_batch_is_a_beginning(variant: str, tmp_path: Path) -> None:
    assert compare(tmp_path, stop=0, last=10, **VARIANTS[variant]) == []


@pytest.mark.parametrize("variant", ["er", "x-der", "loss", "micro-batches", "herding"])
def test_a_save_right_after_a_load_is_what_was_loaded(variant: str, tmp_path: Path) -> None:
    job = Job(**VARIANTS[variant])
    job.train(0, HALF)
    job.rehearsal.save(tmp_path / "first")
    loaded = job.resumed(tmp_path / "first", **VARIANTS[variant])
    loaded.rehearsal.save(tmp_path / "second")
    assert alike(content(tmp_path / "first"), content(tmp_path / "second"))


def test_the_loop_of_update_goes_on_bit_for_bit_too(tmp_path: Path) -> None:
    section = {"buffer": {"capacity": 40}, "ratio": 0.3}
    with Rehearsal(section, LocalTransport()) as whole:
        seen = [whole.update(new_batch(0, step, SIZE)) for step in range(2 * HALF)]
    with Rehearsal(section, LocalTransport()) as first:
        begun = [first.update(new_batch(0, step, SIZE)) for step in range(HALF)]
        first.save(tmp_path)
    with Rehearsal(section, LocalTransport()) as second:
        second.load(tmp_path)
        rest = [second.update(new_batch(0, step, SIZE)) for step in range(HALF, 2 * HALF)]
    assert all(same(a, b) for a, b in zip(seen, begun + rest, strict=True))


@pytest.mark.parametrize("done", [1, 2])
def test_between_micro_batches_of_a_step_too(done: int, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"micro": 3, "ratio": 0.3, "candidates": 5}
    whole, first = Job(**keys), Job(**keys)
    seen = whole.train(0, 10)
    first.train(0, 5)
    for micro in range(done):
        first.micro_batch(5, micro)
    first.rehearsal.save(tmp_path)
    second = first.resumed(tmp_path, **keys)
    rest = [second.micro_batch(5, micro) for micro in range(done, 3)] + second.train(6, 10)
    assert all(same(a, b) for a, b in zip(seen[15 + done :], rest, strict=True))
    assert counts(whole.rehearsal.metrics()) == counts(second.rehearsal.metrics())


def test_saving_changes_nothing(tmp_path: Path) -> None:
    for variant in ("er", "loss", "x-der"):
        plain, saving = Job(**VARIANTS[variant]), Job(**VARIANTS[variant])
        seen = plain.train(0, 10)
        for step in range(10):
            assert same(seen[step * plain._micro], saving.train(step, step + 1)[0])
            saving.rehearsal.save(tmp_path / variant)
        assert counts(plain.rehearsal.metrics()) == counts(saving.rehearsal.metrics())


def test_a_job_that_has_trained_on_goes_back(tmp_path: Path) -> None:
    for variant in ("er", "x-der", "balanced"):
        job, folder = Job(**VARIANTS[variant]), tmp_path / variant
        job.train(0, 5)
        job.rehearsal.save(folder)
        model = {name: value.clone() for name, value in job.model.state_dict().items()}
        once = job.train(5, 12)
        job.rehearsal.load(folder)
        job.model.load_state_dict(model)
        assert all(same(a, b) for a, b in zip(once, job.train(5, 12), strict=True))


def test_another_amount_of_replay_takes_effect_with_the_next_request(tmp_path: Path) -> None:
    job = Job()
    job.train(0, 6)
    job.rehearsal.save(tmp_path)
    rest = job.resumed(tmp_path, representatives=2).train(6, 10)
    assert [len(seen["id"]) - (SIZE - step % 3) for step, seen in enumerate(rest, 6)] == [4, 4, 4, 2]


# --- real ranks ------------------------------------------------------------------------------------------------------

MANY = {"capacity": 400, "partition_by": "label"}
ON_RANKS: dict[str, dict[str, Any]] = {
    "er": {"exchange": {"launch": "thread", **EXCHANGE}},
    "er, inline": {"exchange": {"launch": "inline", **EXCHANGE}},
    "x-der": {"strategy": {"name": "x-der"}, "exchange": {"launch": "thread", **EXCHANGE}},
    "x-der, inline": {"strategy": {"name": "x-der"}, "exchange": {"launch": "inline", **EXCHANGE}, "micro": 2},
    "local": {"sampling": {"scope": "local"}},
    "many partitions": {"buffer": MANY, "sampling": {"weights": "balanced"}, "labels": 1009, "representatives": 20},
    "loss": VARIANTS["loss"],
    "asynchronous": {"checkpoint": {"asynchronous": True}},
    "incremental": {"checkpoint": {"incremental": True}},
    "micro-batches": VARIANTS["micro-batches"],
    "replace": VARIANTS["replace"],
}


def on_ranks(folder: Path) -> bytes:
    found: dict[str, Any] = {name: compare(folder / name, **keys) for name, keys in ON_RANKS.items()}
    job = Job(**ON_RANKS["many partitions"])
    job.train(0, HALF)
    assert job.rehearsal._coordinator.prefetcher is not None
    found["partitions"] = len(job.rehearsal._coordinator.prefetcher._exchange.census.table.keys)
    job.rehearsal.save(folder / "again")
    dist.barrier()
    once = job.train(HALF, HALF + 4)
    job.rehearsal.load(folder / "again")
    twice = job.train(HALF, HALF + 4)
    found["back"] = all(same(a, b) for a, b in zip(once, twice, strict=True))
    job.rehearsal.close()
    return pickle.dumps(found)


@functools.cache
def ranks(size: int, folder: Path) -> list[dict[str, Any]]:
    return [pickle.loads(result) for result in run_ranks(on_ranks, size, folder / str(size), timeout_s=250)]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


both_sizes = pytest.mark.parametrize("size", [2, 3])


@both_sizes
@pytest.mark.parametrize("variant", ON_RANKS)
def test_ranks_that_were_stopped_go_on_bit_for_bit(size: int, variant: str, common: Path) -> None:
    assert [found[variant] for found in ranks(size, common)] == [[]] * size


@both_sizes
def test_ranks_that_have_trained_on_go_back(size: int, common: Path) -> None:
    for found in ranks(size, common):
        assert found["back"]
        assert found["partitions"] > 64, "more than a header has room for"


# --- in the background -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["er", "x-der", "loss", "micro-batches"])
def test_a_save_in_the_background_is_of_the_state_at_the_call(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def late(*arguments: Any) -> Path:
        assert go.wait(20)
        return files.write_file(*arguments)

    plain = Job(**VARIANTS[variant])
    plain.train(0, HALF)
    plain.rehearsal.save(tmp_path / "plain")
    monkeypatch.setattr(increments, "write_file", late)
    job = Job(**VARIANTS[variant], checkpoint={"asynchronous": True})
    job.train(0, HALF)
    job.rehearsal.save(tmp_path / "background")
    job.train(HALF, 2 * HALF)
    assert not (tmp_path / "background").exists()
    go.set()
    job.rehearsal.close()
    assert alike(content(tmp_path / "plain"), content(tmp_path / "background"))


def blocked(folder: Path) -> Path:
    """A folder that cannot be made, whoever asks."""
    (folder / "file").write_text("in the way")
    return folder / "file" / "checkpoints"


def test_the_next_save_tells_that_one_in_the_background_failed(tmp_path: Path) -> None:
    job = Job(checkpoint={"asynchronous": True})
    job.train(0, 3)
    job.rehearsal.save(blocked(tmp_path))
    with pytest.raises(CheckpointError, match="Not a directory"):
        job.rehearsal.save(tmp_path / "other")
    job.rehearsal.save(tmp_path / "other")
    job.rehearsal.close()
    assert len(files.list_files(tmp_path / "other")) == 1


def test_close_tells_it_too(tmp_path: Path) -> None:
    job = Job(checkpoint={"asynchronous": True})
    job.train(0, 3)
    job.rehearsal.save(blocked(tmp_path))
    with pytest.raises(CheckpointError, match="Not a directory"):
        job.rehearsal.close()
    job.rehearsal.close()
    for thread in threading.enumerate():
        if thread.name.startswith("rehearsal-save"):
            thread.join(20)
            assert not thread.is_alive()


def test_load_waits_for_the_save_before_it(tmp_path: Path) -> None:
    job = Job(checkpoint={"asynchronous": True})
    job.train(0, 6)
    job.rehearsal.save(tmp_path)
    job.rehearsal.load(tmp_path)
    assert job.rehearsal.steps == 6


# --- when it is allowed ----------------------------------------------------------------------------------------------


def test_a_micro_batch_that_waits_for_its_loss_is_not_saved(tmp_path: Path) -> None:
    job = Job(strategy={"name": "der"})
    job.train(0, 3)
    job.rehearsal.augment(new_batch(0, 3, SIZE))
    with pytest.raises(BatchError, match="'der'"):
        job.rehearsal.save(tmp_path)
    job.rehearsal.drop()
    job.rehearsal.save(tmp_path)


def test_nothing_is_saved_or_loaded_after_the_end(tmp_path: Path) -> None:
    job = Job()
    job.train(0, 3)
    job.rehearsal.save(tmp_path)
    job.rehearsal.close()
    for call in (job.rehearsal.save, job.rehearsal.load):
        with pytest.raises(ClosedError):
            call(tmp_path)


# --- files -----------------------------------------------------------------------------------------------------------


def saved(folder: Path, steps: int = 5, **keys: Any) -> Path:
    """A job's checkpoint; the path of its only file."""
    job = Job(**keys)
    job.train(0, steps)
    job.rehearsal.save(folder)
    job.rehearsal.close()
    (path,) = folder.glob("*of-1.safetensors")
    return path


def load(folder: Path, **keys: Any) -> Job:
    """A job that goes on from a checkpoint."""
    job = Job(**keys)
    try:
        job.rehearsal.load(folder)
    except RehearsalError:
        job.rehearsal.close()
        raise
    return job


def test_only_its_owner_reads_a_file_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        path = saved(folder, checkpoint={"asynchronous": asynchronous})
        assert path.stat().st_mode & 0o777 == 0o600
        assert list(folder.iterdir()) == [path]


def test_a_file_is_private_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def watched(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        modes.append(path.parent.stat().st_mode & 0o777)
        save_file(tensors, path, metadata)
        modes.append(path.parent.stat().st_mode & 0o777)

    monkeypatch.setattr(files, "save_file", watched)
    saved(tmp_path)
    assert modes == [0o700, 0o700]


def test_the_last_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not ours")
    job = Job()
    for step in range(5):
        job.train(step, step + 1)
        job.rehearsal.save(tmp_path)
    assert [place.step for place in files.list_files(tmp_path)] == [1, 2, 3, 4, 5][-saver.KEPT :]
    assert (tmp_path / "notes.txt").read_text() == "not ours"


def test_old_files_of_ranks_that_are_no_more_go_too(tmp_path: Path) -> None:
    for step in range(4):
        files.write_file(tmp_path, RankFile(step, 2, 1), Content({}, {}))
    job = Job()
    job.train(0, 4)
    job.rehearsal.save(tmp_path)
    assert [place.step for place in files.list_files(tmp_path) if place.rank == 1] == [0, 1, 2, 3][1 - saver.KEPT :]


def test_what_was_just_saved_stays_whatever_else_is_in_the_folder(tmp_path: Path) -> None:
    job = Job()
    job.train(0, 3)
    job.rehearsal.save(tmp_path / "early")
    for step in range(3, 8):
        job.train(step, step + 1)
        job.rehearsal.save(tmp_path / "late")
    back = job.resumed(tmp_path / "early")
    back.rehearsal.save(tmp_path / "late")
    assert [place.step for place in files.list_files(tmp_path / "late")] == [3, *[4, 5, 6, 7, 8][1 - saver.KEPT :]]


def fails_halfway(number: int) -> Any:
    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(number, "No space left on device")

    return half


@pytest.mark.fault
@pytest.mark.parametrize("same_step", [True, False])
def test_a_full_disk_leaves_what_was_there_and_says_so(
    same_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job()
    job.train(0, 5)
    job.rehearsal.save(tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    if not same_step:
        job.train(5, 6)
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", fails_halfway(errno.ENOSPC))
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            job.rehearsal.save(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    assert load(tmp_path).rehearsal.steps == 5
    job.train(6, 7)
    job.rehearsal.save(tmp_path)
    assert len(files.list_files(tmp_path)) == 2, "a failed save is not the end"


@pytest.mark.fault
def test_a_folder_that_is_removed_while_a_file_is_written_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    removals = [1]

    def removed_first(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if removals:
            removals.pop()
            shutil.rmtree(folder)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", removed_first)
    path = saved(folder)
    assert not removals
    assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    folder = blocked(tmp_path)
    job = Job()
    job.train(0, 3)
    for bad in (folder, folder.parent, tmp_path / ("long" * 100)):
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            job.rehearsal.save(bad)
        assert str(bad) in str(caught.value)
    job.train(3, 4)


@pytest.mark.fault
@pytest.mark.parametrize("rest", ["file", "folder"])
def test_what_a_job_that_died_left_half_written_is_removed(rest: str, tmp_path: Path) -> None:
    partial = tmp_path / RankFile(5, 1, 0).partial
    if rest == "folder":
        partial.mkdir()
        partial = partial / ".tmpXYZ"
    partial.write_bytes(b"rest")
    path = saved(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def refusal(folder: Path, path: Path) -> str:
    """What a load says; it must name the file."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.fault
def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in {*range(12), *range(12, len(whole), 331), header - 1, header, header + 1, len(whole) - 1}:
        path.write_bytes(whole[:length])
        refusal(tmp_path, path)
    path.write_bytes(whole + b"\0")
    refusal(tmp_path, path)
    path.write_bytes(whole)
    assert load(tmp_path).rehearsal.steps == 5


@pytest.mark.fault
@pytest.mark.parametrize("version", [None, 0, 2, "1", [1]])
def test_another_version_of_the_format_is_named(version: Any, tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = files.read_file(tmp_path, RankFile(5, 1, 0))
    text = files.write_file(tmp_path, RankFile(5, 1, 0), Content({**found.meta, "version": version}, found.tensors))
    assert text == path
    assert f"version {version!r}" in refusal(tmp_path, path)


@pytest.mark.fault
def test_other_files_by_that_name_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    save_file({"weight": torch.zeros(3)}, path)
    assert "no rehearsal checkpoint" in refusal(tmp_path, path)
    save_file({"weight": torch.zeros(3)}, path, {"rehearsal": "{}"})
    assert "checksum" in refusal(tmp_path, path)
    for other in (b"", b"a text file\n" * 100, b"\x80\x04K\x01.", bytes(1000)):
        path.write_bytes(other)
        refusal(tmp_path, path)
    path.unlink()
    path.mkdir()
    refusal(tmp_path, path)


HUGE = """
import resource, sys
from pathlib import Path
from rehearsal_plugin import Rehearsal
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.distributed.transport import LocalTransport
path = Path(sys.argv[1])
rehearsal = Rehearsal({}, LocalTransport())
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
for length in (1 << 24, (1 << 24) + 1, 1 << 32, 1 << 47, (1 << 63) - 1, (1 << 64) - 1):
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 1000)
    try:
        rehearsal.load(path.parent)
    except CheckpointError as error:
        print(length, error)
"""


@pytest.mark.fault
def test_a_header_that_claims_to_be_huge_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / RankFile(5, 1, 0).name
    done = subprocess.run(
        [sys.executable, "-c", HUGE, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6


# --- which one is loaded ---------------------------------------------------------------------------------------------


def touch(folder: Path, *named: tuple[int, int, int]) -> None:
    for step, size, rank in named:
        (folder / RankFile(step, size, rank).name).touch()


def test_the_newest_complete_one_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, (5, 2, 0), (5, 2, 1), (12, 1, 0), (9, 2, 0), (9, 2, 1), (30, 2, 1))
    assert find_newest(tmp_path) == [RankFile(12, 1, 0)]
    touch(tmp_path, (30, 2, 0), (40, 3, 0), (40, 3, 2))
    assert find_newest(tmp_path) == [RankFile(30, 2, 0), RankFile(30, 2, 1)]


def test_steps_are_numbers_not_text(tmp_path: Path) -> None:
    touch(tmp_path, (9, 1, 0), (10, 1, 0), *((100, 11, rank) for rank in range(11)))
    assert find_newest(tmp_path) == [RankFile(100, 11, rank) for rank in range(11)]


@pytest.mark.fault
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    touch(tmp_path, (5, 2, 1), (9, 3, 0), (9, 3, 2))
    with pytest.raises(CheckpointError, match=r"rehearsal-step9-rank1-of-3\.safetensors is missing"):
        find_newest(tmp_path)
    with pytest.raises(CheckpointError, match="2 of 3 files"):
        load(tmp_path)


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert find_newest(tmp_path) is None
    assert find_newest(tmp_path / "missing") is None
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no rehearsal checkpoint"):
            load(folder)


STRANGERS = [
    "rehearsal-step5-rank0-of-1.safetensors.partial",
    "rehearsal-step5-rank0-of-1.safetensors.bak",
    "rehearsal-step5-rank0-of-1.pt",
    "a-rehearsal-step5-rank0-of-1.safetensors",
    "rehearsal-step-5-rank0-of-1.safetensors",
    "rehearsal-step5-rank0-of-1Xsafetensors",
    "rehearsal-step5-rank0-of-1.safetensors\n",
    "rehearsal-step..-rank0-of-1.safetensors",
    "rehearsal-step05-rank0-of-1.safetensors",
    "rehearsal-step\u0665-rank0-of-1.safetensors",
    "rehearsal-step5-rank0-of-0.safetensors",
    "rehearsal-step5-rank2-of-2.safetensors",
    f"rehearsal-step{10**30}-rank0-of-1.safetensors",
    "model.safetensors",
]


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    for name in STRANGERS:
        (tmp_path / name).touch()
    assert find_newest(tmp_path) is None
    touch(tmp_path, (4, 1, 0))
    assert find_newest(tmp_path) == [RankFile(4, 1, 0)]


def test_a_folder_that_cannot_be_looked_into_is_a_checkpoint_error(tmp_path: Path) -> None:
    for folder in (blocked(tmp_path), tmp_path / ("long" * 100), tmp_path / "\0"):
        with pytest.raises(CheckpointError):
            load(folder)
