"""Jobs with a fault on purpose: several at once in one world, and the rows that their ranks have afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import TorchDistributedTransport
from rehearsal_plugin.errors import RehearsalError
from tests.helpers.samples import Batch, intact, new_batch, samples

__all__ = ["SIZE", "WANTED", "Make", "connect", "missing", "report", "reported", "section", "train", "variant_of"]

SIZE, WANTED = 8, 6
V = TypeVar("V")
Make: TypeAlias = Callable[[int, int, int], Batch]  # as `new_batch`


def variant_of(variants: Sequence[V], size: int = 2) -> tuple[V, Any]:
    """The variant of this rank's job, and the group of its `size` ranks; the world has a job for every variant."""
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, size * len(variants), size)]
    number = dist.get_rank() // size
    return variants[number], groups[number]


def section(**keys: Any) -> dict[str, Any]:
    """A buffer with room for every row that a test offers: whatever is not there was lost."""
    return {"buffer": {"capacity": 400}, "representatives": WANTED, "exchange": {"timeout_s": 20}, **keys}


def connect(group: Any, kind: Callable[..., TorchDistributedTransport] = TorchDistributedTransport) -> Any:
    """A transport between the ranks of a job."""
    return kind(group, timeout_s=20)


def train(rehearsal: Rehearsal, rank: int, steps: Iterable[int], make: Make = new_batch) -> dict[str, Any]:
    """Train until the end or the first error, and close; what is true of the rank then.

    Returns:
        `error` and what two more calls said (`again`), `ids` of what the model saw in each step, whether all of it was
        `intact`, `lost`: the samples that were offered and are not stored, and the `metrics`.
    """
    offered: list[int] = []
    batches: list[Batch] = []
    errors: list[str] = []
    for step in steps:
        batch = make(rank, step, SIZE)
        try:
            batches.append(rehearsal.update(batch))
            offered += batch["id"].tolist()
        except RehearsalError as caught:
            errors.append(f"{type(caught).__name__}: {caught}")
            if len(errors) == 3:
                break
    rehearsal.close()
    return {
        "error": errors[0] if errors else "",
        "again": errors[1:],
        "intact": all(map(intact, batches)),
        "ids": [batch["id"].tolist() for batch in batches],
        "lost": missing(rehearsal, offered),
        "metrics": rehearsal.metrics(),
    }


def missing(rehearsal: Rehearsal, offered: Iterable[int]) -> list[int]:
    """The samples offered to this rank that its buffer does not hold, or not with all fields as they were."""
    assert rehearsal.buffer is not None
    rows = rehearsal.buffer.sample(rehearsal.buffer.capacity)
    right = samples(rows["id"])
    whole = torch.stack([(rows[name] == right[name]).reshape(len(rows["id"]), -1).all(1) for name in right]).all(0)
    return sorted(set(offered) - set(rows["id"][whole].tolist()))


def report(facts: dict[str, Any]) -> None:
    """Tell the test what is true of this rank, where it is run by `run_exits`."""
    print(f"\nfacts {json.dumps(facts)}", flush=True)


def reported(end: dict[str, Any]) -> dict[str, Any]:
    """The outcome that a rank printed."""
    lines = [line for line in end["stderr"].splitlines() if line.startswith("facts ")]
    assert lines, end["stderr"]
    facts: dict[str, Any] = json.loads(lines[-1].removeprefix("facts "))
    return facts
