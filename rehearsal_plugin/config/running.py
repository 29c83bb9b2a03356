"""The keys that say how rows travel and how they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rehearsal_plugin.config.names import LONGEST_WAIT_S, PathName
from rehearsal_plugin.config.registries import TRANSPORTS, listing, registered_in
from rehearsal_plugin.config.section import Section
from rehearsal_plugin.config.size import INT64, Size, parse_size

__all__ = ["CheckpointConfig", "ExchangeConfig", "MetricsConfig"]


class ExchangeConfig(Section):
    """How rows travel between ranks."""

    KEY_PATH: ClassVar[str] = "rehearsal.exchange"

    backend: Annotated[str, registered_in(TRANSPORTS), listing(TRANSPORTS)] = Field(
        default="auto",
        description="Communication library; 'auto' is NCCL where the ranks' own group uses it, else gloo.",
    )
    timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="Seconds to wait for the other ranks before the step is given up with an error.",
    )
    on_failure: Literal["raise", "local"] = Field(
        default="raise",
        description="What a failed exchange leads to: an error in the training loop; or a warning, once, after which "
        "this rank goes on with the rows of its own buffer.",
    )
    launch: Literal["auto", "thread", "inline"] = Field(
        default="auto",
        description="Start collectives from a background thread, or from the training thread at a fixed point "
        "of the step; 'auto' takes what the backend allows.",
    )

    def broken_rules(self) -> Iterator[str]:
        """Backend and launch."""
        if self.backend == "nccl" and self.launch == "thread":
            yield (
                f"{self.KEY_PATH}.launch 'thread' can deadlock with backend 'nccl', whose collectives need one "
                "order over all communicators; use 'inline' or 'auto'"
            )


class CheckpointConfig(Section):
    """How the buffer is saved."""

    KEY_PATH: ClassVar[str] = "rehearsal.checkpoint"

    enabled: bool = Field(
        default=True, description="Whether the buffer is saved and loaded with the checkpoints of the framework."
    )
    asynchronous: bool = Field(
        default=False, description="Copy the rows and write them in the background, instead of waiting for the disk."
    )
    incremental: bool = Field(
        default=False,
        description="Write only the rows that changed since the last save; the others are hard links to its files.",
    )
    write_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="Seconds to wait for a save in the background before an error is raised.",
    )


class MetricsConfig(Section):
    """What rank 0 writes down while the job runs."""

    KEY_PATH: ClassVar[str] = "rehearsal.metrics"

    file: PathName | None = Field(
        default=None,
        description="A file that rank 0 adds its metrics to, a JSON object a line, for 'rehearsal watch' and "
        "'rehearsal report'; none when left out.",
    )
    every: int = Field(default=10, ge=1, lt=INT64, description="Every how many optimizer steps it does so.")
    rotate: Size = Field(
        default="16MiB",
        description="Size such as '16MiB', from which on the file is renamed to '<file>.1', in place of an earlier "
        "one, and begun anew.",
    )

    @property
    def rotate_bytes(self) -> int:
        """Bytes after which the file is begun anew."""
        return self.rotate if isinstance(self.rotate, int) else parse_size(self.rotate) or 0
