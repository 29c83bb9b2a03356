"""`hvd.join` while a rehearsal is attached."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.horovod.handle import HorovodHandle
from rehearsal_plugin.integrations.horovod.join import refuse_join


def test_it_is_refused_until_the_rehearsal_is_closed() -> None:
    hvd, handle = SimpleNamespace(join=lambda device=-1: device), HorovodHandle(None)
    handle.rehearsal = Rehearsal({}, LocalTransport())
    refuse_join(hvd, handle)
    refuse_join(hvd, handle)
    with pytest.raises(ConfigError, match=r"hvd.join\(\) was called while a rehearsal is attached"):
        hvd.join()
    handle.close()
    assert hvd.join(3) == 3


def test_a_handle_without_a_rehearsal_refuses_nothing() -> None:
    hvd, handle = SimpleNamespace(join=lambda: 7), HorovodHandle(None)
    refuse_join(hvd, handle)
    assert hvd.join() == 7
