"""Which dimension is the batch: the length that most leaves of a first batch have, if no other fits as well.

Every leaf with a dimension votes for its length. The entries of a list or tuple inside of the batch vote together, as
one leaf. Of two lengths with as many votes none is taken.

The length with most votes may still be that of time steps, where tensors are `[steps, rows, ...]`::

    {"x": [7, 4, 3], "mask": [7, 4], "y": [4]}      most leaves have 7 entries, and 4 fits all of them

So a length with fewer votes is a rival if it stands in dimension 1 of leaves that voted for the winner. The batch is
refused if the rival fits all of these leaves, or as many leaves speak for the rival alone as for the winner alone, and
two leaves share both lengths or those of the rival hold integers, as labels do. A table that is as long as a row, such
as the mean of each feature beside `x` `[8, 3]` and `y` `[8]`, is no rival.

Where several rows make up a sample, a leaf with one entry a sample votes for the rows of its samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from rehearsal_plugin.errors import BatchError

__all__ = ["batch_size", "entries_of", "holds_integers", "size_of"]


def batch_size(leaves: Mapping[str, Any], rows_per_sample: int = 1) -> int:
    """Rows of a batch.

    Args:
        leaves: Of the first batch, by name.
        rows_per_sample: Rows of a sample. A leaf may then have one entry a sample, too.

    Raises:
        BatchError: No leaf has a dimension, or two lengths could be the batch size.
    """
    lengths = {name: length for name, leaf in leaves.items() if (length := entries_of(leaf)) is not None}
    if not lengths:
        raise BatchError("the batch has no tensor with a batch dimension, so there is nothing to rehearse")
    votes = _votes(lengths, rows_per_sample)
    (size, most), *others = votes.most_common()
    rivals = [length for length, count in others if count == most]
    if rivals:
        raise BatchError(_undecided(lengths, size, rivals[0]))
    for length, _ in others:
        if _also_fits(leaves, lengths, size, length) and length * rows_per_sample != size:
            raise BatchError(_undecided(lengths, size, length, shared=True))
    return size


def entries_of(leaf: object) -> int | None:
    """The length of a leaf; None for one without."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return leaf.shape[0] if leaf.ndim else None
    return len(leaf) if isinstance(leaf, (list, tuple)) else None


def size_of(leaf: object) -> int | None:
    """The same also for objects of any other type that have a length, but not for strings."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return entries_of(leaf)
    try:
        return None if isinstance(leaf, (str, bytes)) else len(leaf)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def holds_integers(leaf: object) -> bool:
    """Whether a leaf holds integers or truth values, as token ids and labels are."""
    if isinstance(leaf, Tensor):
        return not (leaf.is_floating_point() or leaf.is_complex())
    return np.asarray(leaf).dtype.kind in "biu"


def _votes(lengths: Mapping[str, int], rows_per_sample: int) -> Counter[int]:
    """Votes for each length; with 2 rows a sample, lengths 8, 4, 4 give 3 votes to 8 and 2 to 4."""
    voters = dict.fromkeys((_voter(name), length) for name, length in lengths.items())  # each once, in their order
    votes = Counter(length for _, length in voters)
    if rows_per_sample == 1:
        return votes
    return Counter({
        length: count + (0 if length % rows_per_sample else votes[length // rows_per_sample])
        for length, count in votes.items()
    })  # fmt: skip


def _voter(name: str) -> str:
    """The leaf, or the list or tuple inside of the batch that it stands in."""
    keys = name.split(".")
    depth = next((depth for depth in range(1, len(keys)) if keys[depth].isdigit()), len(keys))
    return ".".join(keys[:depth])


def _also_fits(leaves: Mapping[str, Any], lengths: Mapping[str, int], size: int, rival: int) -> bool:
    """Whether another length than that of most leaves could be the batch size as well."""
    winners = [name for name, length in lengths.items() if length == size]
    shared = [name for name in winners if _second_dimension(leaves[name]) == rival]
    alone = len({_voter(name) for name in winners if name not in shared})
    others = {_voter(name) for name, length in lengths.items() if length != rival}  # lists of many lengths are no votes
    supporters = {_voter(name): leaves[name] for name, length in lengths.items() if length == rival}
    supporters = {voter: leaf for voter, leaf in supporters.items() if voter not in others}
    if size == 1 or not shared or not supporters or len(supporters) < alone:  # one row is no time step
        return False
    return not alone or len(shared) > 1 or all(map(holds_integers, supporters.values()))


def _second_dimension(leaf: Any) -> int | None:
    return leaf.shape[1] if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 1 else None


def _undecided(lengths: Mapping[str, int], size: int, rival: int, *, shared: bool = False) -> str:
    its_names, rivals_names = ([name for name, own in lengths.items() if own == one] for one in (size, rival))
    also = ", which is also dimension 1 of the former; move the rows to dimension 0," if shared else ";"
    return (
        f"the batch size cannot be told: {sorted(its_names)} have {size} entries and {sorted(rivals_names)} have "
        f"{rival}{also} {'or ' if shared else ''}name the leaves that have one entry a row in rehearsal.fields"
    )
