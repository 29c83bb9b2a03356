"""Strategies: the loss over new and replayed rows, and the state that rows carry for it; one strategy a file."""

from __future__ import annotations

from rehearsal_plugin.strategies.base import STRATEGIES, Part, Strategy, make_strategy, register
from rehearsal_plugin.strategies.der import DarkExperienceReplay
from rehearsal_plugin.strategies.der_plus_plus import DarkExperienceReplayPlusPlus
from rehearsal_plugin.strategies.er import ExperienceReplay
from rehearsal_plugin.strategies.er_ace import AsymmetricReplay
from rehearsal_plugin.strategies.row_embedding import RowEmbedding
from rehearsal_plugin.strategies.row_loss import RowLoss
from rehearsal_plugin.strategies.topk import TopKDistillation
from rehearsal_plugin.strategies.x_der import ExtendedDarkExperienceReplay

__all__ = [
    "STRATEGIES",
    "AsymmetricReplay",
    "DarkExperienceReplay",
    "DarkExperienceReplayPlusPlus",
    "ExperienceReplay",
    "ExtendedDarkExperienceReplay",
    "Part",
    "RowEmbedding",
    "RowLoss",
    "Strategy",
    "TopKDistillation",
    "make_strategy",
    "register",
]
