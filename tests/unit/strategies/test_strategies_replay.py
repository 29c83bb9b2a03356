"""What comes back with a replayed row: strategies through `Rehearsal`, alone and on 2 real gloo ranks."""

from __future__ import annotations

import functools
import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import comb
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.strategies import Part, Strategy, register
from tests.helpers.chance import SIGNIFICANCE, equally_included, equally_likely
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, intact, new_batch, rank_of, same, step_of

SIZE, WANTED, STEPS = 6, 4, 25
EXCHANGE = {"timeout_s": 20}


def section(name: str = "der", **keys: Any) -> dict[str, Any]:
    strategy = {"name": name, **keys.pop("strategy", {})}
    amount = {} if "ratio" in keys else {"representatives": WANTED}
    return {"buffer": {"capacity": 40}, "exchange": EXCHANGE, "strategy": strategy, **amount, **keys}


class Model(nn.Module):
    """Scores for the classes of a row; they change with every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear((x % 97).float() / 97)
        return scores


def loss_of(outputs: Any, label: Tensor, ids: Tensor) -> Tensor:
    scores = outputs if isinstance(outputs, Tensor) else outputs["scores"]
    return cross_entropy(scores, label)


@dataclass
class Found:
    """What one rank saw.

    Attributes:
        given: The model's outputs for each new row, by the row's id.
        draws: For each micro-batch the ids and the states of each draw.
        batches: What the model saw in each micro-batch.
        whole: Whether parts were always the micro-batch itself, cut at the right places.
        losses: Of each micro-batch.
    """

    given: dict[int, Tensor] = field(default_factory=dict)
    draws: list[list[tuple[list[int], dict[str, Tensor]]]] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    whole: bool = True
    losses: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def replayed(self) -> list[tuple[int, Tensor]]:
        """Every replayed row with its state, where that is one tensor."""
        return [
            (row, value)
            for draws in self.draws
            for ids, state in draws
            for row, value in zip(ids, *state.values(), strict=True)
        ]


def spy(strategy: Strategy) -> list[list[Part]]:
    """The parts that a strategy is given from now on."""
    calls: list[list[Part]] = []
    original = strategy.loss

    def loss(new: Part, replayed: Sequence[Part]) -> Tensor:
        calls.append([new, *replayed])
        return original(new, replayed)

    strategy.loss = loss  # type: ignore[method-assign]
    return calls


def train(
    *,
    steps: int = STEPS,
    passes: int = 1,
    model: Callable[[Tensor], Any] | None = None,
    transform: Callable[[Any], Any] | None = None,
    **keys: Any,
) -> Found:
    rank = dist.get_rank() if dist.is_initialized() else 0
    module, found = Model(), Found()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with Rehearsal(section(**keys), transform=transform) as rehearsal:
        calls = spy(rehearsal.strategy)
        for number in range(steps * passes):
            batch = rehearsal.augment(new_batch(rank, number, SIZE))
            outputs = (model or module)(batch["x"])
            loss = rehearsal.loss(loss_of, outputs, batch["label"], batch["id"])
            torch.autograd.backward(loss)
            note(found, batch, outputs, calls[-1], number)
            found.losses.append(loss.item())
            if number % passes == passes - 1:
                optimizer.step()
                optimizer.zero_grad()
                rehearsal.step()
    found.metrics = rehearsal.metrics()
    return found


def note(found: Found, batch: Batch, outputs: Any, parts: list[Part], number: int) -> None:
    ids = batch["id"].tolist()
    new = sum(step_of(row) == number for row in ids)
    if isinstance(outputs, Tensor):
        found.given.update(zip(ids[:new], outputs.detach().clone(), strict=False))
        found.whole &= torch.equal(torch.cat([part.outputs for part in parts]), outputs)
    found.whole &= torch.equal(torch.cat([part.targets[1] for part in parts]), batch["id"])
    found.whole &= parts[0].size == new
    found.draws.append([(part.targets[1].tolist(), dict(part.state)) for part in parts[1:]])
    found.batches.append(batch)


def owners(found: Sequence[Found]) -> dict[int, Tensor]:
    """What every row of every rank was answered with when it was new."""
    return {row: answer for one in found for row, answer in one.given.items()}


def check_states(found: Sequence[Found]) -> None:
    given = owners(found)
    for one in found:
        assert one.whole, "parts are not the micro-batch"
        assert one.replayed, "nothing was replayed"
        assert all(torch.equal(state, given[row]) for row, state in one.replayed)


# --- the state of a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["der", "der++"])
def test_a_replayed_row_brings_what_the_model_gave_for_it_when_it_was_new(name: str) -> None:
    found = train(name=name)
    check_states([found])
    assert len({tuple(answer.tolist()) for answer in found.given.values()}) == len(found.given), (
        "rows can be told apart"
    )


def test_states_are_right_with_micro_batches_candidates_and_replacement() -> None:
    variants: list[dict[str, Any]] = [{"passes": 2}, {"candidates": 2}, {"mode": "replace"}, {"start_step": 9}]
    for keys in variants:
        check_states([train(name="der++", **{"representatives": 2, **keys})])


def test_several_outputs_come_back_under_their_names() -> None:
    def generate(x: Tensor) -> dict[str, Any]:
        ids = x[:, 0].long()
        maps = (ids[:, None, None] * torch.ones(3, 2), (ids % 1000).to(torch.int16))
        scores = torch.zeros(len(x), 5, requires_grad=True)
        return {"maps": maps, "scores": scores, "temperature": torch.tensor(2.0), "name": "text"}

    found = train(model=generate)
    for draws in found.draws:
        for ids, state in draws:
            assert sorted(state) == ["maps.0", "maps.1", "scores"]
            assert torch.equal(state["maps.0"], torch.tensor(ids)[:, None, None] * torch.ones(3, 2))
            assert torch.equal(state["maps.1"], (torch.tensor(ids) % 1000).to(torch.int16))
    chosen = train(model=generate, strategy={"outputs": ["maps.1"]})
    assert {name for draws in chosen.draws for _, state in draws for name in state} == {"maps.1"}


def test_topk_values_and_ids_come_back_as_they_were_recorded() -> None:
    found = train(name="topk", strategy={"k": 2})
    states = [(ids, state) for draws in found.draws for ids, state in draws]
    assert states
    for ids, state in states:
        given = torch.stack([found.given[row] for row in ids]).log_softmax(-1).topk(2)
        assert state["values"].dtype == torch.float32
        assert state["ids"].dtype == torch.int32
        assert torch.equal(state["values"], given.values)
        assert torch.equal(state["ids"], given.indices.int())


class Augmentation:
    """Shifts `x` by another amount at every call; keeps what it was given and what it gave."""

    def __init__(self) -> None:
        self.given: list[Batch] = []
        self.made: list[Batch] = []

    def __call__(self, batch: Batch) -> Batch:
        self.given.append({name: value.clone() for name, value in batch.items()})
        made = {**batch, "x": batch["x"] + len(self.given)}
        self.made.append(made)
        return made


def test_with_transform_replayed_new_rows_are_seen_and_recorded_as_they_are_stored() -> None:
    transform = Augmentation()
    found = train(name="der++", transform=transform)
    check_states([found])
    replays = found.batches[3:]
    assert len(transform.given) == len(replays), "one call a batch, none without replayed rows"
    assert all(intact(given) and len(given["id"]) == 2 * WANTED for given in transform.given)
    for number, seen in enumerate(found.batches):
        assert same({k: v[:SIZE] for k, v in seen.items()}, new_batch(0, number, SIZE))
    assert all(torch.equal(seen["x"][SIZE:], made["x"]) for seen, made in zip(replays, transform.made, strict=True))


def test_with_transform_all_rows_are_stored_raw_with_the_outputs_of_their_augmented_version() -> None:
    transform = Augmentation()
    found = train(name="der++", transform=transform, strategy={"transform": "all"})
    check_states([found])  # what the model gave, and it saw the augmented version
    assert all(intact(given) for given in transform.given), "replayed rows were stored raw"
    assert [len(given["id"]) for given in transform.given] == [SIZE] * 3 + [SIZE + 2 * WANTED] * (STEPS - 3)
    assert all(same(seen, made) for seen, made in zip(found.batches, transform.made, strict=True))
    assert not any(intact(seen) for seen in found.batches)


@pytest.mark.parametrize("name", ["er", "der"])
def test_the_batch_may_be_overwritten_before_the_loss(name: str) -> None:
    with Rehearsal(section(name), LocalTransport()) as rehearsal:
        for step in range(20):
            batch = new_batch(0, step, SIZE)
            seen = rehearsal.augment(batch)
            assert intact(seen)
            outputs, label = seen["x"].float(), seen["label"].clone()
            for values in (*batch.values(), *seen.values()):
                values.fill_(1)
            rehearsal.loss(lambda outputs, label: outputs.mean(), outputs, label)
            rehearsal.step()


# --- draws -----------------------------------------------------------------------------------------------------------


def test_representatives_are_those_of_each_draw() -> None:
    found = train(name="der++")
    assert [[len(ids) for ids, _ in draws] for draws in found.draws[3:]] == [[WANTED, WANTED]] * (STEPS - 3)
    assert found.metrics["rows_replayed"] == 2 * WANTED * (STEPS - 3)


@functools.cache
def stationary() -> list[list[list[int]]]:
    """Both draws of every step, from a buffer that always holds the rows 0 to 11."""
    drawn = []
    keys = section("der++", representatives=3, buffer={"capacity": 12, "policy": "fifo"})
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        calls = spy(rehearsal.strategy)
        for _ in range(3000):
            batch = rehearsal.augment(new_batch(0, 0, 12))
            rehearsal.loss(lambda outputs, *_: outputs.mean(), batch["half"].float(), batch["label"], batch["id"])
            rehearsal.step()
            drawn.append([part.targets[1].tolist() for part in calls.pop()[1:]])
    return drawn[3:]


def test_each_draw_is_uniform_and_without_replacement() -> None:
    for turn in range(2):
        draws = [ids[turn] for ids in stationary()]
        assert all(len(set(ids)) == 3 for ids in draws)
        counts = [sum(row in ids for ids in draws) for row in range(12)]
        assert equally_included(counts, len(draws), 3) > SIGNIFICANCE


def test_the_two_draws_are_independent() -> None:
    pairs = [(first[0], second[0]) for first, second in stationary()]
    assert equally_likely(pairs, 144) > SIGNIFICANCE
    common = [len(set(first) & set(second)) for first, second in stationary()]
    chance = [comb(3, n) * comb(9, 3 - n) / comb(12, 3) for n in range(4)]
    observed = [common.count(n) for n in range(4)]
    assert chisquare(observed, [p * len(common) for p in chance]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_the_ratio_is_met_by_both_draws_together(mode: str, ratio: float) -> None:
    found = train(name="der++", ratio=ratio, mode=mode, steps=60)
    share = Fraction(str(ratio))
    due = share / (1 - share if mode == "append" else 1) / 2 * SIZE * 57
    assert found.metrics["rows_replayed"] == 2 * (due.numerator // due.denominator)
    assert all(len(first[0]) == len(second[0]) for first, second in (draws for draws in found.draws if draws))


def test_every_micro_batch_gets_both_draws() -> None:
    found = train(name="der++", passes=2)
    assert [[len(ids) for ids, _ in draws] for draws in found.draws[6:]] == [[WANTED, WANTED]] * (2 * STEPS - 6)
    for first, second in zip(found.draws[6::2], found.draws[7::2], strict=True):
        for turn in range(2):
            rows = first[turn][0] + second[turn][0]
            assert len(set(rows)) == len(rows), "a draw is without replacement over all micro-batches of a step"
    assert found.metrics["rows_offered"] == 2 * STEPS * SIZE


def test_displaced_rows_have_no_outputs_and_are_not_offered() -> None:
    found = train(name="der++", mode="replace", representatives=2, buffer={"capacity": 1000})
    assert [len(batch["id"]) for batch in found.batches] == [SIZE] * STEPS
    assert found.metrics["rows_displaced"] == 4 * (STEPS - 3)
    assert found.metrics["rows_offered"] == len(found.given) == STEPS * SIZE - 4 * (STEPS - 3)


def test_a_short_batch_that_is_displaced_as_a_whole_has_a_loss() -> None:
    module = Model()
    with Rehearsal(section(name="der++", mode="replace", representatives=2)) as rehearsal:
        for number in range(STEPS):
            batch = rehearsal.augment(new_batch(0, number, 4 if number == STEPS - 1 else SIZE))
            loss = rehearsal.loss(loss_of, module(batch["x"]), batch["label"], batch["id"])
            rehearsal.step()
    assert loss.isfinite()
    assert len(batch["id"]) == 4
    assert STEPS - 1 not in map(step_of, batch["id"].tolist())


def test_candidates_are_recorded_with_their_own_outputs() -> None:
    found = train(name="der++", candidates=2, buffer={"capacity": 1000})
    assert found.metrics["rows_offered"] == found.metrics["rows_stored"] == 2 * STEPS
    assert {row % 100 for row, _ in found.replayed} == set(range(SIZE)), "some places of a batch are never candidates"
    check_states([found])


def test_start_step_records_and_replays_nothing_before() -> None:
    found = train(name="der++", start_step=9, buffer={"capacity": 1000})
    assert [len(draws) for draws in found.draws] == [0] * 9 + [2] * (STEPS - 9)
    assert {step_of(row) for row, _ in found.replayed} >= set(range(7)), "earlier rows were recorded too"


# --- two ranks -------------------------------------------------------------------------------------------------------


def on_ranks() -> bytes:
    """By value: tensors that go through a pipe as they are need a sender that stays alive."""
    rank = dist.get_rank()
    results = {
        "der": train(name="der"),
        "der++": train(name="der++", exchange={"launch": "thread", **EXCHANGE}),
        "inline": train(name="der++", exchange={"launch": "inline", **EXCHANGE}),
        "passes": train(name="der++", passes=2),
        "replace": train(name="der++", mode="replace", representatives=2),
        "topk": train(name="topk", strategy={"k": 2}),
        "own": train(name="tests-surprise"),
        "all": train(
            name="der", transform=lambda batch: {**batch, "x": batch["x"] + rank}, strategy={"transform": "all"}
        ),
    }
    return pickle.dumps(results)


@functools.cache
def ranks() -> list[dict[str, Found]]:
    return [pickle.loads(result) for result in run_ranks(on_ranks, 2, timeout_s=60)]


@pytest.mark.parametrize("job", ["der", "der++", "passes", "replace", "all"])
def test_on_two_ranks_every_row_brings_its_own_outputs_from_wherever_it_lives(job: str) -> None:
    found = [rank[job] for rank in ranks()]
    check_states(found)
    for one in found:
        assert {rank_of(row) for row, _ in one.replayed} == {0, 1}


def test_topk_travels_between_ranks_bit_for_bit() -> None:
    given = owners([rank["topk"] for rank in ranks()])
    foreign = 0
    for number, rank in enumerate(ranks()):
        for ids, state in (draw for draws in rank["topk"].draws for draw in draws):
            expected = torch.stack([given[row] for row in ids]).log_softmax(-1).topk(2)
            assert state["values"].dtype == torch.float32
            assert state["ids"].dtype == torch.int32
            assert torch.equal(state["values"], expected.values)
            assert torch.equal(state["ids"], expected.indices.int())
            foreign += sum(rank_of(row) != number for row in ids)
    assert foreign


def test_two_draws_are_still_one_exchange() -> None:
    for rank in ranks():
        assert rank["der++"].metrics["collectives"] == 2 * STEPS - 1, "headers each step, rows from the second on"
        assert rank["passes"].metrics["collectives"] == 2 * STEPS - 1


def test_threads_change_nothing_bit_for_bit() -> None:
    for rank in ranks():
        threaded, inline = rank["der++"], rank["inline"]
        assert threaded.losses == inline.losses
        assert all(same(a, b) for a, b in zip(threaded.batches, inline.batches, strict=True))


# --- a strategy of one's own -----------------------------------------------------------------------------------------


@register("tests-surprise")
class Surprise(Strategy):
    """Records how surprised the model was by each row, and which class it took it for."""

    draws, records = 2, True

    def state(self, new: Part) -> dict[str, Tensor]:
        outputs = new.outputs
        return {"margin": outputs.amax(1) - outputs.mean(1), "class": outputs.argmax(1).to(torch.uint8)}

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        weights = [part.state["margin"].mean() for part in replayed]
        return sum((w * part.loss() for w, part in zip(weights, replayed, strict=True)), start=new.loss())


def test_a_strategy_of_ones_own_gets_its_own_state_back() -> None:
    found = [train(name="tests-surprise")]
    for group in (found, [rank["own"] for rank in ranks()]):
        given = owners(group)
        for one in group:
            assert sum(len(draws) for draws in one.draws) == 2 * (STEPS - 3)
            for ids, state in (draw for draws in one.draws for draw in draws):
                answers = torch.stack([given[row] for row in ids])
                assert torch.equal(state["margin"], answers.amax(1) - answers.mean(1))
                assert torch.equal(state["class"], answers.argmax(1).to(torch.uint8))


# --- the loss in a loop ----------------------------------------------------------------------------------------------


def masked(outputs: Tensor, label: Tensor) -> Tensor:
    """A mean over what counts, which is not the mean of the means of parts."""
    return cross_entropy(outputs, label, ignore_index=0)


def test_er_is_the_criterion_of_all_rows_whatever_it_averages_over() -> None:
    with Rehearsal(section("er"), LocalTransport()) as rehearsal:
        for step in range(10):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            outputs = Model()(batch["x"])
            assert torch.equal(rehearsal.loss(masked, outputs, batch["label"]), masked(outputs, batch["label"]))
            rehearsal.step()


def test_der_plus_plus_in_a_loop_is_its_formula() -> None:
    keys = section("der++", strategy={"alpha": 0.3, "beta": 0.7})
    given: dict[int, Tensor] = {}
    model = Model()
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        for step in range(12):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            outputs, ids = model(batch["x"]), batch["id"].tolist()
            given.update(zip(ids[:SIZE], outputs.detach().clone(), strict=False))
            expected = cross_entropy(outputs[:SIZE], batch["label"][:SIZE])
            if len(ids) > SIZE:
                first, second = slice(SIZE, SIZE + WANTED), slice(SIZE + WANTED, None)
                recorded = torch.stack([given[row] for row in ids[first]])
                expected = expected + 0.3 * (outputs[first] - recorded).square().mean()
                expected = expected + 0.7 * cross_entropy(outputs[second], batch["label"][second])
            loss = rehearsal.loss(cross_entropy, outputs, batch["label"])
            torch.testing.assert_close(loss, expected)
            rehearsal.step()
            with torch.no_grad():
                model.linear.weight += 0.1
    assert len(ids) == SIZE + 2 * WANTED


def test_who_records_nothing_keeps_no_batch_alive() -> None:
    with Rehearsal(section("er-ace"), LocalTransport()) as rehearsal:
        for step in range(5):
            batch = new_batch(0, step, SIZE)
            fields = [weakref.ref(value) for value in batch.values()]
            seen = rehearsal.augment(batch)
            outputs, label = torch.zeros(len(seen["x"]), 5), seen["label"].clone()
            del batch, seen
            assert not any(value() is not None for value in fields)
            rehearsal.loss(cross_entropy, outputs, label)
            rehearsal.step()


@pytest.mark.parametrize("name", ["er", "er-ace", "der", "der++", "topk"])
def test_a_computed_loss_leaves_neither_batch_nor_outputs_behind(name: str) -> None:
    model = Model()
    with Rehearsal(section(name, strategy={"k": 2}), LocalTransport()) as rehearsal:
        for step in range(5):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            outputs = model(batch["x"])
            kept = [weakref.ref(value) for value in (*batch.values(), outputs)]
            torch.autograd.backward(rehearsal.loss(cross_entropy, outputs, batch["label"]))
            del batch, outputs
            assert not any(value() is not None for value in kept)
            rehearsal.step()


# --- what is refused -------------------------------------------------------------------------------------------------


def started(name: str = "der", steps: int = 5, **keys: Any) -> Rehearsal:
    """A rehearsal that has come to replay, with a batch that waits for its loss."""
    rehearsal = Rehearsal(section(name, **keys), LocalTransport())
    for step in range(steps):
        batch = rehearsal.augment(new_batch(0, step, SIZE))
        rehearsal.loss(cross_entropy, Model()(batch["x"]), batch["label"])
        rehearsal.step()
    rehearsal.augment(new_batch(0, steps, SIZE))
    return rehearsal


def test_update_is_refused_where_outputs_are_recorded() -> None:
    with (
        Rehearsal(section("der"), LocalTransport()) as rehearsal,
        pytest.raises(
            ConfigError, match=r"'der'.*augment\(batch\), loss\(criterion, outputs, \*targets\) and step\(\)"
        ),
    ):
        rehearsal.update(new_batch(0, 0, SIZE))


@pytest.mark.parametrize("name", ["der", "er-ace"])
@pytest.mark.parametrize("call", ["step", "augment"])
def test_a_strategy_whose_loss_was_not_asked_for_says_so(name: str, call: str) -> None:
    with (
        started(name) as rehearsal,
        pytest.raises(BatchError, match=rf"'{name}'.*loss\(criterion, outputs, \*targets\)"),
    ):
        rehearsal.step() if call == "step" else rehearsal.augment(new_batch(0, 9, SIZE))


def test_er_weights_ask_for_their_loss_in_a_plain_loop_too() -> None:
    with Rehearsal(section("er", strategy={"loss_weight": 0.5}), LocalTransport()) as rehearsal:
        batch = rehearsal.update(new_batch(0, 0, SIZE))
        rehearsal.loss(cross_entropy, batch["x"].float(), batch["label"] % 3)
        rehearsal.update(new_batch(0, 1, SIZE))
        with pytest.raises(BatchError, match=r"'er'.*loss\(criterion"):
            rehearsal.update(new_batch(0, 2, SIZE))


def test_record_stands_in_for_the_loss() -> None:
    with started() as rehearsal:
        rehearsal.record(torch.zeros(SIZE + WANTED, 5))
        rehearsal.step()
        assert rehearsal.metrics()["steps"] == 6


@pytest.mark.parametrize("name", ["er", "der", "er-ace"])
@pytest.mark.parametrize("rows", [SIZE, SIZE + WANTED + 1])
def test_outputs_for_other_rows_are_refused(name: str, rows: int) -> None:
    with (
        started(name) as rehearsal,
        pytest.raises(BatchError, match=rf"output 'output' has {rows} rows and the micro-batch has {SIZE + WANTED}"),
    ):
        rehearsal.loss(cross_entropy, torch.zeros(rows, 5), torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("name", ["der", "er-ace"])
def test_targets_for_other_rows_are_refused(name: str) -> None:
    with (
        started(name, representatives=SIZE) as rehearsal,
        pytest.raises(BatchError, match=rf"target '0' has {SIZE} rows and the micro-batch has {2 * SIZE}"),
    ):
        rehearsal.loss(cross_entropy, torch.zeros(2 * SIZE, 5), new_batch(0, 5, SIZE)["label"])


@pytest.mark.parametrize(
    "outputs",
    [torch.zeros(SIZE + WANTED, 7), torch.zeros(SIZE + WANTED, 5, dtype=torch.float64)],
    ids=["shape", "dtype"],
)
def test_outputs_that_changed_since_the_first_step_are_refused(outputs: Tensor) -> None:
    with started() as rehearsal, pytest.raises(BatchError, match="'output'"):
        rehearsal.loss(cross_entropy, outputs, torch.zeros(SIZE + WANTED, dtype=torch.int64))


def test_topk_refuses_positions_that_changed() -> None:
    def loss(outputs: Tensor) -> Tensor:
        return outputs.mean()

    with Rehearsal(section("topk", strategy={"k": 2}), LocalTransport()) as rehearsal:
        for step in range(5):
            batch = rehearsal.augment(new_batch(0, step, SIZE))
            rehearsal.loss(loss, torch.zeros(len(batch["id"]), 3, 5))
            rehearsal.step()
        batch = rehearsal.augment(new_batch(0, 5, SIZE))
        with pytest.raises(BatchError, match="shape"):
            rehearsal.loss(loss, torch.zeros(len(batch["id"]), 4, 5))


def test_a_refused_loss_may_be_asked_for_again() -> None:
    with started() as rehearsal:
        with pytest.raises(BatchError):
            rehearsal.loss(cross_entropy, torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))
        rehearsal.loss(cross_entropy, torch.zeros(SIZE + WANTED, 5), torch.zeros(SIZE + WANTED, dtype=torch.int64))
        rehearsal.step()


@pytest.mark.parametrize("name", ["er", "der"])
def test_a_loss_without_a_micro_batch_is_refused(name: str) -> None:
    outputs, label = torch.zeros(SIZE, 5), torch.zeros(SIZE, dtype=torch.int64)
    with Rehearsal(section(name), LocalTransport()) as rehearsal:
        with pytest.raises(BatchError, match=r"call augment\(batch\) once before each"):
            rehearsal.loss(cross_entropy, outputs, label)
        rehearsal.augment(new_batch(0, 0, SIZE))
        rehearsal.loss(cross_entropy, outputs, label)
        with pytest.raises(BatchError, match=r"call augment\(batch\) once before each"):
            rehearsal.loss(cross_entropy, outputs, label)


def test_micro_batches_that_were_read_ahead_are_answered_in_their_order() -> None:
    model = Model()
    one_by_one, ahead = (Rehearsal(section("der++", ratio=0.3), LocalTransport()) for _ in range(2))
    for step in range(8):
        batches = [new_batch(0, 3 * step + micro, SIZE - micro) for micro in range(3)]
        losses = []
        for batch in batches:
            seen = one_by_one.augment(batch)
            losses.append(one_by_one.loss(cross_entropy, model(seen["x"]), seen["label"]))
        read = [ahead.augment(batch, ahead=True) for batch in batches]
        assert [ahead.loss(cross_entropy, model(seen["x"]), seen["label"]) for seen in read] == losses
        for rehearsal in (one_by_one, ahead):
            rehearsal.step()
    one_by_one.close()
    ahead.close()
