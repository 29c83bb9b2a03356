"""The keys that say how rows travel and how they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rehearsal_plugin.config.names import LONGEST_WAIT_S
from rehearsal_plugin.config.registries import TRANSPORTS, listing, registered_in
from rehearsal_plugin.config.section import Section

__all__ = ["CheckpointConfig", "ExchangeConfig"]


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
