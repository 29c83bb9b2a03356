"""`optimizer.step(closure)` with a rehearsal that follows the steps of a Horovod optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.horovod.handle import HorovodHandle


def closure() -> float:
    return 1.0


def followed(inject: str, optimizer: Any) -> HorovodHandle:
    handle = HorovodHandle(None)
    handle.rehearsal = Rehearsal({"inject": inject}, LocalTransport())
    handle.follow_steps(optimizer)
    return handle


@pytest.mark.parametrize("step", [lambda o: o.step(closure), lambda o: o.step(closure=closure)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_is_refused_where_rows_are_injected_at_the_model(kind: Any, step: Callable[[Any], Any]) -> None:
    optimizer = kind(nn.Linear(1, 1).parameters(), lr=0.1)
    handle = followed("forward", optimizer)
    with pytest.raises(ConfigError, match=r"optimizer\.step\(closure\) calls the model within the step"):
        step(optimizer)
    handle.close()
    step(optimizer)


def test_a_closure_may_use_the_batches_of_a_loader() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    handle = followed("loader", optimizer)
    optimizer.step(closure)
    handle.close()


def test_a_step_without_one_is_no_matter() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    handle = followed("forward", optimizer)
    optimizer.step()
    optimizer.step(None)
    handle.close()
