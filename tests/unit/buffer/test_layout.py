"""Batches as packed byte rows, and back."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import RecycledMemory
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.core.tree import flatten, map_leaves
from rehearsal_plugin.errors import BatchError

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
NAMES = """bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128
float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"""
DTYPES = [getattr(torch, name) for name in NAMES.split() if hasattr(torch, name)]


class Sample(NamedTuple):
    first: Any
    second: Any


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bit pattern that the dtype has, NaNs with payloads among them."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, nbytes, dtype=np.uint8)
    return torch.empty(nbytes, dtype=torch.uint8).copy_(torch.from_numpy(raw)).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All that there is to compare; two NaNs are equal only with equal payloads."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def flat(tree: Any) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    map_leaves(tree, lambda name, leaf: leaves.update({name: bits(leaf) if isinstance(leaf, Tensor) else leaf}))
    return leaves


def packed(layout: RowLayout, batch: Any, index: Tensor | None = None) -> Tensor:
    columns = layout.columns(batch)
    size = len(columns[0]) if index is None else len(index)
    rows = torch.full((size, layout.row_bytes), 0xA5, dtype=torch.uint8)
    layout.pack(columns, rows, index)
    return rows


def extended(layout: RowLayout, batch: Any, rows: Tensor, displaced: int = 0) -> Any:
    return layout.join(flatten(batch), layout.views(rows), RecycledMemory(), displaced).rebuild()


def round_trip(batch: Any) -> Any:
    layout = RowLayout.infer(batch)
    return layout.unpack(packed(layout, batch))


def sequence(start: int, stop: int) -> dict[str, Tensor]:
    ids = torch.arange(start, stop)
    return {"x": ids[:, None] * torch.ones(3), "y": ids}


def containers(tree: Any) -> Any:
    """The nesting alone: types and keys."""
    if isinstance(tree, (dict, UserDict)):
        return type(tree), {key: containers(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree), [containers(value) for value in tree]
    return "leaf"


@st.composite
def leaves(draw: st.DrawFn, size: int) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    return random_tensor(draw(st.sampled_from(DTYPES)), (size, *shape), draw(st.integers(0, 2**32)))


@st.composite
def batches(draw: st.DrawFn) -> Any:
    size = draw(st.integers(0, 4))

    def nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        mapping = st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
        several = st.lists(inner, max_size=3)
        return st.one_of(
            mapping, mapping.map(UserDict), mapping.map(OrderedDict), several, several.map(tuple),
            st.builds(Sample, inner, inner),
        )  # fmt: skip

    return {"field": draw(leaves(size)), "more": draw(st.recursive(leaves(size), nest, max_leaves=8))}


# Round trip


@PROPERTY
@given(batches())
def test_any_nesting_of_any_dtypes_comes_back_bit_for_bit(batch: Any) -> None:
    assert flat(round_trip(batch)) == flat(batch)


@PROPERTY
@given(batches())
def test_any_nesting_keeps_its_containers(batch: Any) -> None:
    assert containers(round_trip(batch)) == containers(batch)


@PROPERTY
@given(batches(), st.data())
def test_chosen_samples_are_packed_in_the_order_of_the_index(batch: Any, data: st.DataObject) -> None:
    layout = RowLayout.infer(batch)
    size = layout.size(batch)
    index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), max_size=6)) if size else [], dtype=torch.int64)
    expected = map_leaves(batch, lambda _, leaf: leaf[index])
    assert flat(layout.unpack(packed(layout, batch, index))) == flat(expected)


@PROPERTY
@given(batches())
def test_extending_puts_the_rows_behind_the_batch(batch: Any) -> None:
    layout = RowLayout.infer(batch)
    expected = map_leaves(batch, lambda _, leaf: torch.cat((leaf, leaf)))
    assert flat(extended(layout, batch, packed(layout, batch))) == flat(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    batch = {"x": random_tensor(dtype, (5, 7)), "scalar": random_tensor(dtype, (5,), seed=1)}
    assert flat(round_trip(batch)) == flat(batch)


def test_a_tensor_alone_is_a_batch() -> None:
    batch = torch.arange(12).view(4, 3)
    assert bits(round_trip(batch)) == bits(batch)


def test_one_number_a_sample_comes_back_as_one_number() -> None:
    assert round_trip({"label": torch.tensor([3, 1, 2])})["label"].tolist() == [3, 1, 2]


def test_fields_without_a_single_element_come_back() -> None:
    assert round_trip({"none": torch.empty(4, 0, 3), "y": torch.arange(4)})["none"].shape == (4, 0, 3)


def test_a_batch_of_nothing_but_empty_samples_comes_back() -> None:
    assert round_trip([torch.empty(4, 0)])[0].shape == (4, 0)


def test_a_batch_of_no_samples_comes_back() -> None:
    assert round_trip({"x": torch.empty(0, 3, dtype=torch.bfloat16)})["x"].shape == (0, 3)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(1, 2),
    "every other sample": lambda x: x[::2],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "flipped": lambda x: x.flip(0),
    "a column": lambda x: x[:, :, 1],
    "conjugate": lambda x: torch.complex(x, x).conj(),
}


@pytest.mark.parametrize("stride", STRIDED.values(), ids=list(STRIDED))
def test_tensors_of_any_strides_are_packed(stride: Callable[[Tensor], Tensor]) -> None:
    batch = [stride(torch.arange(24.0).view(4, 3, 2))]
    assert torch.equal(round_trip(batch)[0], batch[0])


def test_tensors_that_need_gradients_are_packed_by_value() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert round_trip([x])[0].requires_grad is False


def test_a_default_dictionary_is_rebuilt() -> None:
    batch = defaultdict[str, Any](list, {"x": torch.arange(3)})
    assert containers(round_trip(batch)) == containers(batch)


# Rows


def test_every_field_starts_at_a_multiple_of_16_bytes() -> None:
    layout = RowLayout.infer([torch.zeros(2, 5, dtype=torch.uint8), torch.zeros(2, 3), torch.zeros(2)])
    assert [(field.offset, field.nbytes) for field in layout.fields] == [(0, 5), (16, 12), (32, 4)]
    assert layout.row_bytes == 48


def test_unpacked_tensors_share_memory_with_the_rows() -> None:
    batch = {"x": torch.zeros(4, 3), "y": [torch.arange(4)]}
    layout = RowLayout.infer(batch)
    rows = packed(layout, batch)
    views = layout.unpack(rows)
    assert views["x"].untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    rows.zero_()
    assert views["y"][0].tolist() == [0, 0, 0, 0]


def test_packing_writes_nothing_between_the_fields() -> None:
    batch = [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)]
    rows = packed(RowLayout.infer(batch), batch)
    assert (rows[:, 3:16] == 0xA5).all()
    assert (rows[:, 24:] == 0xA5).all()


def test_all_fields_of_a_sample_are_in_one_row() -> None:
    layout = RowLayout.infer(sequence(0, 8))
    shuffled = layout.unpack(packed(layout, sequence(0, 8))[torch.randperm(8)])
    assert (shuffled["x"] == shuffled["y"][:, None]).all()


# What passes through


def test_what_is_no_tensor_of_the_batch_is_no_field() -> None:
    batch = {**sequence(0, 4), "scale": torch.tensor(2.0), "table": torch.zeros(9, 2), "name": "a", "none": None}
    assert [field.name for field in RowLayout.infer(batch).fields] == ["x", "y"]


def test_what_is_no_field_passes_through_untouched() -> None:
    batch = {**sequence(0, 4), "scale": torch.tensor(2.0), "table": torch.zeros(9, 2), "name": object()}
    layout = RowLayout.infer(batch)
    longer = extended(layout, batch, packed(layout, batch))
    assert all(longer[name] is batch[name] for name in ("scale", "table", "name"))


def test_a_table_that_once_has_as_many_rows_as_the_batch_is_still_no_field() -> None:
    layout = RowLayout.infer({**sequence(0, 4), "table": torch.zeros(9)})
    assert [len(column) for column in layout.columns({**sequence(0, 9), "table": torch.zeros(9)})] == [9, 9]


def test_named_fields_alone_make_up_a_row() -> None:
    batch = {"x": torch.zeros(4, 2), "y": [torch.zeros(4), torch.ones(4)]}
    assert [field.name for field in RowLayout.infer(batch, ["y.1"]).fields] == ["y.1"]


def test_with_named_fields_others_may_come_and_go() -> None:
    layout = RowLayout.infer({"x": torch.zeros(4), "idle": torch.zeros(4)}, ["x"])
    assert layout.size({"x": torch.zeros(3), "other": torch.zeros(3)}) == 3


def test_without_the_batch_dimension_a_leaf_may_be_new() -> None:
    layout = RowLayout.infer({"x": torch.zeros(4)})
    assert layout.size({"x": torch.zeros(4), "step": torch.tensor(3), "epoch": 1}) == 4


# What is refused


def refused(batch: Any, first: Any = None) -> str:
    layout = RowLayout.infer({"x": torch.zeros(4, 3), "y": torch.zeros(4)} if first is None else first)
    with pytest.raises(BatchError) as caught:
        layout.columns(batch)
    return str(caught.value)


REFUSED = {
    "another dtype": ({"x": torch.zeros(4, 3), "y": torch.zeros(4).half()}, "torch.float16"),
    "another shape": ({"x": torch.zeros(4, 3), "y": torch.zeros(4, 1)}, r"(4, 1)"),
    "another length": ({"x": torch.zeros(4, 3), "y": torch.zeros(5)}, "has 5 rows, and the fields before it have 4"),
    "no dimension": ({"x": torch.zeros(4, 3), "y": torch.tensor(1.0)}, r"()"),
    "missing": ({"x": torch.zeros(4, 3)}, "missing"),
    "no tensor": ({"x": torch.zeros(4, 3), "y": ["a"] * 4}, "list"),
    "numbers of another dtype": ({"x": torch.zeros(4, 3), "y": [1.0] * 4}, "torch.float64"),
    "sparse": ({"x": torch.zeros(4, 3), "y": torch.zeros(4).to_sparse()}, "to_dense()"),
    "a number": ({"x": torch.zeros(4, 3), "y": 1.0}, "float"),
}


@pytest.mark.parametrize(("batch", "what"), REFUSED.values(), ids=list(REFUSED))
def test_a_field_that_changed_is_named(batch: Any, what: str) -> None:
    message = refused(batch)
    assert "'y'" in message
    assert what in message


def test_a_first_field_that_is_missing_is_named() -> None:
    assert "'x'" in refused({"y": torch.zeros(4)})


def test_a_new_field_is_named() -> None:
    assert "'z'" in refused({"x": torch.zeros(4, 3), "y": torch.zeros(4), "z": torch.zeros(4, 2)})


def test_a_nested_field_is_named_by_its_dotted_path() -> None:
    first = {"inputs": [torch.zeros(3), {"mask": torch.zeros(3)}]}
    assert "'inputs.1.mask'" in refused({"inputs": [torch.zeros(3), {"mask": torch.ones(3).bool()}]}, first)


@pytest.mark.parametrize("batch", [{}, [], {"a": torch.tensor(1.0)}, {"a": "text"}, None], ids=repr)
def test_a_batch_without_tensors_is_refused(batch: Any) -> None:
    with pytest.raises(BatchError, match="no tensor with a batch dimension"):
        RowLayout.infer(batch)


def test_named_fields_that_are_not_there_are_listed() -> None:
    with pytest.raises(BatchError, match=r"rehearsal\.fields names \['b', 'c'\]"):
        RowLayout.infer({"a": torch.zeros(2), "b": "text"}, ["a", "c", "b"])


def test_named_fields_of_unequal_length_are_refused() -> None:
    with pytest.raises(BatchError, match="'b' has 3 samples and 'a' has 2"):
        RowLayout.infer({"a": torch.zeros(2), "b": torch.zeros(3)}, ["a", "b"])


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(BatchError, match="'a' is sparse"):
        RowLayout.infer({"a": torch.eye(3).to_sparse()})


@pytest.mark.parametrize(
    "batch",
    [{"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}}, {1: torch.zeros(2), "1": torch.ones(2)}],
    ids=["dot in a key", "number and text"],
)
def test_two_fields_of_one_name_are_refused(batch: Any) -> None:
    with pytest.raises(BatchError, match="two leaves"):
        RowLayout.infer(batch)


def test_an_unknown_field_is_answered_with_the_known_ones() -> None:
    with pytest.raises(BatchError, match=r"no field 'z'; it has \['x', 'y'\]"):
        RowLayout.infer(sequence(0, 2)).field("z")


# Extending


def test_the_batchs_own_samples_stay_first() -> None:
    layout = RowLayout.infer(sequence(0, 4))
    assert extended(layout, sequence(0, 4), packed(layout, sequence(10, 13)))["y"].tolist() == [0, 1, 2, 3, 10, 11, 12]


def test_nan_payloads_and_negative_zeros_of_the_batch_stay_as_they_are() -> None:
    raw = torch.tensor([0x7FC12345, -0x80000000, 0x7F800001, -0x1], dtype=torch.int64).to(torch.int32)
    batch = [raw.view(torch.float32)]
    layout = RowLayout.infer(batch)
    assert bits(extended(layout, batch, packed(layout, batch))[0][:4]) == bits(batch[0])


def test_displaced_samples_are_the_last_ones() -> None:
    layout = RowLayout.infer(sequence(0, 4))
    longer = extended(layout, sequence(0, 4), packed(layout, sequence(10, 13)), displaced=3)
    assert longer["y"].tolist() == [0, 10, 11, 12]


def test_a_whole_batch_may_be_displaced() -> None:
    layout = RowLayout.infer(sequence(0, 2))
    assert extended(layout, sequence(0, 2), packed(layout, sequence(10, 12)), displaced=2)["y"].tolist() == [10, 11]


def test_no_rows_leave_the_samples_alone() -> None:
    layout = RowLayout.infer(sequence(0, 3))
    assert flat(extended(layout, sequence(0, 3), packed(layout, sequence(0, 0)))) == flat(sequence(0, 3))


def test_gradients_flow_through_the_batchs_own_samples() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    layout = RowLayout.infer([x])
    extended(layout, [x], packed(layout, [x]))[0].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_a_cut_is_a_view_of_the_samples_between() -> None:
    batch: dict[str, Any] = {**sequence(0, 6), "name": "a"}
    part = RowLayout.infer(batch).cut(flatten(batch), 2, 5)
    assert (part["y"].tolist(), part["name"]) == ([2, 3, 4], "a")
    assert part["y"].untyped_storage().data_ptr() == batch["y"].untyped_storage().data_ptr()


def test_concatenating_puts_the_second_behind_the_first() -> None:
    layout = RowLayout.infer(sequence(0, 3))
    joined = layout.concatenate(flatten(sequence(0, 3)), flatten({**sequence(3, 5), "name": "b"}))
    assert (joined["y"].tolist(), joined["name"]) == ([0, 1, 2, 3, 4], "b")


# Fingerprint


def variants() -> Iterator[Any]:
    x = torch.zeros(2, 3)
    yield from ([x], {"a": x}, [x, x], [x.int()], [torch.zeros(2, 4)], [torch.zeros(2, 3, 1)], [torch.zeros(2)])


def test_fields_dtypes_and_shapes_tell_layouts_apart() -> None:
    assert len({RowLayout.infer(batch).fingerprint for batch in variants()}) == len(list(variants()))


def test_batches_of_one_form_have_one_fingerprint_whatever_their_size() -> None:
    assert len({RowLayout.infer(sequence(0, size)).fingerprint for size in (1, 2, 9)}) == 1


def test_a_fingerprint_fits_into_a_header() -> None:
    assert all(0 <= RowLayout.infer(batch).fingerprint < 2**63 for batch in variants())
