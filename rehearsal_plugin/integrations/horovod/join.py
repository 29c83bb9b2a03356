"""`hvd.join` is refused while a rehearsal is attached: a rank that has joined takes part in no exchange of rows.

Horovod lets the joined rank answer the allreduces of the others with zeros. It cannot answer those of the rehearsal,
whose sizes differ from step to step, and Horovod ends such a job with an error of its own cache.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.horovod.handle import HorovodHandle

__all__ = ["refuse_join"]

_attached: weakref.WeakSet[HorovodHandle] = weakref.WeakSet()


def refuse_join(hvd: Any, handle: HorovodHandle) -> None:
    """Have `hvd.join` raise a ConfigError until the rehearsal of `handle` is closed."""
    _attached.add(handle)
    original = hvd.join
    if hasattr(original, "rehearsal_original"):
        return

    @functools.wraps(original)
    def join(*args: Any, **kwargs: Any) -> Any:
        if any(each.enabled for each in _attached):
            raise ConfigError(
                "hvd.join() was called while a rehearsal is attached, and a rank that has joined takes part in no "
                "exchange of rows; give all ranks equally many batches, or call optimizer.rehearsal.close() on all "
                "ranks at the same step first"
            )
        return original(*args, **kwargs)

    join.rehearsal_original = original  # type: ignore[attr-defined]
    hvd.join = join
