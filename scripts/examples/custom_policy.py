"""A policy of your own: half of the buffer remembers the beginning for good, the other half the newest rows.

    python -m scripts.examples.custom_policy

prints

    the buffer holds rows of the steps 0 to 4 and 95 to 99
"""

from __future__ import annotations

import numpy as np
import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.buffer.policies import Offer, register
from rehearsal_plugin.buffer.slot_index import SlotIndex

CAPACITY, BATCH, STEPS = 80, 8, 100


@register("first_and_last")
def first_and_last(index: SlotIndex, offer: Offer, rng: np.random.Generator) -> np.ndarray:
    """Fill all slots, then write over the second half of them again and again.

    A policy is a pure function: it returns the slot of each offered row, -1 for a row that is not kept, and no slot
    twice. The buffer does the rest, also when rows come from a checkpoint.
    """
    numbers = index.offered + np.arange(len(offer))  # of each row in the stream
    half = index.capacity // 2
    slots = np.where(numbers < index.capacity, numbers, half + (numbers - index.capacity) % (index.capacity - half))
    newest_first = slots[::-1]
    _, last = np.unique(newest_first, return_index=True)  # where a slot comes twice, the newer row has it
    kept = np.full(len(offer), -1)
    kept[len(offer) - 1 - last] = newest_first[last]
    return kept


def main() -> None:
    with Rehearsal({"buffer": {"capacity": CAPACITY, "policy": "first_and_last"}, "ratio": 0.25}) as rehearsal:
        for step in range(STEPS):
            rehearsal.update({"step": torch.full((BATCH,), step)})
        rehearsal.drain()
        assert rehearsal.buffer is not None
        steps = np.unique(rehearsal.buffer.written(np.arange(CAPACITY)))
    early, late = steps[steps < STEPS // 2], steps[steps >= STEPS // 2]
    print(f"the buffer holds rows of the steps {early[0]} to {early[-1]} and {late[0]} to {late[-1]}")


if __name__ == "__main__":
    main()
