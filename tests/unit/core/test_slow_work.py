"""Work that goes on for long says so."""

from __future__ import annotations

import logging
import time

import pytest

from rehearsal_plugin.core.slow_work import telling_when_slow


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "loading" in record.getMessage()]


def test_slow_work_is_told_in_growing_steps_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), telling_when_slow("loading rows", first_s=0.02):
        deadline = time.monotonic() + 60
        while len(told(caplog)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    *still, end = told(caplog)
    assert len(still) >= 3
    assert all(line.startswith("rehearsal: still loading rows, for ") for line in still)
    assert end.startswith("rehearsal: loading rows took ")


def test_quick_work_is_not_told_and_leaves_its_error_alone(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ValueError, match="broken"),
        telling_when_slow("loading rows", first_s=60),
    ):
        raise ValueError("broken")
    assert not told(caplog)
