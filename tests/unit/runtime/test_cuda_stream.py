"""The side stream of the background: nothing without a GPU, and the right order with one."""

from __future__ import annotations

import pytest
import torch

from rehearsal_plugin.runtime.cuda_stream import SideStream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_without_a_gpu_nothing_happens() -> None:
    stream, rows = SideStream(torch.device("cpu")), torch.zeros(3)
    stream.mark()
    with stream.background():
        rows += 1
    stream.hand_over(rows)
    assert rows.tolist() == [1, 1, 1]


def test_an_error_inside_comes_out() -> None:
    with pytest.raises(KeyError), SideStream(torch.device("cpu")).background():
        raise KeyError


@pytest.mark.gpu
@needs_gpu
def test_the_background_sees_all_that_was_queued_before_the_mark() -> None:
    device = torch.device("cuda")
    stream, rows = SideStream(device), torch.zeros(1 << 22, device=device)
    for _ in range(50):
        rows += 1
    stream.mark()
    with stream.background():
        copied = rows.clone()
    stream.hand_over(copied)
    assert copied.min().item() == copied.max().item() == 50
