"""Rows of different length travel with as many positions as the longest row of all ranks needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.header_schedule import LONGEST, STEADY_AFTER
from rehearsal_plugin.distributed.transport import Transport
from tests.helpers.ranks import run_ranks
from tests.helpers.thread_ranks import run_threads

ROOM = 4096
PADDING: dict[str, Any] = {"length": ROOM, "values": {"tokens": 0, "labels": -100}}
BYTES = 4 + 8  # of a position
QUIET = 8 + STEADY_AFTER + LONGEST  # steps until headers are seldom


def section(**keys: Any) -> dict[str, Any]:
    buffer = {"capacity": 40, **keys.pop("buffer", {})}
    return {"buffer": buffer, "representatives": 3, "padding": PADDING, "exchange": {"timeout_s": 60}, **keys}


def texts(rank: int, step: int, longest: int = 20, rows: int = 8) -> dict[str, Tensor]:
    """Texts of which each tells its rank, its step and its place in its first tokens, and its length."""
    rng = np.random.default_rng([rank, step])
    lengths = rng.integers(5, longest + 1, rows)
    lengths[0] = longest
    tokens, labels = torch.zeros(rows, longest, dtype=torch.int32), torch.full((rows, longest), -100)
    for row, length in enumerate(lengths.tolist()):
        tokens[row, :length] = torch.arange(1, length + 1)
        tokens[row, :4] = torch.tensor([rank + 1, step + 1, row + 1, length])
        labels[row, :length] = tokens[row, :length]
    return {"tokens": tokens, "labels": labels}


def is_whole(row: Tensor, labels: Tensor) -> bool:
    """Whether a replayed row is one that a rank gave, to its last token."""
    rank, step, place, length = row[:4].tolist()
    wanted = torch.arange(1, length + 1)
    wanted[:4] = torch.tensor([rank, step, place, length])
    masked = torch.cat((wanted.long(), torch.full((len(row) - length,), -100)))
    return torch.equal(row[:length].long(), wanted) and not row[length:].any() and torch.equal(labels.long(), masked)


def drive(rehearsal: Rehearsal, rank: int, first: int, stop: int, longest: int = 20) -> list[dict[str, Tensor]]:
    """Batches with what was replayed to them, each row whole."""
    batches = [rehearsal.update(texts(rank, step, longest)) for step in range(first, stop)]
    for batch in batches:
        assert all(map(is_whole, batch["tokens"], batch["labels"]))
    return batches


def ranks_with_longer_rows() -> tuple[int, int, float, float]:
    """Rank 1 has rows of up to 100 tokens, and both are sent them."""
    rank = dist.get_rank()
    with Rehearsal(section()) as rehearsal:
        batches = drive(rehearsal, rank, 0, 60, 100 if rank else 20)
        told = rehearsal.metrics()
    longest = max(int(batch["tokens"][8:, 3].max()) for batch in batches if len(batch["tokens"]) > 8)
    return longest, max(batch["tokens"].shape[1] for batch in batches), told["rows_sent"], told["bytes_sent"]


def test_all_ranks_send_as_many_positions_as_the_longest_row_of_any_needs() -> None:
    for longest, width, rows, sent in run_ranks(ranks_with_longer_rows, 2):
        assert (longest, width) == (100, 100)
        assert rows > 50
        assert sent <= rows * 112 * BYTES, "and not the 4,096 that there is room for"


def test_a_row_that_became_longer_waits_for_the_next_headers(caplog: pytest.LogCaptureFixture) -> None:
    def job(transport: Transport) -> tuple[int, list[int]]:
        with Rehearsal(section(buffer={"policy": "fifo"}), transport) as rehearsal:
            drive(rehearsal, transport.rank, 0, QUIET)
            offered = rehearsal.metrics()["rows_offered"]
            longer = drive(rehearsal, transport.rank, QUIET, QUIET + 2 * LONGEST, 300 if transport.rank else 20)
            waited = (QUIET + 2 * LONGEST) * 8 - rehearsal.metrics()["rows_offered"]
            assert offered == QUIET * 8
        return int(waited), [int(batch["tokens"][8:, 3].max()) for batch in longer]

    with caplog.at_level(logging.WARNING):
        (none, lengths_0), (some, lengths_1) = run_threads(job, 2)
    assert none == 0
    assert LONGEST / 8 < some < LONGEST * 8, "and not the short rows of these batches"
    assert "are not offered to the buffer" in caplog.text
    for lengths in (lengths_0, lengths_1):
        assert lengths[0] <= 20
        assert max(lengths[LONGEST + 3 :]) == 300


def test_rows_that_are_long_between_headers_alone_come_in_after_the_next_ones() -> None:
    def job(transport: Transport) -> tuple[int, float]:
        with Rehearsal(section(), transport) as rehearsal:
            drive(rehearsal, transport.rank, 0, QUIET)
            prefetcher, headers = rehearsal._coordinator.prefetcher, 0
            assert prefetcher is not None
            for step in range(QUIET, QUIET + 4 * LONGEST):
                silent = prefetcher.census.is_silent(step)
                headers += not silent
                drive(rehearsal, transport.rank, step, step + 1, 90 if silent and not headers else 20)
            before = rehearsal.metrics()["rows_offered"]
            drive(rehearsal, transport.rank, QUIET + 4 * LONGEST, QUIET + 4 * LONGEST + 3, 90)
            return headers, rehearsal.metrics()["rows_offered"] - before

    for headers, offered in run_threads(job, 2):
        assert headers >= 2
        assert offered == 3 * 8


@pytest.mark.parametrize("policy", ["reservoir", "random_replace", "fifo"])
def test_thinned_candidates_of_which_most_are_too_long_are_taken_in(policy: str) -> None:
    """More micro-batches than a step holds, in a stretch without headers."""
    padding = {**PADDING, "length": 1 << 15}

    def job(transport: Transport) -> float:
        with Rehearsal(section(buffer={"policy": policy}, padding=padding), transport) as rehearsal:
            drive(rehearsal, transport.rank, 0, QUIET)
            for step in range(QUIET, QUIET + 10):
                for micro_batch in range(14):
                    rehearsal.augment(texts(transport.rank, 100 * step + micro_batch, 300 if micro_batch < 12 else 20))
                rehearsal.step()
            return rehearsal.metrics()["rows_offered"] - 8 * QUIET

    for offered in run_threads(job, 2):
        assert 0 < offered < 10 * 14 * 8


def test_a_job_goes_on_with_fields_that_are_padded_in_another_way(tmp_path: Path) -> None:
    """Flat documents, then padded rows of the same fields, of which one has no padding any more."""
    keys = section(padding={"length": 64, "token_id": 0})

    def numbered(rank: int, step: int) -> list[Tensor]:
        lengths = np.random.default_rng([rank, step]).integers(3, 12, 6).tolist()
        return [torch.arange(1, length + 1) + 10 * (rank + 1) for length in lengths]

    def documents(rank: int, step: int) -> dict[str, Tensor]:
        rows = numbered(rank, step)
        tokens = torch.cat(rows)[None]
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        return {"input_ids": tokens, "labels": tokens.clone(), "position_ids": positions, "weights": tokens.float()}

    def padded(rank: int, step: int) -> dict[str, Tensor]:
        tokens, labels = torch.zeros(6, 64, dtype=torch.int64), torch.full((6, 64), -100)
        for place, row in enumerate(numbered(rank, step)):
            tokens[place, : len(row)] = labels[place, : len(row)] = row
        return {"input_ids": tokens, "labels": labels, "weights": tokens.float()}

    def job(transport: Transport) -> int:
        with Rehearsal(keys, transport) as rehearsal:
            for step in range(QUIET):
                rehearsal.update(documents(transport.rank, step))
            rehearsal.save(tmp_path)
        replayed = 0
        with Rehearsal(keys, transport) as rehearsal:
            rehearsal.load(tmp_path)
            for step in range(QUIET, QUIET + 2 * LONGEST):
                batch = rehearsal.update(padded(transport.rank, step))
                for tokens, labels, weights in zip(*(batch[name][6:] for name in batch), strict=True):
                    length = int((labels != -100).sum())
                    assert 3 <= length < 12
                    assert torch.equal(tokens[:length] % 10, torch.arange(1, length + 1) % 10)
                    assert torch.equal(tokens[:length], labels[:length])
                    assert torch.equal(weights[:length].long(), tokens[:length])
                    replayed += 1
        return replayed

    assert min(run_threads(job, 2)) >= LONGEST


def test_a_job_goes_on_with_padding_where_there_was_none(tmp_path: Path) -> None:
    def job(transport: Transport) -> float:
        wide = section(padding={**PADDING, "length": 20})
        plain = {key: value for key, value in wide.items() if key != "padding"}
        with Rehearsal(plain, transport) as rehearsal:
            drive(rehearsal, transport.rank, 0, QUIET)
            rehearsal.save(tmp_path)
        with Rehearsal(wide, transport) as rehearsal:
            rehearsal.load(tmp_path)
            before = rehearsal.metrics()["rows_offered"]
            drive(rehearsal, transport.rank, QUIET, QUIET + 20)
            return rehearsal.metrics()["rows_offered"] - before

    assert run_threads(job, 2) == [20 * 8] * 2


@pytest.mark.parametrize("scope", ["global", 2])
def test_who_posts_the_exchange_changes_nothing(scope: Any) -> None:
    def job(transport: Transport, **keys: Any) -> list[dict[str, Tensor]]:
        with Rehearsal(section(sampling={"scope": scope}, **keys), transport) as rehearsal:
            first = drive(rehearsal, transport.rank, 0, QUIET, 20 + 10 * transport.rank)
            return first + drive(rehearsal, transport.rank, QUIET, QUIET + 80, 20 + 60 * transport.rank)

    background = run_threads(job, 4)
    inline = run_threads(lambda transport: job(transport, exchange={"timeout_s": 60, "launch": "inline"}), 4)
    for one, other in zip(background, inline, strict=True):
        assert alike(one, other)


@pytest.mark.parametrize("at", [20, QUIET + 5])
@pytest.mark.parametrize("staged", [0, 2])
def test_a_job_resumes_bit_for_bit(at: int, staged: int, tmp_path: Path) -> None:
    """Also in a stretch without headers, with longer rows that wait, and between two micro-batches of a step."""

    def go_on(rehearsal: Rehearsal, rank: int) -> list[dict[str, Tensor]]:
        return drive(rehearsal, rank, at, at + 2 * LONGEST, 20 if rank else 130)

    def job(transport: Transport) -> bool:
        rank = transport.rank
        with Rehearsal(section(), transport) as rehearsal:
            drive(rehearsal, rank, 0, at - 1, 40 if rank else 20)
            drive(rehearsal, rank, at - 1, at)
            for number in range(staged):
                rehearsal.augment(texts(rank, 1000 + number))
            rehearsal.save(tmp_path)
            straight = go_on(rehearsal, rank)
        with Rehearsal(section(), transport) as rehearsal:
            rehearsal.load(tmp_path)
            return alike(go_on(rehearsal, rank), straight)

    assert run_threads(job, 2) == [True] * 2


def alike(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(one[name], other[name]) for one, other in zip(first, second, strict=True) for name in one
    )
