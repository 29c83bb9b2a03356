"""Digests of a rank's rows, by which ranks find out whether they hold the same."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.checkpoint.format import checksum
from rehearsal_plugin.checkpoint.state_tree import flatten_state
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator

__all__ = ["Fingerprint", "fingerprint_of"]

SAMPLE = 256
"""Rows that are hashed: ranks with different batches differ in nearly all of them."""


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a rank's buffer, each equal on ranks with equal content.

    Attributes:
        index: Digest of when, where and in which partition each row was admitted.
        fields: Digest of the batch fields of a sample of the rows.
        state: Digest of the recorded state of that sample.
    """

    index: str = ""
    fields: str = ""
    state: str = ""


def fingerprint_of(coordinator: ReplayCoordinator) -> Fingerprint:
    """The fingerprint of a rank between two steps; waits for the exchange in flight.

    Raises:
        ExchangeError: The exchange failed.
    """
    coordinator.drain()
    if coordinator.prefetcher is None:
        return Fingerprint()
    buffer = coordinator.prefetcher.buffer
    fields, state = _row_digests(buffer)
    return Fingerprint(_index_digest(buffer, coordinator.step), fields, state)


def _index_digest(buffer: RehearsalBuffer, step: int) -> str:
    held = {name: part for name, part in buffer.state_dict().items() if name != "rows"}
    plain, tensors = flatten_state({**held, "step": step})
    return checksum(json.dumps(plain, sort_keys=True), tensors)


def _row_digests(buffer: RehearsalBuffer) -> tuple[str, str]:
    """Digests of the batch fields and of the recorded state, of rows at equal distances."""
    slots = np.unique(np.linspace(0, max(0, len(buffer) - 1), min(len(buffer), SAMPLE)).astype(np.int64))
    rows = torch.zeros((len(slots), buffer.layout.row_bytes), dtype=torch.uint8, device=buffer.device)
    buffer.read(slots, rows)
    rows = rows.cpu()
    batch, state = (
        {field.name: field.view(rows).contiguous() for field in fields}
        for fields in (buffer.layout.fields, buffer.layout.state)
    )
    return checksum("", batch), checksum("", state)
