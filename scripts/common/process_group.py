"""Leaving the process group at the end of a job."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["leave_together"]


def leave_together() -> None:
    """Wait for all ranks and end the process group; without it a rank that ends before the others may be aborted."""
    dist.barrier()
    dist.destroy_process_group()
