"""Whatever a file holds: a job goes on, or says what is wrong with it."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from rehearsal_plugin.checkpoint import format as files
from rehearsal_plugin.checkpoint import record as content
from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.checkpoint.format import NAME, Content, RankFile
from rehearsal_plugin.checkpoint.state_tree import flatten_state, unflatten_state
from rehearsal_plugin.checkpoint.timeline import find_newest
from rehearsal_plugin.errors import CheckpointError, RehearsalError
from tests.checkpoint.test_checkpoint import Job
from tests.helpers.fuzzing import FEW, PROPERTY

pytestmark = pytest.mark.fuzz

STOP, AFTER = 8, 3
EXCHANGE = {"timeout_s": 3}
CLASSES = {"capacity": 30, "partition_by": "label"}
VARIANTS: dict[str, dict[str, Any]] = {
    "x-der": {"strategy": {"name": "x-der"}, "micro": 2, "candidates": 5},
    "balanced": {"buffer": {**CLASSES, "policy": "balanced"}, "sampling": {"weights": "balanced"}, "ratio": 0.3},
    "loss": {
        "buffer": {"capacity": 30, "policy": "score", "score_by": "loss"},
        "sampling": {"weights": "score"},
        "exchange": {"launch": "inline", **EXCHANGE},
    },
    "herding": {"buffer": {**CLASSES, "policy": "herding", "score_by": "x"}, "mode": "replace"},
    "rows only": {"buffer": CLASSES},
}
PLACE = RankFile(STOP, 1, 0)

variants = pytest.mark.parametrize("variant", VARIANTS)


def keys_of(variant: str) -> dict[str, Any]:
    return {"exchange": EXCHANGE, **VARIANTS[variant]}


@functools.cache
def right(variant: str) -> tuple[Content, bytes]:
    """A checkpoint, and its file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = Job(**keys_of(variant))
        job.train(0, STOP)
        job.rehearsal.save(folder)
        job.rehearsal.close()
        if variant == "rows only":
            tools.reshard([folder], folder / "new", 1)
            folder /= "new"
        return files.read_file(folder, PLACE), (folder / PLACE.name).read_bytes()


@contextmanager
def folder_with(variant: str, data: bytes | Content) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(data, bytes):
            (folder / PLACE.name).write_bytes(data)
        else:
            files.write_file(folder, PLACE, data)
        yield folder


def go_on(variant: str, data: bytes | Content, **keys: Any) -> RehearsalError | None:
    """Load and train; anything but a RehearsalError comes out."""
    job = Job(**{**keys_of(variant), **keys})
    with folder_with(variant, data) as folder:
        try:
            job.rehearsal.load(folder)
            job.train(STOP, STOP + AFTER)
        except RehearsalError as error:
            return error
        finally:
            job.rehearsal.close(drain_s=0.0)
    return None


@variants
def test_the_right_file_goes_on(variant: str) -> None:
    whole, data = right(variant)
    assert go_on(variant, data) is None
    assert go_on(variant, whole) is None
    assert go_on(variant, whole, buffer={**keys_of(variant).get("buffer", {}), "capacity": 20}) is None


# --- accidents -------------------------------------------------------------------------------------------------------


def refused(variant: str, data: bytes) -> None:
    with folder_with(variant, data) as folder, pytest.raises(CheckpointError) as caught:
        files.read_file(folder, PLACE)
    assert PLACE.name in str(caught.value)


@given(st.data())
@FEW
@variants
def test_a_flipped_bit_anywhere_is_noticed(variant: str, data: st.DataObject) -> None:
    _, whole = right(variant)
    header = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(whole) - 1)))
    changed = bytearray(whole)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    refused(variant, bytes(changed))


def test_every_bit_of_a_small_header_counts() -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = files.write_file(Path(name), PLACE, Content({"version": 1}, {"a": torch.zeros(2)})).read_bytes()
    for place in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        refused("x-der", bytes(changed))


@given(st.data())
@FEW
@variants
def test_a_file_that_was_cut_off_is_noticed(variant: str, data: st.DataObject) -> None:
    _, whole = right(variant)
    refused(variant, whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
@example(b"{}", 2)
@example(b'{"__metadata__":{"rehearsal":"[]"}}', 35)
@PROPERTY
def test_any_other_file_is_refused(noise: bytes, length: int) -> None:
    refused("x-der", noise)
    refused("x-der", length.to_bytes(8, "little") + noise)
    refused("x-der", len(noise).to_bytes(8, "little") + noise)


# --- forgeries with right checksums ----------------------------------------------------------------------------------

Path_ = tuple[Any, ...]

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -(2**70), 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "torch.int64", "0", [], [0], [-1], [1, 2, 3], [[1]], [[]], ["x"], [2**80], {}, {"0": 1},
    {"$tensor": "buffer.rows"}, {"$array": "buffer.written"}, {"$array": "buffer.rows"}, {"$tensor": "nope"},
    {"$tensor": []}, {"$array": None}, [["x", "torch.int64", [2**62]]], [["id", "torch.int64", []]],
]  # fmt: skip


def paths(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every place in JSON below the top."""
    items: Sequence[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        yield (*at, key)
        yield from paths(item, (*at, key))


def put(meta: Any, at: Path_, value: Any) -> None:
    *way, last = at
    for key in way:
        meta = meta[key]
    if value is DROP:
        del meta[last]
    else:
        meta[last] = value


DROP = object()


def places_of(whole: Content) -> list[Path_]:
    """Of the JSON; what strategies remember and record is theirs to check."""
    theirs = (("state", "progress", "strategy"), ("layout", "state"))
    return [at for at in paths(whole.meta) if not any(at[: len(way)] == way for way in theirs)]


def bent(tensor: Tensor, how: int) -> Tensor | None:
    """Another tensor instead of one; None for none at all."""
    flat = tensor.reshape(-1)
    ways = [
        lambda: None,
        lambda: tensor[:-1],
        lambda: torch.cat((tensor, tensor)),
        lambda: tensor[:0],
        lambda: flat,
        lambda: tensor[None],
        lambda: tensor.to(torch.float64),
        lambda: tensor.to(torch.int32) if tensor.dtype != torch.int32 else tensor.to(torch.int64),
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.bool),
        lambda: tensor.to(torch.bfloat16),
        lambda: torch.full_like(tensor, _extreme(tensor, largest=True)),
        lambda: torch.full_like(tensor, _extreme(tensor, largest=False)),
        lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor + 1,
        lambda: torch.full_like(tensor, 3) if tensor.dtype != torch.bool else ~tensor,
        lambda: -tensor if tensor.dtype != torch.bool else tensor,
        lambda: tensor.flip(0),
        lambda: torch.zeros_like(tensor),
        lambda: torch.zeros((0, 2**40), dtype=tensor.dtype),
        lambda: torch.full_like(tensor, 2**33) if tensor.dtype == torch.int64 else tensor,
    ]
    return None if how == 0 else ways[how]().contiguous()  # type: ignore[no-untyped-call, union-attr]


BENDS = 20


def _extreme(tensor: Tensor, *, largest: bool) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return largest
    info = torch.finfo(tensor.dtype) if tensor.is_floating_point() else torch.iinfo(tensor.dtype)
    return info.max if largest else info.min


def with_tensor(whole: Content, name: str, how: int) -> Content:
    changed = bent(whole.tensors[name], how)
    rest = {other: value for other, value in whole.tensors.items() if other != name}
    return Content(whole.meta, rest if changed is None else {**rest, name: changed})


def tensors_of(whole: Content) -> list[str]:
    return sorted(name for name in whole.tensors if not name.startswith("progress.strategy"))


def forged(whole: Content, data: st.DataObject) -> Content:
    """The checkpoint with one thing changed, in the JSON or in a tensor."""
    if data.draw(st.booleans()):
        return with_tensor(whole, data.draw(st.sampled_from(tensors_of(whole))), data.draw(st.integers(0, BENDS - 1)))
    meta = copy.deepcopy(whole.meta)
    put(meta, data.draw(st.sampled_from(places_of(whole))), data.draw(st.sampled_from([DROP, *JUNK])))
    return Content(meta, whole.tensors)


@given(st.data())
@FEW
@variants
def test_forged_contents_lead_to_nothing_but_errors_of_this_package(variant: str, data: st.DataObject) -> None:
    go_on(variant, forged(right(variant)[0], data))


@given(st.data())
@FEW
@variants
def test_nor_do_they_where_the_rows_are_taken_over(variant: str, data: st.DataObject) -> None:
    buffer = {**keys_of(variant).get("buffer", {}), "capacity": 12}
    go_on(variant, forged(right(variant)[0], data), buffer=buffer)


@given(st.data())
@FEW
@variants
def test_nor_for_the_tools(variant: str, data: st.DataObject) -> None:
    whole = forged(right(variant)[0], data)
    with folder_with(variant, whole) as folder:
        for call in (
            lambda: tools.inspect(folder),
            lambda: tools.reshard([folder], folder / "out", 2, 5),
            lambda: tools.export(folder, folder / "rows.safetensors"),
            lambda: tools.export(folder, folder / "rows.arrow"),
        ):
            try:
                call()
            except RehearsalError:
                continue


NUMBERS = st.integers(-3, 40) | st.integers(-(2**63), 2**63 - 1)


@given(st.data())
@FEW
@variants
def test_numbers_within_tensors_may_be_anything(variant: str, data: st.DataObject) -> None:
    whole = right(variant)[0]
    names = [name for name in tensors_of(whole) if whole.tensors[name].dtype == torch.int64]
    name = data.draw(st.sampled_from(names))
    changed = whole.tensors[name].clone()
    if changed.numel():
        place = data.draw(st.integers(0, changed.numel() - 1))
        changed.view(-1)[place] = data.draw(NUMBERS)
    go_on(variant, Content(whole.meta, {**whole.tensors, name: changed}))


def test_a_forgery_is_refused_before_a_job_believes_it() -> None:
    whole, _ = right("x-der")
    index = ("state", "buffer", "index")
    coordinator = ("state", "progress", "supply")
    for at, value in {
        (*index, "count"): 5,
        (*index, "seen"): 3,
        (*coordinator, "pipeline", "step"): 2**41,
        (*coordinator, "pipeline", "census", "pairs"): 2**40,
        (*coordinator, "asked"): [],
        (*coordinator, "ready", "shares"): [-1],
        (*coordinator, "account", "owed"): [1, 0],
        (*coordinator, "account", "sizes"): [[8, 1, 0, 0]],
        (*coordinator, "account", "steps"): [1, 2, 3],
        (*coordinator, "account", "requested"): [],
        (*coordinator, "account", "ready", "shares"): [[8, -1]],
        ("count",): 3,
        ("digest",): 2**70,
        ("job",): [],
        ("layout", "fields"): [],
    }.items():
        meta = copy.deepcopy(whole.meta)
        put(meta, at, value)
        assert isinstance(go_on("x-der", Content(meta, whole.tensors)), CheckpointError), at


def test_a_file_by_the_name_of_another_step_is_refused() -> None:
    whole, _ = right("x-der")
    with tempfile.TemporaryDirectory() as name:
        for step in (0, STOP + 1, 10**18 - 1):
            place = RankFile(step, 1, 0)
            files.write_file(Path(name), place, whole)
            with pytest.raises(CheckpointError):
                content.unpack_record(Path(name), place)


def test_deep_json_is_refused() -> None:
    whole, _ = right("x-der")
    deep: Any = 0
    for _ in range(600):
        deep = {"a": deep}
    assert isinstance(go_on("x-der", Content({**whole.meta, "state": deep}, whole.tensors)), CheckpointError)
    text = '{"version": 1, "state": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / PLACE.name
        save_file({}, path, {"rehearsal": text, "header": files.checksum(text, {})})
        with pytest.raises(CheckpointError):
            content.unpack_record(Path(name), PLACE)


# --- names and trees -------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**18 - 1), st.integers(1, 10**9 - 1), st.data())
@PROPERTY
def test_every_place_has_a_name_of_its_own(step: int, size: int, data: st.DataObject) -> None:
    place = RankFile(step, size, data.draw(st.integers(0, size - 1)))
    found = NAME.fullmatch(place.name)
    assert found is not None
    assert (int(found[1]), int(found[3]), int(found[2])) == (place.step, place.size, place.rank)
    assert "/" not in place.name
    assert ".." not in place.name


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 2)), max_size=12))
@PROPERTY
def test_the_newest_complete_set_is_found(named: set[tuple[int, int, int]]) -> None:
    there = {RankFile(*one) for one in named if one[2] < one[1]}
    complete = [
        (step, size)
        for step in range(4)
        for size in range(1, 4)
        if all(RankFile(step, size, rank) in there for rank in range(size))
    ]
    with tempfile.TemporaryDirectory() as name:
        for place in there:
            (Path(name) / place.name).touch()
        if there and not complete:
            with pytest.raises(CheckpointError, match="is missing"):
                find_newest(Path(name))
        else:
            found = find_newest(Path(name))
            assert found == ([RankFile(*max(complete), rank) for rank in range(max(complete)[1])] if complete else None)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=3)
    | st.builds(torch.arange, st.integers(0, 5))
    | st.builds(np.arange, st.integers(0, 5))
)
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3))


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), TREES, max_size=4))
@PROPERTY
def test_a_tree_comes_back_as_it_was(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        plain, tensors = flatten_state(tree)
        files.write_file(Path(name), PLACE, Content({"version": 1, "tree": plain}, tensors))
        read = files.read_file(Path(name), PLACE)
    assert equal(unflatten_state(read.meta["tree"], read.tensors), tree)


def equal(first: Any, second: Any) -> bool:
    if isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in second)
    if isinstance(second, Tensor):
        return isinstance(first, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(second, np.ndarray):
        return isinstance(first, np.ndarray) and first.dtype == second.dtype and np.array_equal(first, second)
    return type(first) is type(second) and bool(first == second)


def test_memory_that_is_shared_is_written_as_often_as_it_is_named(tmp_path: Path) -> None:
    rows = torch.arange(12)
    plain, tensors = flatten_state({"all": rows, "some": rows[3:6], "again": rows.numpy()[1:], "none": rows[:0]})
    files.write_file(tmp_path, PLACE, Content({"version": 1, "tree": plain}, tensors))
    read = files.read_file(tmp_path, PLACE)
    found = unflatten_state(read.meta["tree"], read.tensors)
    assert {name: part.tolist() for name, part in found.items()} == {
        "all": list(range(12)),
        "some": [3, 4, 5],
        "again": list(range(1, 12)),
        "none": [],
    }
