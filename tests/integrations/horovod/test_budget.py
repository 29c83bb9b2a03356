"""A forgetting budget over Horovod's collectives: the ratio of all ranks is one, and the budget is held."""

from __future__ import annotations

import pytest
import torch

from rehearsal_plugin import Rehearsal
from tests.helpers.horovod_ranks import run_horovod
from tests.integrations.test_forgetting_budget import BY_NEED, SECTION, STEPS, train

pytest.importorskip("horovod.torch")
pytestmark = pytest.mark.horovod


def controlled() -> tuple[list[float], float, list[float]]:
    import horovod.torch as hvd

    from rehearsal_plugin.distributed.transport.horovod import HorovodTransport

    weight = torch.zeros((), requires_grad=True)
    with Rehearsal(SECTION, HorovodTransport()) as rehearsal:
        ratios = train(rehearsal, weight, 0, STEPS, mean=lambda gradient: hvd.allreduce(gradient, name="gradient"))
    again = torch.zeros((), requires_grad=True)
    with Rehearsal(BY_NEED, HorovodTransport()) as rehearsal:
        by_need = train(rehearsal, again, 0, 100, mean=lambda gradient: hvd.allreduce(gradient, name="gradient"))
    return ratios, weight.item(), by_need


def test_the_budget_is_held_and_all_ranks_have_one_ratio() -> None:
    (ratios, weight, by_need), (others, _, theirs) = run_horovod(controlled, 2, timeout_s=180)
    assert ratios == others
    assert by_need == theirs
    assert weight**2 == pytest.approx(0.36, rel=0.1)
