"""Rehearsals of one process for tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.helpers.injected import WANTED


@pytest.fixture
def rehearse() -> Iterator[Callable[..., Rehearsal]]:
    made: list[Rehearsal] = []

    def make(**section: Any) -> Rehearsal:
        made.append(Rehearsal({"buffer": {"capacity": 200}, "representatives": WANTED, **section}, LocalTransport()))
        return made[-1]

    yield make
    for rehearsal in made:
        rehearsal.close()
