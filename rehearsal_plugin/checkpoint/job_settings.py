"""The settings of a job that its state depends on, and what a checkpoint of other ones must not be loaded into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.config.names import PARTITION
from rehearsal_plugin.errors import BEGIN_EMPTY, CheckpointError
from rehearsal_plugin.strategies import Strategy

__all__ = ["check_padding", "check_partition", "check_strategy", "goes_on", "job_settings"]


def job_settings(config: RehearsalConfig, strategy: Strategy) -> dict[str, Any]:
    """The settings that the state depends on."""
    buffer, sampling, retrieval = config.buffer, config.sampling, config.retrieval
    embedded = {} if retrieval is None or retrieval.module is None else {"embedding": retrieval.embedding}
    padded = {} if config.padding is None else {"padding": config.padding.model_dump(mode="json", exclude_none=True)}
    return {
        **embedded,
        **padded,
        "capacity": buffer.capacity,
        "policy": buffer.policy,
        "partition_by": buffer.partition_by,
        "score_by": buffer.score_by,
        "deduplicate": buffer.deduplicate,
        "weights": config.drawn_by,
        "scope": sampling.scope,
        "strategy": config.strategy.name,
        "outputs": config.strategy.outputs,
        "k": config.strategy.k,
        "draws": strategy.draws,
        "records": strategy.records,
    }


def goes_on(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a job with the settings `now` can take over all state of one with those of `then`."""
    # Files of earlier releases do not name the padding.
    if "padding" not in then:
        return then == {key: value for key, value in now.items() if key != "padding"}
    return then == {**now, "padding": _padding_now(then, now)}


def check_padding(then: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse rows that were padded otherwise: their lengths and masks would be read wrongly."""
    before, after = then.get("padding"), _padding_now(then, now)
    if before is None or before == after:
        return
    now_padded = after or {}
    changed = ", ".join(
        f"rehearsal.padding.{key} {before.get(key)!r} (this job has {now_padded.get(key)!r})"
        for key in sorted({*before, *now_padded})
        if before.get(key) != now_padded.get(key)
    )
    raise CheckpointError(
        f"{path} holds rows that were padded with {changed}; keep rehearsal.padding, or {BEGIN_EMPTY}"
    )


def _padding_now(then: Mapping[str, Any], now: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The padding of a job, which takes over the length of its checkpoint where it names none."""
    before, after = then.get("padding") or {}, now.get("padding")
    return after if after is None or "length" not in before else {"length": before["length"], **after}


def check_partition(fields: Collection[str], now: Mapping[str, Any], path: Path) -> None:
    """Refuse rows without a partition of their own, where all rows of the job have one."""
    if now["partition_by"] == PARTITION and PARTITION not in fields:
        raise CheckpointError(
            f"{path} holds rows of a job without rehearsal.buffer.partition, so they have no partition beside that of "
            f"this job; leave the key out, or {BEGIN_EMPTY}"
        )


def check_strategy(then: Mapping[str, Any], now: Mapping[str, Any], *, rows: bool, path: Path) -> None:
    """Refuse rows with recorded state of another strategy: this one could not read it, or would miss its own."""
    by_strategy = any(then.get(name) != now[name] for name in ("strategy", "outputs", "k"))
    by_loss = (then.get("score_by") == "loss") != (now["score_by"] == "loss")
    embedded = then.get("embedding") != now.get("embedding")
    if not rows or not (by_strategy or by_loss or embedded) or not (then.get("records") or now["records"]):
        return
    recorded = (
        ", ".join(f"{name} {job.get(name)!r}" for name in ("strategy", "outputs", "k", "score_by", "embedding"))
        for job in (then, now)
    )
    raise CheckpointError(
        f"{path} holds rows with what was recorded under {next(recorded)}, and this job has {next(recorded)}; keep "
        f"rehearsal.strategy, buffer.score_by and retrieval, or {BEGIN_EMPTY}"
    )
