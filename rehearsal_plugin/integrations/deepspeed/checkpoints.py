"""`save_checkpoint` and `load_checkpoint` of a DeepSpeed engine, with the buffer in the folder of the tag.

With `use_node_local_storage`, or folders of the hosts, DeepSpeed writes `latest` on the host of rank 0 alone, and its
ranks load each for itself. So the ranks agree on the tag before they load, and on whether there was one afterwards.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.integrations.handle import Handle
from rehearsal_plugin.integrations.ranks import describe_ranks

__all__ = ["load_checkpoint", "save_checkpoint"]

LOG = logging.getLogger(__name__)

CLIENT_STATE = "rehearsal"
"""Key of DeepSpeed's client state under which the step and run of the buffer stand."""


def save_checkpoint(
    engine: Any,
    handle: Handle,
    save: Callable[..., Any],
    save_dir: str,
    tag: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Save the buffer into the folder of the tag, before DeepSpeed's own files.

    So the tag in `latest` is complete, unless files are written in the background. DeepSpeed's own files name the step
    and the run of the buffer: the folder of a tag that is used again may hold several.
    """
    handle.save(Path(save_dir) / str(f"global_step{engine.global_steps}" if tag is None else tag))
    bound = inspect.signature(save).bind(save_dir, tag, *args, **kwargs)
    if handle.enabled:
        bound.arguments["client_state"] = {**(bound.arguments.get("client_state") or {}), CLIENT_STATE: handle.progress}
    return save(*bound.args, **bound.kwargs)


def load_checkpoint(engine: Any, handle: Handle, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Load the buffer from the folder of the tag; without files there it stays unchanged, with a warning.

    Raises:
        CheckpointError: The ranks find different checkpoints of DeepSpeed, or some find none.
    """
    bound = inspect.signature(load).bind(*args, **kwargs)
    load_dir = str(bound.arguments["load_dir"])
    if bound.arguments.get("tag") is None:
        universal = getattr(engine, "load_universal_checkpoint", bool)()
        bound.arguments["tag"] = _common_tag(handle, Path(load_dir), "latest_universal" if universal else "latest")
    path, client_state = load(*bound.args, **bound.kwargs)
    found = handle.gather_texts("" if path is None else "loaded")
    if "" in found and any(found):
        raise CheckpointError(_at_odds(load_dir, found))
    saved = client_state.pop(CLIENT_STATE, {}) if isinstance(client_state, dict) else {}
    if path is None or bound.arguments.get("load_module_only"):
        return path, client_state
    folder = Path(path).parent
    if not handle.load(folder, saved.get("step"), run=saved.get("run"), missing_ok=True) and handle.enabled:
        LOG.warning("%s has no rehearsal checkpoint; the buffer stays as it is", folder)
    return path, client_state


def _common_tag(handle: Handle, folder: Path, latest: str) -> str | None:
    """The tag that `latest` names on the ranks that see it; None where no rank does.

    Raises:
        CheckpointError: Ranks read different tags, or a rank that reads none has no folder of that name.
    """
    path = folder / latest
    tags = handle.gather_texts(path.read_text().strip() if path.is_file() else "")
    named = sorted({tag for tag in tags if tag})
    if len(named) > 1:
        raise CheckpointError(_at_odds(folder, tags))
    if "" not in tags or not named:
        return named[0] if named else None
    # Rank 0 alone writes the name, and the other hosts may have the folder.
    folders = handle.gather_texts(named[0] if (folder / named[0]).is_dir() else "")
    if "" in folders:
        raise CheckpointError(_at_odds(folder, folders))
    return named[0]


def _at_odds(folder: str | Path, found: Sequence[str]) -> str:
    return (
        f"the ranks find different checkpoints of DeepSpeed in {folder}: {describe_ranks(found)}; start on the hosts "
        "that saved, copy the folder of the tag to every host, or give load_checkpoint a tag that all have"
    )
