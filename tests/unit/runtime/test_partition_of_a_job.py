"""`buffer.partition`: one partition for all rows of a job, and a buffer that is handed on from job to job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import ConfigError

BATCHES: dict[str, Any] = {
    "rows": lambda step: {"x": torch.full((4, 2), step), "y": torch.arange(4)},
    "pairs": lambda step: {"x": torch.full((4, 2), step)},
    "documents": lambda step: {
        "input_ids": torch.full((1, 7), step),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]]),
    },
    "padded": lambda step: {"x": torch.full((4, 2 + step % 3), step + 1)},
}
SECTIONS: dict[str, dict[str, Any]] = {
    "pairs": {"rows_per_sample": 2},
    "padded": {"padding": {"length": 5, "values": {"x": 0}}},
}


def job(partition: int, **section: Any) -> Rehearsal:
    buffer = {"capacity": 40, **section.pop("buffer", {})}
    return Rehearsal({"buffer": {**buffer, "partition": partition}, "representatives": 2, **section}, LocalTransport())


@pytest.mark.parametrize("kind", ["rows", "padded", "documents"])
@pytest.mark.parametrize("transform", [False, True])
def test_a_buffer_that_is_handed_on_knows_its_phases(kind: str, transform: bool, tmp_path: Path) -> None:
    batch, section = BATCHES[kind], SECTIONS.get(kind, {})
    for phase in (1, 2, 3):
        with job(phase, **section, sampling={"weights": "balanced"}) as rehearsal:
            rehearsal.load(tmp_path, missing_ok=True)
            for step in range(8):
                seen = rehearsal.update(batch(step))
                assert seen.keys() == batch(step).keys()
            metrics = rehearsal.metrics()
            rehearsal.save(tmp_path)
    assert [metrics[f"rows_stored/{phase}"] > 0 for phase in (1, 2, 3)] == [True] * 3
    assert metrics["rows_replayed/1"] > 0


def test_pairs_of_a_job_are_refused_as_all_partitions_of_pairs_are() -> None:
    with pytest.raises(ConfigError, match="rows_per_sample"):
        job(1, rows_per_sample=2)


def test_a_transform_sees_no_partition() -> None:
    seen: list[set[str]] = []

    def transform(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(set(batch))
        return batch

    section: dict[str, Any] = {"buffer": {"capacity": 40, "partition": 5}, "representatives": 2}
    with Rehearsal({**section, "strategy": {"transform": "replayed"}}, LocalTransport(), transform=transform) as one:
        for step in range(6):
            one.update(BATCHES["rows"](step))
    assert seen
    assert all(names == {"x", "y"} for names in seen)


def test_the_partition_is_said_once() -> None:
    with pytest.raises(ConfigError, match="keep one of them"):
        RehearsalConfig.load({"buffer": {"partition": 3, "partition_by": "domain"}})
    config = RehearsalConfig.load({"buffer": {"partition": 3, "policy": "balanced"}, "fields": ["x"]})
    assert RehearsalConfig.load(config.model_dump()) == config
