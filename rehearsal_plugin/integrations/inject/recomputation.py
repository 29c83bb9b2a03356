"""Around which call of a model the caller runs: activation checkpointing, or the model itself.

| `torch.utils.checkpoint` | first pass | recomputation |
|---|---|---|
| `use_reentrant=False` | with gradients | with gradients, within the backward pass |
| `use_reentrant=True` | without gradients, in `CheckpointFunction.forward` | with gradients, within the backward pass |
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

__all__ = ["in_backward", "in_checkpointed_region", "is_called_by_itself"]


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def in_checkpointed_region() -> bool:
    """Whether the caller runs in the first pass of a reentrant checkpoint that will be differentiated.

    DeepSpeed, Megatron and FairScale have functions of their own with the same arguments. All are known by these.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:2] == ("ctx", "run_function"):
            return any(frame.f_locals["ctx"].needs_input_grad)
        frame = frame.f_back
    return False


def is_called_by_itself(module: nn.Module) -> bool:
    """Whether a hook of a module runs in a call that the module's own forward makes."""
    calls, frame = 0, sys._getframe(1)
    while frame is not None and calls < 2:
        calls += frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2
