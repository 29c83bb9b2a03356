"""Hooks that a compiler leaves alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import optree
import torch
from torch import nn

from rehearsal_plugin.strategies.uncompiled_hook import UncompiledHook


class Seen:
    def __init__(self) -> None:
        self.leaves = 0

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        leaves: list[Any] = optree.tree_leaves((args, output))  # type: ignore[arg-type]  # any nesting
        self.leaves += len(leaves)


def test_a_hook_of_a_compiled_model_runs_as_it_is() -> None:
    model, seen = nn.Linear(3, 2), Seen()
    model.register_forward_hook(UncompiledHook(seen.note))
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        compiled(torch.randn(4, 3))
    assert seen.leaves == 6


def test_a_model_is_copied_and_pickled_with_it() -> None:
    model, seen = nn.Linear(3, 2), Seen()
    model.register_forward_hook(UncompiledHook(seen.note))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(4, 3))
    assert seen.leaves == 0, "a copy has a hook of its own"
