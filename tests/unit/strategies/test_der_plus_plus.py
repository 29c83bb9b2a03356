"""DER++: the loss on the second draw beside the distance on the first, recomputed by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.helpers.replay_jobs import SIZE, WANTED, Model, section
from tests.helpers.samples import new_batch
from tests.helpers.strategy_parts import (
    CLASSES,
    ROWS,
    both,
    entropies,
    labels,
    leaf,
    maps,
    near,
    part,
    scores,
    squares,
    strategy,
)


def test_der_plus_plus_adds_the_tasks_loss_on_the_second_draw_alone() -> None:
    new, first, second = (leaf(scores(0)), labels(1)), leaf(scores(2, 4)), leaf(scores(5, 4))
    recorded, targets = scores(3, 4), labels(6, 4)
    draws = [
        part(first, labels(4, 4), state={"output": recorded}),
        part(second, targets, state={"output": scores(7, 4)}),
    ]
    loss = strategy("der++", alpha=0.3, beta=0.7).loss(part(*new), draws)
    by_hand = sum(entropies(*new)) / ROWS + 0.3 * squares(first, recorded) + 0.7 * sum(entropies(second, targets)) / 4
    assert near(loss, by_hand)
    of_first, of_second = torch.autograd.grad(loss, (first, second))
    one_hot = torch.eye(CLASSES, dtype=torch.float64)[targets]
    torch.testing.assert_close(of_first, 0.3 * 2 * (first.detach() - recorded) / first.numel(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_second, 0.7 * (second.detach().softmax(1) - one_hot) / 4)


def test_der_holds_all_maps_of_a_generative_model() -> None:
    built = strategy("der++", alpha=0.8, beta=1)
    new, old, again, recorded = maps(0, 3), maps(1, 2), maps(2, 2), maps(3, 2)
    state = built.state(part(recorded))
    assert {name: tuple(value.shape) for name, value in state.items()} == {"0": (2, 1, 3, 4), "1": (2, 2, 2, 5)}
    targets, later = maps(4, 3), maps(5, 2)
    draws = [part(old, *later, state=state, criterion=both), part(again, *later, state=state, criterion=both)]
    loss = built.loss(part(new, *targets, criterion=both), draws)
    dark = (squares(old[0], recorded[0]) + squares(old[1], recorded[1])) / 2
    task = sum(squares(a, b) for a, b in zip(new, targets, strict=True))
    assert near(loss, task + 0.8 * dark + sum(squares(a, b) for a, b in zip(again, later, strict=True)))


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
