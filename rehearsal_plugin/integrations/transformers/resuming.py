"""The checkpoint that the ranks of a `Trainer` resume from, where each host has a folder of its own."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.integrations.ranks import describe_ranks, gather_texts

__all__ = ["newest_on_all_ranks"]


def newest_on_all_ranks(output_dir: str) -> str | None:
    """The newest checkpoint of a Trainer in a folder, as `resume_from_checkpoint=True` takes it; None without one.

    Raises:
        CheckpointError: The folders of the hosts do not have the same one as the newest.
    """
    newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None  # type: ignore[no-untyped-call]
    found = gather_texts("" if newest is None else Path(newest).name)
    if len(set(found)) > 1:
        raise CheckpointError(
            f"the ranks would resume from different checkpoints in {output_dir}: {describe_ranks(found)}; set "
            "resume_from_checkpoint to the folder of one that every host has"
        )
    return newest
