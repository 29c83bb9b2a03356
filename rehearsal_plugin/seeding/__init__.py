"""Rows for a buffer that does not start empty: from a data set, or from what a model says; see `docs/seeding.md`."""

from __future__ import annotations

from rehearsal_plugin.seeding.columns import columns
from rehearsal_plugin.seeding.model import Sampling, synthesized
from rehearsal_plugin.seeding.sample import Sample
from rehearsal_plugin.seeding.text import packed_texts
from rehearsal_plugin.seeding.tokens import load_tokenizer

__all__ = ["Sample", "Sampling", "columns", "load_tokenizer", "packed_texts", "synthesized"]
