"""What the ranks of torch.distributed find, told to all of them and in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

__all__ = ["describe_ranks", "gather_texts"]

MOST_DESCRIBED = 6
"""Groups of ranks that a message tells of."""


def gather_texts(text: str) -> list[str]:
    """The text of every rank of the job, by rank; all ranks make this call.

    Alone, or before torch.distributed is initialised, it is the text of this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [text]
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def describe_ranks(found: Sequence[str]) -> str:
    """What each rank found, in words; an empty text is nothing.

    >>> describe_ranks(["tag", "", ""])
    'rank 0: tag; ranks 1, 2: none'
    """
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(found):
        ranks.setdefault(text, []).append(rank)
    words = [f"rank{'s' * (len(some) > 1)} {_numbers(some)}: {text or 'none'}" for text, some in ranks.items()]
    return "; ".join(words[:MOST_DESCRIBED])


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
