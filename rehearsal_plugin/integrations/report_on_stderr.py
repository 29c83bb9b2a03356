"""The two lines of a job's report on stderr, where a script that `rehearsal_plugin.run` started logs nothing itself."""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["show_report"]

REPORT = "rehearsal_plugin.runtime.job_report"
"""The logger of the lines at the first batch and at the end."""

RANKS = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
"""Variables with the rank of a process, as launchers set them."""


class StderrUnlessLogged(logging.Handler):
    """Writes to stderr what no handler of the script gets."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        if not logging.getLogger().handlers:
            print(record.getMessage(), file=sys.stderr, flush=True)


def show_report() -> None:
    """Have rank 0 tell what a row is and what came of the job, without a line of the script; once a process."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    logger = logging.getLogger(REPORT)
    if rank != "0" or any(isinstance(handler, StderrUnlessLogged) for handler in logger.handlers):
        return
    logger.addHandler(StderrUnlessLogged())
    if logger.level == logging.NOTSET:  # a level of the script's own stays
        logger.setLevel(logging.INFO)
