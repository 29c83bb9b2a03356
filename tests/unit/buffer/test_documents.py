"""Flat rows of several documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.buffer.rows import documents as documents_module
from rehearsal_plugin.buffer.rows.documents import DocumentForm
from rehearsal_plugin.buffer.rows.flat_rows import has_documents, lengths_of, without_filling
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError, ConfigError

LONGEST = 32


def flat_row(lengths: list[int], seed: int = 0, **extra: Any) -> dict[str, Any]:
    """A flat row with all leaves that collators give, and the domain of each document."""
    total, rng = sum(lengths), np.random.default_rng(seed)
    ends = torch.tensor(lengths).cumsum(0)
    boundaries = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int()
    return {
        "input_ids": torch.from_numpy(rng.integers(0, 99, (1, total))),
        "labels": torch.from_numpy(rng.integers(0, 99, (1, total))),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries.clone(),
        "max_length_q": max(lengths),
        "max_length_k": torch.tensor(max(lengths)),
        "domain": torch.arange(len(lengths)) % 3,
        **extra,
    }


def documents(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    """Domain, tokens and labels of each document."""
    ends = batch["cu_seq_lens_q"].tolist()
    tokens, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return [
        (domain, *tokens[start:end], *labels[start:end])
        for domain, start, end in zip(batch["domain"].tolist(), ends[:-1], ends[1:], strict=True)
    ]


def joined(first: dict[str, Any], second: dict[str, Any], displaced: int = 0) -> dict[str, Any]:
    """The first flat row with the documents of the second behind it."""
    form = DocumentForm(LONGEST)
    layout, samples = form.infer(flatten(second), None)
    replayed = {name: samples[name] for name in layout.names}
    result: dict[str, Any] = form.join(layout, flatten(first), replayed, displaced).rebuild()
    return result


@pytest.mark.parametrize("displaced", [0, 1, 3])
def test_documents_are_appended_and_every_leaf_tells_where_they_lie(displaced: int) -> None:
    first, second = flat_row([3, 1, 4]), flat_row([5, 2], seed=1)
    result = joined(first, second, displaced)
    assert documents(result) == documents(first)[: 3 - displaced] + documents(second)
    lengths = [*[3, 1, 4][: 3 - displaced], 5, 2]
    assert torch.equal(result["position_ids"], torch.cat([torch.arange(length) for length in lengths])[None])
    assert result["seq_idx"].tolist() == [[i for i, length in enumerate(lengths) for _ in range(length)]]
    assert result["cu_seq_lens_k"].tolist() == [0, *np.cumsum(lengths)]
    assert (result["max_length_q"], result["max_length_k"].item()) == (max(lengths), max(lengths))
    for name, leaf in first.items():
        assert type(result[name]) is type(leaf)
        assert not isinstance(leaf, Tensor) or leaf.dtype == result[name].dtype


def test_a_document_of_any_tokens_comes_back_whole() -> None:
    """Also where it ends with what padding looks like elsewhere: zeros and labels of -100."""
    first, second = flat_row([2]), flat_row([4, 3], seed=1)
    second["input_ids"][0, 2:] = 0
    second["labels"][0, 1:] = -100
    second["labels"][0, 4] = 5
    assert documents(joined(first, second)) == documents(first) + documents(second)


@pytest.mark.parametrize("pieces", [[4], [1, 1, 1, 1]])  # axolotl counts on from 0, TRL gives each token a 0
@pytest.mark.parametrize("displaced", [0, 1])
@pytest.mark.parametrize("lengths", [[3, 2], [5]])
def test_what_fills_a_flat_row_up_is_no_sample_and_makes_room(
    pieces: list[int], displaced: int, lengths: list[int]
) -> None:
    first, second = filled(lengths, pieces, seed=0), filled([4, 3], pieces, seed=1)
    plain = [flat_row(lengths), flat_row([4, 3], seed=1)]
    result, wanted = joined(first, second, displaced), joined(plain[0], plain[1], displaced)
    for name, leaf in result.items():
        assert torch.equal(torch.as_tensor(leaf), torch.as_tensor(wanted[name])), name


def filled(lengths: list[int], pieces: list[int], seed: int) -> dict[str, Any]:
    """`flat_row` filled up with zeros that have no label."""
    row = flat_row([*lengths, *pieces], seed)
    plain = flat_row(lengths, seed)
    for name, filling in {"input_ids": 0, "labels": -100}.items():
        more = torch.full((1, sum(pieces)), filling)
        row[name] = torch.cat((plain[name], more), 1)
    return {**row, "domain": plain["domain"]}


def test_a_flat_row_without_any_label_is_all_documents() -> None:
    row = flat_row([2, 3], input_ids=torch.zeros(1, 5, dtype=torch.int64), labels=torch.full((1, 5), -100))
    assert without_filling(flatten(row), lengths_of(flatten(row))).tolist() == [2, 3]


@pytest.mark.parametrize("left_out", [("position_ids",), ("cu_seq_lens_q", "cu_seq_lens_k"), ("seq_idx", "domain")])
def test_either_positions_or_boundaries_are_enough(left_out: tuple[str, ...]) -> None:
    rows = [flat_row([3, 1]), flat_row([2, 5], seed=1)]
    less = [{name: leaf for name, leaf in row.items() if name not in left_out} for row in rows]
    assert has_documents(flatten(less[0]))
    whole, result = joined(rows[0], rows[1]), joined(less[0], less[1])
    for name, leaf in result.items():
        assert torch.equal(torch.as_tensor(leaf), torch.as_tensor(whole[name])), name


def test_tokens_may_have_several_numbers_each() -> None:
    first, second = (flat_row([2, 3], seed, scores=torch.randn(1, 5, 2)) for seed in (0, 1))
    assert torch.equal(joined(first, second)["scores"], torch.cat((first["scores"], second["scores"]), 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 1, 2]])}, "do not tell alike"),
        ({"position_ids": torch.tensor([[1, 2, 0, 1, 2]])}, "do not tell alike"),
        ({"cu_seq_lens_k": torch.tensor([0, 3, 5])}, "do not tell alike"),
        ({"extra": torch.zeros(4, 2)}, "'extra' has the shape \\(4, 2\\) beside a flat row of 5 tokens"),
        ({"input_ids": torch.tensor([[4, -1, 2, 3, 4]])}, "'input_ids' has tokens of -1"),
        ({"input_ids": torch.zeros(1, 5)}, "needs token ids"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BatchError, match=words):
        DocumentForm(LONGEST).infer(flatten(flat_row([2, 3], **change)), None)


@pytest.mark.parametrize(
    "leaf", [[1, 2], ["law", "code"], (1.0, 2.0), [0] * 5, np.arange(2), np.zeros((1, 5)), np.zeros((2, 3))]
)
def test_what_is_no_tensor_and_may_belong_to_documents_is_refused_by_name(leaf: Any) -> None:
    """It would stay as it is when documents are added, without a word."""
    form = DocumentForm(LONGEST)
    with pytest.raises(BatchError, match=r"'extra' is a .* beside a flat row of 5 tokens in 2 documents"):
        form.infer(flatten(flat_row([2, 3], extra=leaf)), None)
    layout, _ = form.infer(flatten(flat_row([2, 3])), None)
    with pytest.raises(BatchError, match="'extra' is a "):
        form.samples(flatten(flat_row([2, 3], extra=leaf)), layout)


def test_values_without_entries_pass_beside_documents() -> None:
    layout, _ = DocumentForm(LONGEST).infer(
        flatten(flat_row([2, 3], use_cache=False, name="step", table=[1, 2, 3])), None
    )
    assert {"use_cache", "name", "table"} <= set(layout.passing)


def test_a_document_too_long_is_refused_with_the_cure() -> None:
    with pytest.raises(BatchError, match=r"33 tokens, and 32 is the most .* raise rehearsal\.padding\.length"):
        DocumentForm(LONGEST).infer(flatten(flat_row([2, 33])), None)


def test_later_batches_need_the_same_fields() -> None:
    form = DocumentForm(LONGEST)
    layout, _ = form.infer(flatten(flat_row([2, 3])), None)
    other = {name: leaf for name, leaf in flat_row([2, 3]).items() if name != "labels"}
    with pytest.raises(BatchError, match="every batch needs the same fields"):
        form.samples(flatten(other), layout)


@pytest.mark.parametrize("ratio_in", ["rows", "tokens"])
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_the_lengths_of_a_batch_are_told_once(mode: str, ratio_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"mode": mode, "ratio_in": ratio_in, "ratio": 0.3}
    calls = []

    def counted(batch: Any) -> Tensor:
        calls.append(batch)
        return lengths_of(batch)

    with Rehearsal({"buffer": {"capacity": 30}, **section}, LocalTransport()) as rehearsal:
        for step in range(12):
            if step == 1:  # the first batch is asked what it is, too
                monkeypatch.setattr(documents_module, "lengths_of", counted)
            rehearsal.update(flat_row([3, 4, 5], seed=step))
        assert rehearsal.metrics()["rows_replayed"] > 3
    assert len(calls) == 11


def plain_rows(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """A batch of a job that packs nothing, with positions and without a mask."""
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 99, (rows, length)))
    return {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(length).repeat(rows, 1)}


@pytest.mark.parametrize("amount", [{"representatives": 1}, {"ratio": 0.3, "mode": "replace"}])
@pytest.mark.parametrize("sizes", [[1, 8, 8, 1, 4], [1, 1, 1, 2, 1]])
def test_a_first_batch_of_one_row_may_be_followed_by_any_number(sizes: list[int], amount: dict[str, Any]) -> None:
    known: set[tuple[int, ...]] = set()
    with Rehearsal(amount, LocalTransport()) as rehearsal:
        for step in range(30):
            batch = plain_rows(sizes[step % 5], 6, step)
            known.update(map(tuple, batch["input_ids"].tolist()))
            seen = rehearsal.update(batch)
            assert len(seen["input_ids"]) == len(batch["input_ids"]) + ("mode" not in amount and step > 1)
            assert torch.equal(seen["position_ids"], torch.arange(6).repeat(len(seen["input_ids"]), 1))
            assert torch.equal(seen["labels"], seen["input_ids"])
            assert set(map(tuple, seen["input_ids"].tolist())) <= known
        assert rehearsal.metrics()["rows_replayed"] > 4


def test_a_first_row_of_one_document_may_be_followed_by_any_flat_row() -> None:
    with Rehearsal({"representatives": 1}, LocalTransport()) as rehearsal:
        for step, lengths in enumerate([[6], [3, 4], [6], [2], [5, 5, 5], [6], [6]]):
            row = flat_row(lengths, seed=step)
            seen = rehearsal.update({name: row[name] for name in ("input_ids", "labels", "position_ids")})
            assert int((seen["position_ids"] == 0).sum()) == len(lengths) + (step > 1)


def test_rows_of_another_length_than_stored_ones_are_refused_by_the_cure() -> None:
    with Rehearsal({"representatives": 1}, LocalTransport()) as rehearsal:
        for step in range(3):
            rehearsal.update(plain_rows(1, 6, step))
        with pytest.raises(BatchError, match=r"one flat row alone: .* set rehearsal\.packing to 'rows'"):
            rehearsal.update(plain_rows(4, 7, 3))


def run(section: dict[str, Any], steps: int = 40) -> tuple[Rehearsal, list[dict[str, Any]], set[tuple[int, ...]]]:
    rng = np.random.default_rng(0)
    rehearsal = Rehearsal({"buffer": {"capacity": 30}, **section}, LocalTransport())
    seen: list[dict[str, Any]] = []
    known: set[tuple[int, ...]] = set()
    for step in range(steps):
        batch = flat_row(rng.integers(1, 12, rng.integers(1, 6)).tolist(), seed=step)
        known.update(documents(batch))
        seen.append(rehearsal.update(batch))
    return rehearsal, seen, known


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("ratio_in", ["rows", "tokens"])
def test_a_loop_replays_whole_documents_at_the_ratio(mode: str, ratio_in: str) -> None:
    rehearsal, seen, known = run({"ratio": 0.3, "mode": mode, "ratio_in": ratio_in}, steps=300)
    assert {document for batch in seen for document in documents(batch)} <= known
    metrics = rehearsal.metrics()
    rehearsal.close()
    rows = [sum(len(batch["domain"]) for batch in seen), metrics["rows_replayed"]]
    tokens = [metrics["tokens_new"], metrics["tokens_replayed"]]
    assert sum(tokens) == sum(batch["input_ids"].shape[1] for batch in seen)
    share = rows[1] / rows[0] if ratio_in == "rows" else tokens[1] / sum(tokens)
    assert abs(share - 0.3) < 0.02


def test_documents_have_partitions() -> None:
    section = {"buffer": {"capacity": 30, "partition_by": "domain", "policy": "balanced"}, "representatives": 2}
    rehearsal, seen, _ = run({**section, "sampling": {"weights": {"1": 1}}})
    with rehearsal:
        assert rehearsal.metrics()["rows_replayed/1"] > 0
        assert {int(batch["domain"][-1]) for batch in seen[5:]} == {1}


def test_a_checkpoint_of_documents_goes_on(tmp_path: Any) -> None:
    rehearsal, _, _ = run({"ratio": 0.3}, steps=20)
    with rehearsal:
        rehearsal.save(tmp_path)
        expected = [rehearsal.update(flat_row([4, 60], seed=step))["input_ids"] for step in range(5)]
    with Rehearsal({"buffer": {"capacity": 30}, "ratio": 0.3}, LocalTransport()) as other:
        other.load(tmp_path)
        again = [other.update(flat_row([4, 60], seed=step))["input_ids"] for step in range(5)]
    assert all(torch.equal(one, two) for one, two in zip(again, expected, strict=True))


@pytest.mark.parametrize(
    "section",
    [
        {"strategy": {"name": "er-ace"}},
        {"strategy": {"name": "der"}},
        {"buffer": {"capacity": 9, "score_by": "domain", "policy": "score"}},
    ],
)
def test_what_needs_outputs_by_document_is_refused_at_the_first_batch(section: dict[str, Any]) -> None:
    with (
        Rehearsal(section, LocalTransport()) as rehearsal,
        pytest.raises(ConfigError, match="one flat row of documents"),
    ):
        rehearsal.augment(flat_row([2, 3]))


def test_rows_of_documents_stay_rows_where_the_section_says_so() -> None:
    row = {name: leaf for name, leaf in flat_row([3, 2]).items() if name in ("input_ids", "labels", "position_ids")}
    with Rehearsal({"packing": "rows", "representatives": 1}, LocalTransport()) as rehearsal:
        for _ in range(6):
            batch = rehearsal.update(row)
        assert torch.equal(batch["input_ids"], row["input_ids"].repeat(2, 1))
    with (
        Rehearsal({"packing": "rows"}, LocalTransport()) as rehearsal,
        pytest.raises(BatchError, match="cu_seq_lens_k"),
    ):
        rehearsal.update(flat_row([3, 2]))
