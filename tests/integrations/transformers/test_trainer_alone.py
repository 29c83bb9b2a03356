"""A Trainer that trains by itself on each of several ranks: its models would drift apart by what they replay."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.transformers.callback import LOG
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import allow_indexed_cpu, trainer

SECTION: dict[str, Any] = {"buffer": {"capacity": 60}, "representatives": 2, "exchange": {"timeout_s": 20}}

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the Trainer joins the ranks by itself")


def trained(folder: Path, scope: str) -> str:
    callback = RehearsalCallback({**SECTION, "sampling": {"scope": scope}})
    job, _ = trainer(folder, callbacks=[callback], use_cpu=False)
    try:
        job.train()
    except ConfigError as error:
        return str(error)
    finally:
        callback.close()
    return "trained"


@no_gpu
def test_it_is_refused_with_the_cure_and_not_where_it_is_meant(tmp_path: Path) -> None:
    for message in run_ranks(trained, 2, tmp_path, "global"):
        assert "torch.distributed has 2 ranks, and this Trainer trains by itself" in message
        assert "use_cpu=True" in message
    assert run_ranks(trained, 2, tmp_path, "local") == ["trained"] * 2


def told_of_two_sections(folder: Path) -> list[int]:
    """How often this rank was told to keep one section: where both are alike, and where they differ."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take half a minute
    allow_indexed_cpu()
    times = []
    for number, other in enumerate(({}, {"representatives": 3})):
        engine: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
            "rehearsal": {**SECTION, **other},
        }
        callback = RehearsalCallback(SECTION)
        job, _ = trainer(folder / str(number), callbacks=[callback], max_steps=1, deepspeed=engine)
        told = io.StringIO()
        handler = logging.StreamHandler(told)
        LOG.addHandler(handler)
        job.train()
        LOG.removeHandler(handler)
        callback.close()
        times.append(told.getvalue().count("keep one of them"))
    return times


def test_the_first_rank_tells_of_another_section_in_the_deepspeed_config(tmp_path: Path) -> None:
    assert run_ranks(told_of_two_sections, 2, tmp_path) == [[0, 1], [0, 0]]
