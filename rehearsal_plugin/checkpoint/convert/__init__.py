"""Rows for a buffer that does not start empty: from a data set, or from what a model says; see `docs/seeding.md`."""

from __future__ import annotations

from rehearsal_plugin.checkpoint.convert.columns import columns
from rehearsal_plugin.checkpoint.convert.model import Sampling, synthesized
from rehearsal_plugin.checkpoint.convert.sample import Sample
from rehearsal_plugin.checkpoint.convert.text import packed_texts
from rehearsal_plugin.checkpoint.convert.tokens import load_tokenizer

__all__ = ["Sample", "Sampling", "columns", "load_tokenizer", "packed_texts", "synthesized"]
