"""A batch that has replayed rows in it is not taken for new rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError

SECTION = {"buffer": {"capacity": 50}, "representatives": 2}
TWICE = r"has replayed rows in it already; call augment\(\) or update\(\) once for each batch"


def batch(step: int, form: Any = torch.as_tensor) -> dict[str, Any]:
    return {"table": torch.zeros(3), "id": form(np.arange(8) + 8 * step), "x": form(np.zeros((8, 2)))}


@pytest.mark.parametrize("form", [torch.as_tensor, np.asarray])
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_batch_that_was_augmented_before_is_refused(form: Any, mode: str) -> None:
    with Rehearsal({**SECTION, "mode": mode}, LocalTransport()) as rehearsal:
        for step in range(5):
            seen = rehearsal.augment(batch(step, form))
            offered = rehearsal.metrics()["rows_offered"]
            if step > 3:
                with pytest.raises(BatchError, match=TWICE):
                    rehearsal.augment({**seen, "table": torch.ones(3)})
                assert rehearsal.metrics()["rows_offered"] == offered
            rehearsal.step()


def test_a_batch_of_a_loader_that_is_ahead_is_known() -> None:
    with Rehearsal({**SECTION, "representatives": 8}, LocalTransport()) as rehearsal:
        ahead = []
        for step in range(12):
            ahead.append(rehearsal.augment(batch(step)))
            rehearsal.step()
        for seen in ahead[-8:]:
            with pytest.raises(BatchError, match=TWICE):
                rehearsal.augment(seen)


def test_other_batches_come_as_often_as_they_like() -> None:
    table, again = torch.zeros(3), batch(0)
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        for step in range(9):
            rehearsal.augment({**batch(step), "table": table})
            rehearsal.augment(again)
            rehearsal.step()
        assert rehearsal.metrics()["rows_replayed"] > 0
