"""Work that may take long tells that it goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["telling_when_slow"]

LOG = logging.getLogger(__name__)


@contextmanager
def telling_when_slow(what: str, first_s: float = 5.0) -> Iterator[None]:
    """Log that work goes on after `first_s` seconds, twice, four times as many and so on, and when it has ended then.

    Args:
        what: The work, for a person, such as `loading DIR`.
        first_s: Work that is done by then logs nothing.
    """
    ended, start = threading.Event(), time.monotonic()

    def tell() -> None:
        wait_s = first_s
        while not ended.wait(start + wait_s - time.monotonic()):
            LOG.info("rehearsal: still %s, for %.0f s so far", what, wait_s)
            wait_s *= 2

    threading.Thread(target=tell, name="rehearsal-slow-work", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        passed_s = time.monotonic() - start
        if passed_s >= first_s:
            LOG.info("rehearsal: %s took %.0f s", what, passed_s)
