"""The fields of a row: where each lies, and copies of samples to and from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rehearsal_plugin.buffer.rows.copies import scatter
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import BatchError

__all__ = [
    "ALIGNMENT",
    "Field",
    "as_array",
    "bytes_of",
    "copy_rows",
    "find_field",
    "lay_out",
    "named_fields",
    "pick_rows",
    "put",
    "unsupported_kind",
]

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Dtypes of the same size as those that torch does not gather."""

ALIGNMENT = 16  # bytes: the widest torch dtype (complex128)


@dataclass(frozen=True)
class Field:
    """Where one field of a sample lies in its row.

    Attributes:
        name: Dotted path in the batch, such as `"labels"` or `"0.input_ids"`.
        dtype: The tensor's dtype.
        shape: The tensor's shape without the batch dimension.
        offset: First byte in the row; a multiple of 16.
        nbytes: Bytes of one sample.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self, rows: Tensor) -> Tensor:
        """The field of packed rows `[n, row_bytes]` uint8 as a view `[n, *shape]` of its dtype."""
        shape = (rows.shape[0], *self.shape)
        if not self.nbytes:
            return rows.new_empty(shape, dtype=self.dtype)
        # An operation of torch less. Not for a row at most: its view counts as contiguous, and needs strides like that.
        if rows.shape[0] > 1 and rows.is_contiguous():
            numbers = rows.view(self.dtype)
            start = numbers.storage_offset() + self.offset // self.dtype.itemsize
            return numbers.as_strided(shape, (numbers.shape[1], *self._strides), start)
        return rows.narrow(1, self.offset, self.nbytes).view(self.dtype).view(shape)

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        """Of one sample, in numbers: those of a contiguous tensor."""
        return tuple(math.prod(self.shape[dimension + 1 :]) for dimension in range(len(self.shape)))

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any] | None:
        """The dtype as numpy has it; None where it has none, as for bfloat16."""
        try:
            return torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        except TypeError:
            return None

    def check(self, tensor: object, batch_size: int, axis: int | None = None) -> Tensor:
        """Return `tensor` if it can fill this field, else raise `BatchError`; it may be shorter along `axis`."""
        if (
            isinstance(tensor, Tensor)
            and tensor.dtype == self.dtype
            and not tensor.is_nested  # has no shape
            and (tensor.shape == (batch_size, *self.shape) or self._is_narrow(tensor, batch_size, axis))
            and tensor.layout == torch.strided
            and (type(tensor) is Tensor or unsupported_kind(self.name, tensor) is None)
        ):
            return tensor
        raise BatchError(self._misfit(tensor, batch_size))

    def _is_narrow(self, tensor: Tensor, batch_size: int, axis: int | None) -> bool:
        """Whether `tensor` has this field's shape but for fewer entries along `axis`."""
        whole = (batch_size, *self.shape)
        if axis is None or len(whole) <= axis or tensor.ndim != len(whole):
            return False
        return tensor.shape[axis] <= whole[axis] and tensor.shape == (
            *whole[:axis],
            tensor.shape[axis],
            *whole[axis + 1 :],
        )

    def _misfit(self, tensor: object, batch_size: int) -> str:
        """Why `tensor` cannot fill this field."""
        if not isinstance(tensor, Tensor):
            return (
                f"batch field '{self.name}' was a tensor in the first batch and is now "
                f"{'missing' if tensor is None else type(tensor).__name__}; every batch needs the same fields"
            )
        unsupported = unsupported_kind(self.name, tensor)
        if unsupported is not None:
            return unsupported
        if tensor.dtype != self.dtype:
            return (
                f"batch field '{self.name}' was {self.dtype} in the first batch and is now {tensor.dtype}; "
                "cast it to one dtype"
            )
        if tensor.ndim and tensor.shape[1:] == self.shape and tensor.shape[0] != batch_size:
            return (
                f"batch field '{self.name}' has {tensor.shape[0]} rows, and the fields before it have {batch_size}; "
                "every field needs one row for each sample of the batch"
            )
        if tensor.shape != (batch_size, *self.shape):
            return (
                f"batch field '{self.name}' must have shape {(batch_size, *self.shape)}, as in the first batch, "
                f"and has {tuple(tensor.shape)}; pad or crop every sample to one shape, or have that done by naming it "
                "in rehearsal.padding.values"
            )
        raise AssertionError(f"batch field '{self.name}' fits")


def named_fields(fields: Sequence[Field], values: Mapping[str, Tensor], count: int) -> dict[str, Field]:
    """Fields by the names in `values`, once each of these tensors `[count, ...]` is known to fill its field.

    Raises:
        BatchError: There is no such field, or dtype or shape are not its own.
    """
    known = {field.name: field for field in fields}
    for name, value in values.items():
        if name not in known:
            raise BatchError(f"rows have no field '{name}'; they have {sorted(known)}")
        known[name].check(value, count)
    return {name: known[name] for name in values}


def find_field(fields: Sequence[Field], name: str, named_by: str, *, offered: int) -> Field:
    """The field called `name`.

    Args:
        fields: Those of the batch, then those of the state.
        name: As in `Field.name`.
        named_by: Key of the section that names it, for the message; empty where no key does.
        offered: Fields of the batch.

    Raises:
        BatchError: There is none; the message lists those of the batch.
    """
    for field in fields:
        if field.name == name:
            return field
    names, asked = [field.name for field in fields[:offered]], f", which {named_by} names" if named_by else ""
    by_place = " (entries of a tuple are called by their place)" if any(name.isdecimal() for name in names) else ""
    raise BatchError(f"the batch has no field '{name}'{asked}; it has {names}{by_place}")


def lay_out(tensors: Mapping[str, Tensor], offset: int) -> tuple[tuple[Field, ...], int]:
    """Fields for one sample of each tensor from `offset` on, and the bytes up to the end of the last."""
    fields = []
    for name, tensor in tensors.items():
        nbytes = tensor.dtype.itemsize * math.prod(tensor.shape[1:])
        fields.append(Field(name, tensor.dtype, tuple(tensor.shape[1:]), offset, nbytes))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(fields), offset


def put(
    rows: NDArray[np.uint8],
    slots: IntArray,
    fields: Sequence[Field],
    columns: Sequence[Tensor],
    places: IntArray | None = None,
) -> None:
    """Copy samples into rows in host memory.

    Args:
        rows: `[capacity, row_bytes]`, contiguous.
        slots: `[n]` int64, all different.
        fields: Where in a row each column goes.
        columns: `[m, *shape]` each, as `Field.check` lets them pass.
        places: `[n]` int64, which of the samples; None where it is all, in their order.

    Raises:
        IndexError: There is no such slot or place.
        ValueError: Lengths do not match.
    """
    scatter(rows, slots, [field.offset for field in fields], [as_array(column) for column in columns], places)


def pick_rows(rows: Tensor, places: IntArray | None) -> Tensor:
    """The rows at `places` `[n]`, or all of them."""
    return rows if places is None else rows[torch.from_numpy(places).to(rows.device)]


def copy_rows(source: Tensor, out: Tensor, index: Tensor | None) -> None:
    """Copy rows of `source` `[m, ...]`, those at `index` `[n]` or all, to `out` `[n, ...]`; in one go on one device."""
    if index is None:
        out.copy_(source)
    elif source.device == out.device:
        dtype = SIGNED.get(source.dtype, source.dtype)
        numbers = source.resolve_conj().resolve_neg().view(dtype)
        torch.index_select(numbers, 0, index.to(source.device), out=out.view(dtype))
    else:
        out.copy_(source[index.to(source.device)])


def bytes_of(column: Tensor) -> Tensor:
    """The bytes `[n, nbytes]` uint8 of a column: neither numpy nor every kernel of torch knows all dtypes."""
    return column.detach().resolve_conj().resolve_neg().contiguous().unsqueeze(-1).flatten(1).view(torch.uint8)


def as_array(column: Tensor) -> np.ndarray[Any, Any]:
    """A tensor in host memory `[n, ...]`, contiguous, or its bytes: a view wherever that is possible."""
    try:
        return np.ascontiguousarray(column.numpy())
    except (RuntimeError, TypeError):  # on a device, with a history or a lazy sign, or of a dtype that numpy lacks
        return bytes_of(column).numpy(force=True)


def unsupported_kind(name: str, tensor: Tensor) -> str | None:
    """Why a tensor that holds its numbers in another way cannot be a field; None for all others."""
    if tensor.is_nested:
        return (
            f"batch field '{name}' is a nested tensor, whose rows differ in length; pad it to one length, as with "
            ".to_padded_tensor(value), and name it in rehearsal.padding.values"
        )
    if tensor.is_quantized:
        return f"batch field '{name}' is quantised ({tensor.dtype}); give its numbers, as with .int_repr()"
    if hasattr(tensor, "to_local"):
        return f"batch field '{name}' is a DTensor, spread over ranks; give this rank's rows, as with .to_local()"
    if tensor.is_meta or hasattr(tensor, "fake_mode"):
        return f"batch field '{name}' is a {type(tensor).__name__} on '{tensor.device}' without numbers; give real ones"
    if hasattr(tensor, "get_mask"):
        return f"batch field '{name}' is a MaskedTensor; give its numbers and its mask as two tensors"
    if tensor.layout != torch.strided:
        return f"batch field '{name}' is sparse ({tensor.layout}); make it dense with .to_dense()"
    return None
