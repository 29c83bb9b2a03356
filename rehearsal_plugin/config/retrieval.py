"""The keys of `rehearsal.retrieval`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from rehearsal_plugin.config.names import Metric, Name, Pool
from rehearsal_plugin.config.section import Section
from rehearsal_plugin.config.size import INT64

__all__ = ["RetrievalConfig"]


class RetrievalConfig(Section):
    """How stored rows are found by their embedding."""

    KEY_PATH: ClassVar[str] = "rehearsal.retrieval"

    embedding: Name = Field(
        default="rehearsal.embedding",
        description="Dotted name of the floating-point field that holds the embedding of a row, one vector a sample; "
        "when left out, the one that 'module' records.",
    )
    module: Name | None = Field(
        default=None,
        description="Name of a module of the model, as named_modules() tells it, whose hidden states become the "
        "embedding of each row when it is seen; none when the batch brings the embedding.",
    )
    pool: Pool = Field(
        default="mean", description="Of the hidden states of 'module', the mean over all tokens or that of the last."
    )
    mask: Name = Field(
        default="attention_mask",
        description="The model's argument that tells tokens (1) from padding (0); without it all are tokens.",
    )
    refresh: bool = Field(
        default=True, description="Whether rows get a new embedding from 'module' whenever they are replayed."
    )
    metric: Metric = Field(
        default="cosine", description="What makes rows near: a large inner product, a large cosine, a small distance."
    )
    index: Literal["flat", "ivf", "hnsw"] = Field(
        default="flat",
        description="How they are searched: all of them, exactly; the nearest lists of an inverted file; or along a "
        "graph of neighbours (HNSW).",
    )
    lists: int | None = Field(
        default=None, ge=1, lt=1 << 24, description="Lists of 'ivf'; four times the root of the rows when left out."
    )
    probes: int = Field(default=64, ge=1, lt=1 << 24, description="Lists of 'ivf' that a search looks into.")
    neighbours: int = Field(default=32, ge=2, le=512, description="Neighbours of each row in the graph of 'hnsw'.")
    build_width: int = Field(default=80, ge=1, lt=1 << 24, description="Candidates while the graph is built.")
    search_width: int = Field(default=128, ge=1, lt=1 << 24, description="Candidates while the graph is searched.")
    exact_below: int = Field(
        default=4096,
        ge=0,
        lt=INT64,
        description="Up to that many rows, as on a rank or behind a filter, are searched exactly in any case.",
    )
    rebuild: float = Field(
        default=0.5,
        gt=0,
        le=1e3,
        description="'ivf' and 'hnsw' are built anew when more rows than that share of those stored have been replaced "
        "or have come since.",
    )

    def broken_rules(self) -> Iterator[str]:
        """Index and its settings."""
        if self.lists is not None and self.probes > self.lists:
            yield f"{self.KEY_PATH}.probes is {self.probes}, and there are {self.lists} lists; give no more than these"
