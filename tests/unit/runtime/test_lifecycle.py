"""What becomes of buffer, background and transport when rows come, ranks change or an exchange fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rehearsal_plugin import LocalTransport, RehearsalConfig, RowLayout
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.errors import ExchangeError, StorageError
from rehearsal_plugin.runtime.lifecycle import Lifecycle
from tests.helpers.samples import new_batch

LAYOUT = RowLayout.infer(new_batch(0, 0, 4))
CPU = torch.device("cpu")


class Numbered(LocalTransport):
    """A transport that says which rank it is, and whether it was closed."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        self.rank, self.size, self.closed = rank, size, False

    def close(self) -> None:
        self.closed = True


def lifecycle(transport: LocalTransport | None = None, **keys: Any) -> Lifecycle:
    config = RehearsalConfig.load({"buffer": {"capacity": 50, "partition_by": "label"}, **keys})
    return Lifecycle(config, transport or LocalTransport(), Metrics(), draws=1)


def test_there_is_no_buffer_before_the_first_rows() -> None:
    assert lifecycle().prefetcher is None
    assert lifecycle().step == 0


def test_the_first_rows_make_buffer_and_background() -> None:
    ranks = lifecycle()
    prefetcher = ranks.begin(LAYOUT, CPU)
    assert ranks.prefetcher is prefetcher
    assert (len(prefetcher.buffer), prefetcher.buffer.layout) == (0, LAYOUT)
    ranks.close(0.0)


def test_a_restart_keeps_the_buffer_and_begins_at_the_step() -> None:
    ranks = lifecycle()
    before = ranks.begin(LAYOUT, CPU)
    ranks.restart(7)
    assert ranks.prefetcher is not None
    assert ranks.prefetcher is not before
    assert ranks.prefetcher.buffer is before.buffer
    assert ranks.step == ranks.first_step == 7
    ranks.close(0.0)


def test_a_restart_with_other_ranks_closes_the_old_transport() -> None:
    old, new = Numbered(2, 4), Numbered(1, 3)
    ranks = lifecycle(old)
    assert (ranks.rank, ranks.size) == (2, 4)
    ranks.restart(0, lambda: new)
    assert (ranks.rank, ranks.size, old.closed, new.closed) == (1, 3, True, False)
    ranks.close(0.0)
    assert new.closed


def test_a_rank_that_goes_alone_keeps_its_number_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    ranks = lifecycle(Numbered(2, 4))
    ranks.go_alone(ExchangeError("peer 3 is gone"))
    assert (ranks.rank, ranks.size, ranks.alone) == (2, 4, True)
    assert "rank 2 goes on with the rows of its own buffer" in caplog.text
    assert "peer 3 is gone" in caplog.text


def test_the_background_of_a_rank_that_goes_alone_keeps_its_number() -> None:
    ranks = lifecycle(Numbered(2, 4), candidates=2)
    batch = new_batch(0, 0, 40)
    columns = LAYOUT.columns(batch)
    before = ranks.begin(LAYOUT, CPU)
    before.stage_candidates(columns)
    ranks.go_alone(ExchangeError("gone"))
    assert ranks.prefetcher is not None
    ranks.prefetcher.stage_candidates(columns)
    staged = [prefetcher.state_dict()["staged"] for prefetcher in (before, ranks.prefetcher)]
    assert torch.equal(*staged), "candidates are drawn by the number of the rank"
    ranks.close(0.0)


def test_a_rank_that_connects_again_is_not_alone_any_more() -> None:
    ranks = lifecycle(Numbered(2, 4))
    ranks.go_alone(ExchangeError("gone"))
    ranks.restart(0, lambda: Numbered(0, 2))
    assert not ranks.alone


def test_a_reset_leaves_no_row() -> None:
    ranks = lifecycle()
    ranks.begin(LAYOUT, CPU)
    ranks.reset(5)
    assert ranks.prefetcher is None
    assert ranks.step == 5


def test_a_proposed_mixture_outlives_a_restart() -> None:
    ranks = lifecycle(sampling={"weights": "balanced"})
    ranks.propose_mixture({1: 2.0})
    for _ in range(2):
        if ranks.prefetcher is None:
            ranks.begin(LAYOUT, CPU)
        else:
            ranks.restart(0)
        assert ranks.prefetcher is not None
        assert ranks.prefetcher.mixture.proposed == {"1": 2.0}
    ranks.close(0.0)


def test_a_background_that_does_not_end_is_an_error_that_names_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = lifecycle(exchange={"timeout_s": 0.1})
    prefetcher = ranks.begin(LAYOUT, CPU)
    monkeypatch.setattr(prefetcher, "close", lambda **_: False)
    with pytest.raises(StorageError, match=r"rank 0 has been writing .* 0\.1 s .* whether its disk still answers"):
        ranks.restart(0)


def test_values_are_gathered_by_rank() -> None:
    assert lifecycle().gather(3, 4) == [[3, 4]]
