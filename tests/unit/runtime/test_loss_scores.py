"""Rows judged by a number: draws by score, losses that are recorded and refreshed; alone and on real gloo ranks."""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.stats import chisquare
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.scores import TICKETS_PER_UNIT
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.config.names import ROW_LOSS
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ConfigError, ExchangeError
from tests.helpers.chance import SIGNIFICANCE
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, ids_of, new_batch, rank_of, same

SIZE, WANTED, STEPS = 6, 4, 25
EXCHANGE = {"timeout_s": 20}


def scored(ids: Sequence[int], scores: Sequence[float]) -> Batch:
    return {"id": torch.tensor(ids, dtype=torch.int64), "score": torch.tensor(scores, dtype=torch.float32)}


# --- draws -----------------------------------------------------------------------------------------------------------

HELD = [[1.0, 3.0, 0.5, 0.0, 2.0], [8.0] + [0.25] * 10, [1.5, 4.0]]
"""Scores of the rows that each rank holds; a score of 0 is worth one ticket."""


def by_score(**keys: Any) -> dict[str, Any]:
    buffer = {"capacity": 40, "policy": "fifo", "score_by": "score", **keys.pop("buffer", {})}
    return {
        "buffer": buffer,
        "representatives": 5,
        "sampling": {"weights": "score"},
        "exchange": EXCHANGE,
        **keys,
    }


def replayed(scores: Sequence[float], steps: int, rank: int = 0, **keys: Any) -> list[int]:
    """Rows replayed by a rank whose buffer always holds the same ones."""
    size, first = len(scores), 100 * rank
    batch = scored(range(first, first + size), scores)
    section = by_score(buffer={"capacity": size}, **keys)
    with Rehearsal(section, None if dist.is_initialized() else LocalTransport()) as rehearsal:
        return [row for _ in range(steps) for row in ids_of(rehearsal.update(batch), size)]


def follow(rows: Sequence[int], scores: dict[int, float]) -> float:
    """The p-value of rows that should come in proportion to their scores."""
    counts, total = Counter(rows), sum(scores.values())
    assert counts.keys() <= scores.keys()
    expected = [len(rows) * score / total for score in scores.values()]
    return float(chisquare([counts[row] for row in scores], expected).pvalue)


def worth(scores: Sequence[float]) -> list[float]:
    return [max(score, 1 / TICKETS_PER_UNIT) for score in scores]


def test_rows_are_replayed_in_proportion_to_their_scores() -> None:
    scores = [1.0, 3.0, 0.5, 0.25, 2.0, 0.125, 5.0]
    rows = replayed(scores, 400, representatives=20)
    assert len(rows) == 398 * 20
    assert follow(rows, dict(enumerate(scores))) > SIGNIFICANCE


def test_rows_without_a_score_worth_mentioning_are_replayed_alike() -> None:
    """Each holds one ticket, and tickets are drawn without replacement."""
    rows = replayed([0.0, -1.0, float("nan"), -float("inf"), 1e-9, -0.0], 500)
    assert len(rows) == 498 * 5
    assert follow(rows, dict.fromkeys(range(6), 1.0)) > SIGNIFICANCE


def test_a_row_may_come_several_times_in_one_draw() -> None:
    assert Counter(replayed([1000.0, 0.0], 3)) == {0: 5}


def test_a_request_is_met_by_fewer_rows_than_were_asked_for() -> None:
    assert len(replayed([1.0], 10)) == 8 * 5


def test_fewer_tickets_than_rows_asked_for_are_all_of_them() -> None:
    assert sorted(replayed([0.0, 0.0, 0.0], 3)) == [0, 1, 2]


def shared(launch: str) -> list[int]:
    """Rows replayed on this rank."""
    rank = dist.get_rank()
    return replayed(HELD[rank], 100, rank, representatives=20, exchange={"launch": launch, **EXCHANGE})


def check_shares(replayed_by_rank: Sequence[Sequence[int]]) -> None:
    ranks = range(len(replayed_by_rank))
    scores = {100 * rank + place: score for rank in ranks for place, score in enumerate(worth(HELD[rank]))}
    rare = {row for row, score in scores.items() if score < 0.01}
    common = {row: score for row, score in scores.items() if row not in rare}
    for rows in replayed_by_rank:
        assert len(rows) == 98 * 20
        assert follow([row for row in rows if row not in rare], common) > SIGNIFICANCE
        assert sum(row in rare for row in rows) < 10


def other_weights(weights: Sequence[str]) -> tuple[str, str]:
    """Kind and message of the error, where every rank has its own weights."""
    rank = dist.get_rank()
    section = by_score(
        buffer={"policy": "score", "partition_by": "id"},
        sampling={"weights": weights[rank]},
        exchange={"timeout_s": 5},
    )
    rehearsal = Rehearsal(section)
    try:
        for _ in range(10):
            rehearsal.update(scored(range(4), [1.0] * 4))
    except ExchangeError as error:
        return type(error).__name__, str(error)
    finally:
        rehearsal.close()
    return "", ""


LAUNCHES = ["thread", "inline"]


def on_two_ranks() -> bytes:
    """By value: tensors that go through a pipe as they are need a sender that stays alive."""
    results = {
        "draws": [shared(launch) for launch in LAUNCHES],
        "losses": [
            learn(name="der++", sampling={"weights": "score"}, exchange={"launch": launch, **EXCHANGE})
            for launch in LAUNCHES
        ],
        "other weights": other_weights(["score", "uniform"]),
    }
    return pickle.dumps(results)


@functools.cache
def two() -> list[dict[str, Any]]:
    """One job for all facts about two ranks."""
    return [pickle.loads(result) for result in run_ranks(on_two_ranks, 2, timeout_s=90)]


def test_two_ranks_are_served_with_the_rows_of_both_in_proportion_to_their_scores() -> None:
    check_shares([rank["draws"][0] for rank in two()])


def test_three_ranks_are_served_with_the_rows_of_all_in_proportion_to_their_scores() -> None:
    check_shares(run_ranks(shared, 3, "auto", timeout_s=90))


def test_threads_change_no_draw_by_score() -> None:
    for threaded, inline in (rank["draws"] for rank in two()):
        assert threaded == inline


def refused(outcomes: Sequence[tuple[str, str]]) -> bool:
    return all(kind == ExchangeError.__name__ and "sampling.weights" in message for kind, message in outcomes)


def test_a_rank_with_other_weights_is_refused() -> None:
    assert refused([rank["other weights"] for rank in two()])


def test_a_rank_with_balanced_weights_among_others_is_refused() -> None:
    assert refused(run_ranks(other_weights, 2, ["balanced", "score"], timeout_s=40))


# --- one buffer ------------------------------------------------------------------------------------------------------


def make(capacity: int = 8, **keys: Any) -> RehearsalBuffer:
    config = BufferConfig.model_validate({"capacity": capacity, "policy": "score", "score_by": "score", **keys})
    return RehearsalBuffer(config, RowLayout.infer(scored([0], [0.0])))


def contents(buffer: RehearsalBuffer) -> list[tuple[int, float]]:
    """Id and score of each stored row, by slot."""
    rows = torch.empty((len(buffer), buffer.layout.row_bytes), dtype=torch.uint8)
    buffer.read(np.arange(len(buffer)), rows)
    batch = buffer.layout.unpack(rows)
    return list(zip(batch["id"].tolist(), batch["score"].tolist(), strict=True))


def index(buffer: RehearsalBuffer) -> list[float]:
    """The score by which each stored row is judged, by slot."""
    assert buffer.slot_index.scores is not None
    scores: list[float] = buffer.slot_index.scores.stored[: len(buffer), 0].tolist()
    return scores


def weights(buffer: RehearsalBuffer) -> list[int]:
    """Tickets of each stored row, by slot."""
    index = buffer.slot_index
    tickets: list[int] = np.bincount(index.holders(np.arange(index.tickets)), minlength=len(buffer)).tolist()
    return tickets


def stream(buffer: RehearsalBuffer, start: int, batches: int) -> None:
    for first in range(start, start + 5 * batches, 5):
        buffer.offer(scored(range(first, first + 5), np.abs(np.sin(range(first, first + 5))).tolist()))


@pytest.mark.parametrize("policy", ["score", "reservoir", "fifo", "random_replace"])
def test_index_and_rows_hold_the_same_scores(policy: str) -> None:
    buffer = make(policy=policy)
    for start in range(0, 200, 5):
        stream(buffer, start, 1)
        assert index(buffer) == [score for _, score in contents(buffer)]
        assert weights(buffer) == [max(1, int(score * TICKETS_PER_UNIT)) for score in index(buffer)]


def test_without_a_score_nobody_holds_a_ticket() -> None:
    config = BufferConfig(capacity=4)
    buffer = RehearsalBuffer(config, RowLayout.infer(scored([0], [0.0])))
    buffer.offer(scored([1, 2], [3.0, 4.0]))
    assert buffer.slot_index.tickets == 0


def test_new_scores_count_from_the_next_admission_on() -> None:
    buffer = make()
    buffer.offer(scored(range(4), [1.0, 2.0, 3.0, 4.0]))
    before = weights(buffer)
    buffer.update_fields(np.array([1, 3, 1]), {"score": torch.tensor([7.0, 0.0, 8.0])})
    assert [score for _, score in contents(buffer)] == [1, 8, 3, 0], "the rows themselves are new at once"
    assert weights(buffer) == before
    buffer.update_fields(np.array([2]), {"score": torch.tensor([6.0])})
    buffer.offer(scored([], []))
    assert index(buffer) == [1, 8, 6, 0]
    assert weights(buffer) == [TICKETS_PER_UNIT, 8 * TICKETS_PER_UNIT, 6 * TICKETS_PER_UNIT, 1]


def test_a_new_score_decides_who_leaves() -> None:
    buffer = make(3)
    buffer.offer(scored(range(3), [5.0, 6.0, 7.0]))
    buffer.update_fields(np.arange(3), {"score": torch.tensor([9.0, 0.0, 9.0])})
    while all(row < 3 for row, _ in contents(buffer)):
        buffer.offer(scored([3], [9.0]))
    assert [row for row, _ in contents(buffer)] == [0, 3, 2]


def test_other_fields_leave_scores_alone() -> None:
    buffer = make()
    buffer.offer(scored(range(4), [1.0, 2.0, 3.0, 4.0]))
    buffer.update_fields(np.array([1]), {"id": torch.tensor([77])})
    buffer.offer(scored([], []))
    assert index(buffer) == [1, 2, 3, 4]
    assert contents(buffer)[1] == (77, 2.0)


def test_a_rollback_brings_back_scores_and_tickets() -> None:
    buffer = make()
    stream(buffer, 0, 6)
    buffer.update_fields(np.array([0]), {"score": torch.tensor([0.75])})
    buffer.commit()
    kept = (contents(buffer), index(buffer), weights(buffer))
    assert kept[1][0] == 0.75, "a commit takes scores that wait with it"
    for _ in range(2):
        stream(buffer, 1000, 40)
        buffer.update_fields(np.arange(8), {"score": torch.arange(8) + 10.0})
        stream(buffer, 2000, 1)
        assert (contents(buffer), index(buffer), weights(buffer)) != kept
        buffer.rollback()
        assert (contents(buffer), index(buffer), weights(buffer)) == kept


def test_a_rollback_drops_scores_that_did_not_count_yet() -> None:
    buffer = make()
    stream(buffer, 0, 6)
    buffer.commit()
    kept = index(buffer)
    buffer.update_fields(np.arange(8), {"score": torch.arange(8) + 10.0})
    buffer.rollback()
    buffer.offer(scored([], []))
    assert index(buffer) == kept == [score for _, score in contents(buffer)]


def test_a_rollback_without_a_commit_leaves_no_ticket() -> None:
    buffer = make()
    stream(buffer, 0, 6)
    buffer.rollback()
    assert (len(buffer), buffer.slot_index.tickets) == (0, 0)


@pytest.mark.parametrize("policy", ["herding", "closest_to_centre"])
def test_a_rollback_brings_back_the_means_of_features(policy: str) -> None:
    buffer = make(2, policy=policy)
    buffer.offer(scored(range(3), [0.0, 4.0, 5.0]))
    buffer.commit()
    kept = contents(buffer)
    buffer.offer(scored(range(3, 40), [100.0] * 37))
    assert contents(buffer) != kept
    buffer.rollback()
    assert contents(buffer) == kept
    buffer.offer(scored([50], [3.0]))  # the mean is 3
    assert 50 in {row for row, _ in contents(buffer)}


UNSUITABLE = {
    "integers": torch.zeros(2, dtype=torch.int64),
    "bool": torch.zeros(2, dtype=torch.bool),
    "complex": torch.zeros(2, dtype=torch.complex64),
    "several numbers": torch.zeros(2, 3),
    "no number": torch.zeros(2, 0),
}


@pytest.mark.parametrize("values", UNSUITABLE.values(), ids=list(UNSUITABLE))
def test_a_field_that_cannot_be_a_score_is_refused_by_name(values: Tensor) -> None:
    config = BufferConfig(capacity=4, policy="score", score_by="score")
    with pytest.raises(BatchError, match=r"rehearsal\.buffer\.score_by names 'score'"):
        RehearsalBuffer(config, RowLayout.infer({"score": values}))


def test_a_score_that_is_no_field_is_refused_with_the_fields_there_are() -> None:
    config = BufferConfig(capacity=4, policy="score", score_by="doubt")
    with pytest.raises(BatchError, match=r"'doubt'.*\['id', 'score'\]"):
        RehearsalBuffer(config, RowLayout.infer(scored([0], [0.0])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)], ids=str)
def test_any_floating_point_field_of_one_number_can_be_the_score(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    config = BufferConfig(capacity=4, policy="score", score_by="score")
    batch = {"score": torch.tensor([0.5, -2.0, 4.0, float("nan")], dtype=dtype).view(shape)}
    buffer = RehearsalBuffer(config, RowLayout.infer(batch))
    buffer.offer(batch)
    assert index(buffer) == [0.5, -2, 4, 0]


# --- by loss ---------------------------------------------------------------------------------------------------------


def by_loss(name: str = "er", **keys: Any) -> dict[str, Any]:
    buffer = {"capacity": 20, "policy": "score", "score_by": "loss", **keys.pop("buffer", {})}
    strategy = {"name": name, **keys.pop("strategy", {})}
    return {"buffer": buffer, "representatives": WANTED, "exchange": EXCHANGE, "strategy": strategy, **keys}


def answers(batch: Batch, step: int) -> Tensor:
    """Scores for five classes, which follow from the row and the step."""
    ids = batch["id"].double()[:, None]
    return torch.sin(ids * torch.tensor([0.7, 1.1, 1.9, 2.3, 3.1]) + step).float().requires_grad_()


def entropy(scores: Sequence[float], label: int) -> float:
    """Cross-entropy, with none of what is tested."""
    row = np.array(scores, dtype=np.float64)
    return float(np.log(np.exp(row).sum()) - row[label])


def losses_of(batch: Batch, outputs: Tensor) -> dict[int, float]:
    rows = zip(batch["id"].tolist(), outputs.tolist(), batch["label"].tolist(), strict=True)
    return {row: entropy(scores, label) for row, scores, label in rows}


@dataclass
class Seen:
    """What one rank saw.

    Attributes:
        losses: For each step the loss of every row in it, by id.
        stored: In the end, for every stored row by id: the loss in its state, and the score it is judged by.
        batches: What the model saw.
    """

    losses: list[dict[int, float]] = field(default_factory=list)
    stored: dict[int, tuple[float, float]] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)


def stored_losses(rehearsal: Rehearsal) -> dict[int, tuple[float, float]]:
    """Waits for the step in flight."""
    rehearsal.commit()
    buffer = rehearsal.buffer
    assert buffer is not None
    rows = torch.empty((len(buffer), buffer.layout.row_bytes), dtype=torch.uint8)
    buffer.read(np.arange(len(buffer)), rows)
    ids, losses = buffer.layout.unpack(rows)["id"].tolist(), buffer.layout.unpack_state(rows)[ROW_LOSS].tolist()
    return dict(zip(ids, zip(losses, index(buffer), strict=True), strict=True))


def learn(steps: int = STEPS, **keys: Any) -> Seen:
    rank, seen = dist.get_rank() if dist.is_initialized() else 0, Seen()
    with Rehearsal(by_loss(**keys), None if dist.is_initialized() else LocalTransport()) as rehearsal:
        for step in range(steps):
            batch = rehearsal.augment(new_batch(rank, step, SIZE))
            outputs = answers(batch, step)
            torch.autograd.backward(rehearsal.loss(cross_entropy, outputs, batch["label"]))
            seen.losses.append(losses_of(batch, outputs))
            seen.batches.append(batch)
            rehearsal.step()
        seen.stored = stored_losses(rehearsal)
    return seen


def check_losses(found: Sequence[Seen]) -> int:
    """Every stored row has the loss of the last step that saw it; returns how many were last seen elsewhere."""
    elsewhere = 0
    for rank, one in enumerate(found):
        for row, (loss, score) in one.stored.items():
            seen = [
                (step, reader)
                for reader, each in enumerate(found)
                for step, rows in enumerate(each.losses)
                if row in rows
            ]
            last, reader = max(seen)
            assert loss == score == pytest.approx(found[reader].losses[last][row], rel=1e-5)
            elsewhere += reader != rank
    return elsewhere


@pytest.mark.parametrize("name", ["er", "er-ace", "der", "der++", "x-der", "topk"])
def test_a_stored_loss_is_the_rows_own_cross_entropy_when_it_was_last_seen(name: str) -> None:
    found = learn(name=name, strategy={"k": 2})
    assert len(found.stored) == 20
    check_losses([found])
    assert any(row not in found.losses[-1] for row in found.stored)


def test_a_row_that_was_never_replayed_has_the_loss_of_its_first_forward() -> None:
    found = learn(representatives=0, buffer={"capacity": 1000})
    assert len(found.stored) == STEPS * SIZE
    check_losses([found])


def test_losses_are_right_with_micro_batches_candidates_and_replacement() -> None:
    for keys in (
        {"candidates": 2},
        {"mode": "replace"},
        {"mode": "replace", "representatives": SIZE - 1},
        {"start_step": 9},
    ):
        check_losses([learn(**keys)])


def test_every_micro_batch_of_a_step_refreshes_its_own_rows() -> None:
    losses: dict[int, float] = {}
    with Rehearsal(by_loss(), LocalTransport()) as rehearsal:
        for number in range(3 * STEPS):
            batch = rehearsal.augment(new_batch(0, number, SIZE))
            outputs = answers(batch, number)
            rehearsal.loss(cross_entropy, outputs, batch["label"])
            losses.update(losses_of(batch, outputs))
            if number % 3 == 2:
                rehearsal.step()
        stored = stored_losses(rehearsal)
    assert stored == {row: (loss, loss) for row, (loss, _) in stored.items()}
    assert {row: loss for row, (loss, _) in stored.items()} == pytest.approx(
        {row: losses[row] for row in stored}, rel=1e-5
    )


def test_a_mean_over_tokens_is_taken_for_each_row_alone() -> None:
    """Tokens labelled -100 do not count, and a row without any that counts scores 0."""

    def criterion(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        return cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())

    labels = torch.tensor([[1, -100, 0, 2], [-100, -100, -100, 1], [-100] * 4, [2, 2, 2, 2]])
    logits = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))
    with Rehearsal(by_loss(representatives=0), LocalTransport()) as rehearsal:
        rehearsal.augment({"id": torch.arange(4), "labels": labels})
        rehearsal.loss(criterion, {"logits": logits, "loss": torch.tensor(1.0)}, labels)
        rehearsal.step()
        stored = stored_losses(rehearsal)
    tokens = [
        [entropy(scores, label) for scores, label in zip(*row, strict=True) if label >= 0]
        for row in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    for row in (0, 1, 3):
        assert stored[row] == pytest.approx((np.mean(tokens[row]),) * 2, rel=1e-5)
    assert np.isnan(stored[2][0])
    assert stored[2][1] == 0


def test_er_is_still_the_criterion_of_all_rows() -> None:
    with Rehearsal(by_loss(), LocalTransport()) as rehearsal:
        for step in range(10):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            outputs = answers(batch, step)
            loss = rehearsal.loss(cross_entropy, outputs, batch["label"])
            assert torch.equal(loss, cross_entropy(outputs, batch["label"]))
            rehearsal.step()


@pytest.mark.parametrize("draws", ["uniform", "score"])
def test_der_plus_plus_holds_rows_to_their_outputs_and_not_to_their_loss(draws: str) -> None:
    keys = by_loss("der++", strategy={"alpha": 0.3, "beta": 0.7}, sampling={"weights": draws})
    given: dict[int, Tensor] = {}
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        for step in range(12):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            outputs, ids = answers(batch, step), batch["id"].tolist()
            given.update(zip(ids[:SIZE], outputs.detach()[:SIZE], strict=True))
            expected = cross_entropy(outputs[:SIZE], batch["label"][:SIZE])
            if len(ids) > SIZE:
                first, second = slice(SIZE, SIZE + WANTED), slice(SIZE + WANTED, None)
                recorded = torch.stack([given[row] for row in ids[first]])
                expected = expected + 0.3 * (outputs[first] - recorded).square().mean()
                expected = expected + 0.7 * cross_entropy(outputs[second], batch["label"][second])
            torch.testing.assert_close(rehearsal.loss(cross_entropy, outputs, batch["label"]), expected)
            rehearsal.step()
    assert len(ids) == SIZE + 2 * WANTED


def test_rows_with_a_high_loss_are_replayed_most() -> None:
    """Half of the rows have a loss that rounds to nothing."""

    def loss(outputs: Tensor) -> Tensor:
        return outputs.mean()

    keys = by_loss(buffer={"capacity": 40, "policy": "reservoir"}, sampling={"weights": "score"})
    rows: list[int] = []
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        for step in range(40):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            rehearsal.loss(loss, (batch["id"] % 2).float())
            rows += ids_of(batch, SIZE)
            rehearsal.step()
    assert len(rows) > 100
    assert sum(row % 2 for row in rows) > 0.97 * len(rows)


def test_replayed_rows_get_their_new_loss_where_they_live() -> None:
    found = [rank["losses"][0] for rank in two()]
    assert check_losses(found) > 2
    for rank, one in enumerate(found):
        assert {rank_of(row) for row in one.stored} == {rank}
        assert {rank_of(row) for batch in one.batches for row in ids_of(batch, SIZE)} == {0, 1}


def test_threads_change_nothing_bit_for_bit() -> None:
    for threaded, inline in (rank["losses"] for rank in two()):
        assert threaded.stored == inline.stored
        assert all(same(a, b) for a, b in zip(threaded.batches, inline.batches, strict=True))


def test_a_rollback_brings_back_losses() -> None:
    with Rehearsal(by_loss(sampling={"weights": "score"}), LocalTransport()) as rehearsal:
        kept: dict[int, tuple[float, float]] = {}
        for step in range(30):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            rehearsal.loss(cross_entropy, answers(batch, step), batch["label"])
            rehearsal.step()
            if step == 14:
                kept = stored_losses(rehearsal)
        assert rehearsal.buffer is not None
        assert index(rehearsal.buffer) != [score for _, score in kept.values()]
        rehearsal.rollback()
        assert index(rehearsal.buffer) == [score for _, score in kept.values()]
        assert stored_losses(rehearsal) == kept


# --- what is refused -------------------------------------------------------------------------------------------------


def test_update_is_refused_where_losses_are_recorded() -> None:
    with (
        Rehearsal(by_loss(), LocalTransport()) as rehearsal,
        pytest.raises(ConfigError, match=r"score_by 'loss'.*augment\(batch\), loss\(criterion, outputs, \*targets\)"),
    ):
        rehearsal.update(new_batch(0, 0, SIZE))


@pytest.mark.parametrize("name", ["er", "der", "topk"])
@pytest.mark.parametrize("first", [True, False])
def test_a_models_own_loss_is_refused_without_labels(name: str, first: bool) -> None:
    with Rehearsal(by_loss(name, strategy={"k": 2}), LocalTransport()) as rehearsal:
        if not first:
            go_on(rehearsal, 4)
        batch = rehearsal.augment(new_batch(0, 4, SIZE))
        outputs = {"loss": torch.tensor(1.0), "logits": answers(batch, 4)}
        with pytest.raises(BatchError, match=r"rehearsal\.buffer\.score_by 'loss'.*rehearsal\.loss\(criterion"):
            rehearsal.complete(outputs)


def test_outputs_alone_are_refused() -> None:
    with Rehearsal(by_loss("der"), LocalTransport()) as rehearsal:
        batch = rehearsal.augment(new_batch(0, 0, SIZE))
        with pytest.raises(ConfigError, match=r"rehearsal\.buffer\.score_by is 'loss'"):
            rehearsal.record(answers(batch, 0))


def by_mask(outputs: Tensor, label: Tensor) -> Tensor:
    return cross_entropy(outputs[label > 0], label[label > 0])


def by_item(outputs: Tensor, label: Tensor) -> Tensor:
    return cross_entropy(outputs, label) * (2.0 if label.max().item() else 1.0)


def by_branch(outputs: Tensor, label: Tensor) -> Tensor:
    return cross_entropy(outputs, label) if label.max() > 0 else outputs.sum()


@pytest.mark.parametrize("criterion", [by_mask, by_item, by_branch])
def test_a_criterion_that_cannot_be_mapped_over_rows_is_refused(criterion: Callable[..., Tensor]) -> None:
    with Rehearsal(by_loss(), LocalTransport()) as rehearsal:
        batch = rehearsal.augment(new_batch(0, 0, SIZE))
        with pytest.raises(BatchError, match=r"rehearsal\.buffer\.score_by is 'loss'.*torch\.func\.vmap"):
            rehearsal.loss(criterion, answers(batch, 0), batch["label"])
        rehearsal.loss(cross_entropy, answers(batch, 0), batch["label"])
        rehearsal.step()


def go_on(rehearsal: Rehearsal, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        batch = rehearsal.augment(new_batch(0, step, SIZE))
        outputs = answers(batch, step)
        named = {"logits": outputs} if rehearsal.config.strategy.name != "er" else outputs
        rehearsal.loss(lambda given, label, to=outputs: cross_entropy(rows_of(given), label), named, batch["label"])
        rehearsal.step()


def rows_of(outputs: Any) -> Tensor:
    scores: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs
    return scores


@pytest.mark.parametrize("call", ["step", "augment"])
def test_a_loss_that_was_not_asked_for_is_missed(call: str) -> None:
    with Rehearsal(by_loss(), LocalTransport()) as rehearsal:
        go_on(rehearsal, 4)
        rehearsal.augment(new_batch(0, 4, SIZE))
        with pytest.raises(BatchError, match=r"score_by 'loss'.*loss\(criterion, outputs, \*targets\).*drop\(\)"):
            rehearsal.step() if call == "step" else rehearsal.augment(new_batch(0, 5, SIZE))


@pytest.mark.parametrize("failing", [0, 7])
def test_a_loop_goes_on_after_a_forward_that_failed(failing: int) -> None:
    with Rehearsal(by_loss(buffer={"capacity": 1000}), LocalTransport()) as rehearsal:
        go_on(rehearsal, failing)
        rehearsal.augment(new_batch(0, failing, SIZE))
        rehearsal.drop()
        go_on(rehearsal, 10 - failing, start=failing + 1)
        stored = stored_losses(rehearsal)
    assert {row // 100 for row in stored} == set(range(11)) - {failing}, "the rows of a dropped batch are not stored"


def test_dropping_nothing_changes_nothing() -> None:
    with Rehearsal(by_loss(buffer={"capacity": 1000}), LocalTransport()) as rehearsal:
        rehearsal.drop()
        go_on(rehearsal, 5)
        rehearsal.drop()
        assert len(stored_losses(rehearsal)) == 5 * SIZE
