"""Recorded state that comes back with a replayed row, alone and on 2 real gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.helpers.replay_jobs import (
    SIZE,
    STEPS,
    WANTED,
    Model,
    check_states,
    loss_of,
    owners,
    ranks,
    section,
    train,
)
from tests.helpers.samples import Batch, intact, new_batch, rank_of, same, step_of


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


@pytest.mark.parametrize("job", ["der", "der++", "passes", "replace", "all"])
def test_on_two_ranks_every_row_brings_its_own_outputs_from_wherever_it_lives(job: str) -> None:
    found = [rank[job] for rank in ranks()]
    check_states(found)
    for one in found:
        assert {rank_of(row) for row, _ in one.replayed} == {0, 1}


def test_threads_change_nothing_bit_for_bit() -> None:
    for rank in ranks():
        threaded, inline = rank["der++"], rank["inline"]
        assert threaded.losses == inline.losses
        assert all(same(a, b) for a, b in zip(threaded.batches, inline.batches, strict=True))


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
