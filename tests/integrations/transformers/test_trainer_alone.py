"""A Trainer that trains by itself on each of several ranks: its models would drift apart by what they replay."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.errors import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import trainer

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


@pytest.mark.parametrize(("other", "warned"), [({}, False), ({"representatives": 3}, True)])
def test_a_second_section_in_the_deepspeed_config_is_told(
    other: dict[str, Any],
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rehearsal_plugin.config import RehearsalConfig
    from rehearsal_plugin.integrations.transformers import callback as module

    callback = RehearsalCallback(SECTION)
    job, _ = trainer(tmp_path, callbacks=[callback], max_steps=1)
    monkeypatch.setattr(module, "deepspeed_section", lambda _: RehearsalConfig.load({**SECTION, **other}))
    with caplog.at_level(logging.WARNING):
        job.train()
    callback.close()
    assert any("keep one of them" in record.getMessage() for record in caplog.records) is warned
