"""Sections that pipelines and sequence-parallel ranks cannot follow are refused before the job starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.deepspeed.pipeline_engine import check_pipeline
from rehearsal_plugin.integrations.peers import check_sequence_parallelism

EMBEDDED: dict[str, Any] = {"retrieval": {"module": "encoder"}}


def test_a_pipeline_has_no_hidden_states_beside_the_rows() -> None:
    engine = SimpleNamespace(num_stages=1)
    with pytest.raises(ConfigError, match=r"rehearsal\.retrieval\.module needs the model's outputs"):
        check_pipeline(engine, RehearsalConfig.load(EMBEDDED))
    check_pipeline(engine, RehearsalConfig.load({"retrieval": {"embedding": "vector"}}))


def test_sequence_parallel_ranks_have_hidden_states_of_their_own_part() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.retrieval\.module goes by the content of rows"):
        check_sequence_parallelism(SimpleNamespace(sequence_parallel_size=2), RehearsalConfig.load(EMBEDDED))
    check_sequence_parallelism(SimpleNamespace(sequence_parallel_size=1), RehearsalConfig.load(EMBEDDED))
