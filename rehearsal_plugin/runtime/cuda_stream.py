"""A side stream for the background, where batches live on a GPU; nothing at all where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["SideStream"]


class SideStream:
    """Orders background work on a CUDA device behind what the training thread has queued.

    Args:
        device: Where batches live; any device but CUDA makes this a no-op.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._marker: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Called on the training thread: the background must see all that was queued so far."""
        if self._stream is not None:
            self._marker = torch.cuda.current_stream(self._stream.device).record_event()

    def hand_over(self, tensor: Tensor) -> None:
        """Called on the training thread, for what the background has made: the memory is not used again too early.

        The allocator would give freed memory back to the side stream, though kernels of the training thread that read
        it may still be queued.
        """
        if self._stream is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(self._stream.device))

    @contextmanager
    def background(self) -> Iterator[None]:
        """Called on the worker: run inside on the side stream, and return when the device is done with it."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if self._marker is not None:
                self._stream.wait_event(self._marker)
            yield
        self._stream.synchronize()
