"""A group of one passes the conformance suite too."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from rehearsal_plugin.distributed.transport import LocalTransport, Transport, open_transport
from tests.helpers import conformance


def local() -> Transport:
    return LocalTransport()


@functools.cache
def broken_facts() -> dict[str, str]:
    return conformance.check_facts(local)


@pytest.mark.parametrize("fact", conformance.FACTS)
def test_conformance(fact: str) -> None:
    assert fact not in broken_facts(), broken_facts()[fact]


def test_rows_come_back_as_they_were_sent() -> None:
    rows = torch.arange(12, dtype=torch.uint8).view(3, 4)
    received = conformance.finish(local().all_to_all(rows, np.array([3]), torch.empty_like(rows), np.array([3])))
    assert torch.equal(received, rows)


@pytest.mark.parametrize("backend", ["auto", "gloo", "nccl"])
def test_every_backend_of_torch_is_this_process_alone_without_torch_distributed(backend: str) -> None:
    assert isinstance(open_transport(backend, 5.0), LocalTransport)
