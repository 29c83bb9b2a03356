"""The losses of the strategies, recomputed by hand on small tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from rehearsal_plugin.config import StrategyConfig
from rehearsal_plugin.config.names import ROW_LOSS
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.strategies import STRATEGIES, Part, RowLoss, Strategy, make_strategy
from rehearsal_plugin.strategies.base import distance, flatten
from rehearsal_plugin.strategies.row_loss import row_losses
from rehearsal_plugin.strategies.topk import distillation_loss

ROWS, CLASSES = 6, 7


def strategy(name: str, **keys: Any) -> Strategy:
    return make_strategy(StrategyConfig(name=name, **keys))


def scores(seed: int, rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int, rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def part(
    outputs: Any,
    *targets: Tensor,
    state: Mapping[str, Tensor] | None = None,
    criterion: Callable[..., Tensor] = cross_entropy,
) -> Part:
    return Part(outputs, targets, state or {}, len(next(iter(flatten(outputs).values()))), criterion)


def log_softmax(row: Sequence[float]) -> list[float]:
    """With plain floats: none of what is tested computes it."""
    values = torch.tensor(row, dtype=torch.float64)
    shifted = values - values.max()
    result: list[float] = (shifted - shifted.exp().sum().log()).tolist()
    return result


def entropies(outputs: Tensor, targets: Tensor) -> list[float]:
    """The cross-entropy of each row."""
    return [-log_softmax(row)[label] for row, label in zip(outputs.tolist(), targets.tolist(), strict=True)]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def near(first: Tensor | float, second: Tensor | float) -> bool:
    return bool(torch.isclose(torch.as_tensor(first).double(), torch.as_tensor(second).double(), rtol=1e-6, atol=1e-9))


# --- er --------------------------------------------------------------------------------------------------------------


def test_er_is_the_mean_loss_over_all_rows() -> None:
    outputs, targets = leaf(scores(0, 9)), labels(1, 9)
    parts = [part(outputs[span], targets[span]) for span in (slice(0, 5), slice(5, 9))]
    loss = strategy("er").loss(parts[0], parts[1:])
    assert near(loss, cross_entropy(outputs, targets))
    (gradient,) = torch.autograd.grad(loss, outputs)
    (expected,) = torch.autograd.grad(cross_entropy(outputs, targets), outputs)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.5])
def test_er_weights_each_replayed_row(weight: float) -> None:
    new, old = (scores(0, 5), labels(1, 5)), (scores(2, 3), labels(3, 3))
    by_hand = (sum(entropies(*new)) + weight * sum(entropies(*old))) / 8
    assert near(strategy("er", loss_weight=weight).loss(part(*new), [part(*old)]), by_hand)


@pytest.mark.parametrize("name", ["er", "der", "der++", "er-ace", "topk"])
def test_before_anything_is_replayed_the_loss_is_the_tasks(name: str) -> None:
    new = scores(0), labels(1)
    assert near(strategy(name, loss_weight=0.3, alpha=2, beta=3).loss(part(*new), []), cross_entropy(*new))


@pytest.mark.parametrize("name", ["er", "der", "der++", "er-ace", "topk"])
def test_where_every_new_row_was_displaced_the_loss_is_that_of_the_replayed(name: str) -> None:
    built = strategy(name, k=CLASSES)
    old = leaf(scores(2))
    replayed = [part(old, labels(3), state=built.state(part(scores(4)))) for _ in range(built.draws)]
    loss = built.loss(part(old[:0], labels(3)[:0]), replayed)
    assert loss.isfinite()
    assert loss > 0
    assert torch.autograd.grad(loss, old)[0].isfinite().all()


# --- der and der++ ---------------------------------------------------------------------------------------------------


def squares(first: Tensor, second: Tensor) -> float:
    pairs = list(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    return float(sum((a - b) ** 2 for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_der_is_the_tasks_loss_on_new_rows_and_the_distance_on_replayed_ones(alpha: float) -> None:
    new, old, recorded = (leaf(scores(0)), labels(1)), leaf(scores(2, 4)), scores(3, 4)
    loss = strategy("der", alpha=alpha).loss(part(*new), [part(old, labels(4, 4), state={"output": recorded})])
    assert near(loss, sum(entropies(*new)) / ROWS + alpha * squares(old, recorded))
    fresh, replayed = torch.autograd.grad(loss, (new[0], old))
    one_hot = torch.eye(CLASSES, dtype=torch.float64)[new[1]]
    torch.testing.assert_close(fresh, (new[0].detach().softmax(1) - one_hot) / ROWS)
    torch.testing.assert_close(replayed, alpha * 2 * (old.detach() - recorded) / old.numel(), rtol=1e-5, atol=1e-6)


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


def maps(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    return scores(seed, rows, 12).view(rows, 1, 3, 4), scores(seed + 50, rows, 20).view(rows, 2, 2, 5)


def both(outputs: tuple[Tensor, Tensor], *targets: Tensor) -> Tensor:
    return mse_loss(outputs[0], targets[0]) + mse_loss(outputs[1], targets[1])


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


def test_outputs_chooses_by_name_what_is_recorded_and_compared() -> None:
    built = strategy("der", alpha=1, outputs=["heads.1"])
    old, recorded = ({"heads": [scores(i), scores(i + 1)], "prior": [torch.ones(3)]} for i in (0, 5))
    state = built.state(part(recorded))
    assert list(state) == ["heads.1"]
    assert torch.equal(state["heads.1"], recorded["heads"][1])
    dark = built.regularizer([Part(old, (), state, ROWS, cross_entropy)])
    assert dark is not None
    assert near(dark, squares(old["heads"][1], recorded["heads"][1]))


def test_half_precision_outputs_are_recorded_as_they_are_and_compared_in_float() -> None:
    built = strategy("der", alpha=1)
    old, recorded = scores(0).bfloat16(), scores(1).bfloat16()
    state = built.state(part(recorded))
    assert state["output"].dtype == torch.bfloat16
    dark = built.regularizer([Part(old, (), state, ROWS, cross_entropy)])
    assert dark is not None
    assert dark.dtype == torch.float32
    assert near(dark, squares(old, recorded))


@pytest.mark.parametrize("now", [{"other": scores(0)}, {"output": scores(0, ROWS, 1)}, {"output": scores(0, ROWS, 9)}])
def test_outputs_of_another_name_or_shape_than_recorded_are_refused(now: dict[str, Tensor]) -> None:
    with pytest.raises(BatchError, match=r"'output'.*recorded"):
        distance(now, {"output": scores(1)})


# --- er-ace ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_er_ace_masks_absent_classes_for_new_rows_only(weight: float) -> None:
    outputs, targets = leaf(scores(0, 4)), torch.tensor([2, 5, 2, 5])
    old, classes = leaf(scores(2, 3)), torch.tensor([0, 1, 2])
    loss = strategy("er-ace", loss_weight=weight).loss(part(outputs, targets), [part(old, classes)])
    among = entropies(outputs[:, [2, 5]], torch.tensor([0, 1, 0, 1]))
    assert near(loss, sum(among) / 4 + weight * sum(entropies(old, classes)) / 3)
    fresh, replayed = torch.autograd.grad(loss, (outputs, old))
    absent = [0, 1, 3, 4, 6]
    assert not fresh[:, absent].any(), "new rows push classes that are not in the batch"
    assert fresh[:, [2, 5]].all()
    assert replayed.all(), "replayed rows compete among all classes"


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (scores(0), []),
        (scores(0), [scores(1)]),
        ((scores(0), scores(1)), [labels(0)]),
        (scores(0)[:, None], [labels(0)]),
    ],
)
def test_er_ace_refuses_what_is_no_classification(outputs: Any, targets: list[Tensor]) -> None:
    with pytest.raises(BatchError, match=r"er-ace.*scores \[rows, classes\]"):
        strategy("er-ace").loss(part(outputs, *targets), [part(scores(0), labels(0))])


def test_er_ace_leaves_out_the_labels_that_the_loss_ignores() -> None:
    outputs, targets = leaf(scores(0, 5)), torch.tensor([2, -100, 5, -100, 2])
    old, classes = leaf(scores(2, 3)), torch.tensor([0, -100, 2])
    loss = strategy("er-ace").loss(part(outputs, targets), [part(old, classes)])
    counted, replayed = [0, 2, 4], [0, 2]
    among = entropies(outputs[counted][:, [2, 5]], torch.tensor([0, 1, 0]))
    assert near(loss, sum(among) / 3 + sum(entropies(old[replayed], classes[replayed])) / 2)
    fresh = torch.autograd.grad(loss, outputs)[0]
    assert not fresh[[1, 3]].any()
    assert not fresh[:, [0, 1, 3, 4, 6]].any(), "an ignored label counts as a class of the batch"


# --- topk ------------------------------------------------------------------------------------------------------------


def full_distillation(logits: Tensor, recorded: Tensor) -> Tensor:
    return -(recorded.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def tokens(seed: int, classes: int = 11) -> Tensor:
    return 3 * torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(seed))


def test_topk_with_all_classes_is_full_distillation() -> None:
    logits, recorded = leaf(tokens(0)), tokens(1)
    state = strategy("topk", k=11).state(part(recorded))
    loss, full = distillation_loss(logits, state["values"], state["ids"]), full_distillation(logits, recorded)
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, full)))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_topk_counts_all_other_classes_as_one(k: int) -> None:
    logits, recorded = leaf(tokens(0)), tokens(1)
    state = strategy("topk", k=k).state(part(recorded))
    total = 0.0
    for now, then in zip(logits.view(-1, 11).tolist(), recorded.view(-1, 11).tolist(), strict=True):
        kept = sorted(range(11), key=lambda c, then=then: -then[c])[:k]  # type: ignore[misc]
        p, q = ([2.718281828459045**value for value in log_softmax(row)] for row in (then, now))
        rest = (1 - sum(p[c] for c in kept), 1 - sum(q[c] for c in kept))
        pairs = [*((p[c], q[c]) for c in kept), rest]
        total -= sum(a * float(torch.tensor(b, dtype=torch.float64).log()) for a, b in pairs)
    loss = distillation_loss(logits, state["values"], state["ids"])
    torch.testing.assert_close(loss.double(), torch.tensor(total / 10).double(), rtol=1e-5, atol=1e-6)
    reference = leaf(logits.detach().double())
    exact = distillation_loss_by_masks(reference, recorded.double(), k)
    gradients = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(exact, reference)[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-6)


def distillation_loss_by_masks(logits: Tensor, recorded: Tensor, k: int) -> Tensor:
    kept = torch.zeros_like(recorded, dtype=torch.bool).scatter(-1, recorded.topk(k).indices, True)
    p, q = recorded.softmax(-1), logits.softmax(-1)
    rest = (p * ~kept).sum(-1) * (q * ~kept).sum(-1).log()
    return -((p * q.log() * kept).sum(-1) + rest).mean()


def test_topk_is_least_where_nothing_has_changed() -> None:
    recorded = tokens(1)
    state = strategy("topk", k=4).state(part(recorded))
    unchanged = leaf(recorded)
    loss = distillation_loss(unchanged, state["values"], state["ids"])
    assert torch.autograd.grad(loss, unchanged)[0].abs().max() < 1e-6
    assert all(distillation_loss(tokens(seed), state["values"], state["ids"]) > loss for seed in range(2, 12))


EXTREME = {
    "high": torch.full((1, 2, 5), 1e4),
    "low": torch.full((1, 2, 5), -1e4),
    "one-hot": torch.eye(5)[:2][None] * 1e4,
    "split": torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0]).expand(1, 2, 5),
}


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("now", EXTREME)
@pytest.mark.parametrize("then", EXTREME)
def test_topk_stays_finite_for_extreme_logits(now: str, then: str, k: int) -> None:
    logits = leaf(EXTREME[now])
    state = strategy("topk", k=k).state(part(EXTREME[then]))
    loss = distillation_loss(logits, state["values"], state["ids"])
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_records_float32_values_and_int32_ids(dtype: torch.dtype) -> None:
    recorded = tokens(1).to(dtype)
    outputs = {"loss": torch.tensor(1.0), "hidden": torch.ones(2, 5, 4), "logits": recorded}
    state = strategy("topk", k=3).state(part(outputs))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "values": (torch.float32, (2, 5, 3)),
        "ids": (torch.int32, (2, 5, 3)),
    }
    torch.testing.assert_close(state["values"], recorded.float().log_softmax(-1).gather(-1, state["ids"].long()))


def test_topk_is_the_mean_loss_over_all_rows_and_the_distillation_of_replayed_ones() -> None:
    built = strategy("topk", k=3, alpha=0.25)
    new, old, recorded = (scores(0, 5), labels(1, 5)), (scores(2, 3), labels(3, 3)), scores(4, 3)
    loss = built.loss(part(*new), [part(*old, state=built.state(part(recorded)))])
    kept = distillation_loss_by_masks(old[0], recorded, 3)
    assert torch.isclose(loss, sum(entropies(*new) + entropies(*old)) / 8 + 0.25 * kept, rtol=1e-5)


@pytest.mark.parametrize("logits", [torch.ones(4, 5), torch.ones(6)])
def test_topk_refuses_outputs_without_enough_classes(logits: Tensor) -> None:
    with pytest.raises(BatchError, match=r"at least 6 classes \(rehearsal.strategy.k\)"):
        strategy("topk", k=6).state(part(logits))


# --- losses of single rows -------------------------------------------------------------------------------------------


def by_token(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, 1), labels.flatten())


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, weight=torch.arange(1, CLASSES + 1, dtype=outputs.dtype))


@pytest.mark.parametrize("criterion", [cross_entropy, weighted])
def test_a_rows_loss_is_that_of_the_row_alone(criterion: Callable[..., Tensor]) -> None:
    outputs, targets = scores(0), labels(1)
    losses = row_losses(part(outputs, targets, criterion=criterion))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), torch.tensor(entropies(outputs, targets)).double())


def test_a_rows_loss_averages_over_its_own_tokens_that_count() -> None:
    outputs, targets = tokens(0), torch.tensor([[3, -100, -100, 5, 0], [-100, -100, -100, -100, 7]])
    by_hand = [entropies(row[wanted >= 0], wanted[wanted >= 0]) for row, wanted in zip(outputs, targets, strict=True)]
    losses = row_losses(part(outputs, targets, criterion=by_token))
    torch.testing.assert_close(losses, torch.tensor([sum(each) / len(each) for each in by_hand]))


def test_a_row_without_a_token_that_counts_has_no_number_as_loss() -> None:
    targets = torch.tensor([[-100] * 5, [1] * 5])
    assert row_losses(part(tokens(0), targets, criterion=by_token)).isnan().tolist() == [True, False]


def test_rows_losses_of_several_outputs_and_targets() -> None:
    outputs, targets = maps(0, 3), maps(4, 3)
    losses = row_losses(part(outputs, *targets, criterion=both))
    by_hand = [sum(squares(a[row], b[row]) for a, b in zip(outputs, targets, strict=True)) for row in range(3)]
    torch.testing.assert_close(losses.double(), torch.tensor(by_hand).double())


def test_a_rows_loss_takes_what_has_no_rows_as_it_is() -> None:
    def criterion(outputs: Mapping[str, Any], target: Tensor, power: float) -> Tensor:
        loss: Tensor = outputs["scale"] * (outputs["scores"][0] - target).abs().mean() ** power * outputs["prior"].sum()
        return loss

    outputs = {"scores": [scores(0)], "scale": torch.tensor(3.0), "prior": torch.ones(5), "name": "text"}
    losses = row_losses(Part(outputs, (scores(1), 2.0), {}, ROWS, criterion))  # type: ignore[arg-type]
    expected = 15 * (scores(0) - scores(1)).abs().mean(1) ** 2
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


def test_rows_losses_have_no_history_and_leave_that_of_the_outputs() -> None:
    outputs = leaf(scores(0))
    assert not row_losses(part(outputs, labels(1))).requires_grad
    cross_entropy(outputs, labels(1)).backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None


def test_no_rows_have_no_losses() -> None:
    assert row_losses(part(scores(0)[:0], labels(1)[:0])).shape == (0,)


def by_mask(outputs: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(outputs[target > 0], target[target > 0])


def by_number(outputs: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = cross_entropy(outputs, target) * target.max().item()
    return loss


@pytest.mark.parametrize("criterion", [by_mask, by_number])
def test_a_criterion_that_cannot_be_mapped_says_how_to_write_it(criterion: Callable[..., Tensor]) -> None:
    with pytest.raises(BatchError, match=r"score_by is 'loss'.*torch\.func\.vmap.*name a batch field"):
        row_losses(part(scores(0), labels(1), criterion=criterion))


@pytest.mark.parametrize("name", ["er", "der", "der++", "er-ace", "topk"])
def test_rows_scored_by_their_loss_carry_it_beside_the_state_of_the_strategy(name: str) -> None:
    inner = strategy(name, k=2)
    built, new = RowLoss(inner), part(scores(0), labels(1))
    state = built.state(new)
    assert state.keys() == inner.state(new).keys() | {ROW_LOSS}
    assert torch.equal(state[ROW_LOSS], row_losses(new))
    assert (built.draws, built.plain, built.records, built.refreshes) == (inner.draws, inner.plain, True, True)


@pytest.mark.parametrize("name", ["er", "der", "der++", "er-ace", "topk"])
def test_a_strategy_does_not_see_that_its_rows_are_scored(name: str) -> None:
    inner = strategy(name, k=2, alpha=0.3, beta=0.7, loss_weight=0.4)
    built, new = RowLoss(inner), part(scores(0), labels(1))
    draws = [
        part(scores(seed, 4), labels(seed, 4), state=built.state(part(scores(seed + 1, 4), labels(seed, 4))))
        for seed in range(2, 2 + inner.draws)
    ]
    bare = [
        part(each.outputs, *each.targets, state=inner.state(part(scores(seed + 1, 4), labels(seed, 4))))
        for seed, each in enumerate(draws, 2)
    ]
    assert torch.equal(built.loss(new, draws), inner.loss(new, bare))


@pytest.mark.parametrize("name", ["er", "der++", "topk"])
def test_a_refresh_brings_the_present_loss_and_leaves_other_state(name: str) -> None:
    built = RowLoss(strategy(name, k=2))
    before = built.state(part(scores(0), labels(1)))
    now = part(scores(5), labels(1), state=before)
    after = built.refresh(now)
    assert after.keys() == before.keys()
    assert torch.equal(after[ROW_LOSS], row_losses(now))
    assert not torch.equal(after[ROW_LOSS], before[ROW_LOSS])
    assert all(torch.equal(after[key], before[key]) for key in before if key != ROW_LOSS)


def test_x_der_refreshes_its_own_state_beside_the_loss() -> None:
    inner = strategy("x-der")
    built, few, many = RowLoss(inner), torch.tensor([0, 1, 0]), torch.arange(CLASSES)
    first = part(scores(0, 3), few)
    built.loss(first, [])
    state = {name: value.clone() for name, value in built.state(first).items()}
    built.loss(part(scores(1, CLASSES), many), [])
    after = built.refresh(part(scores(2, 3), few, state=state))
    assert after["known"].all()
    assert not torch.equal(after["scores"], state["scores"])
    torch.testing.assert_close(after[ROW_LOSS].double(), torch.tensor(entropies(scores(2, 3), few)).double())


def test_rows_scored_by_their_loss_refuse_the_models_own() -> None:
    with pytest.raises(ConfigError, match=r"score_by is 'loss'.*rehearsal\.loss\(criterion, outputs"):
        RowLoss(strategy("der")).regularizer([])


# --- names and errors ------------------------------------------------------------------------------------------------


def test_an_unknown_strategy_is_refused_with_the_names_of_all_others() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.strategy\.name must .*not 'dar'") as error:
        strategy("dar")
    assert all(name in str(error.value) for name in STRATEGIES)


def test_outputs_that_are_not_there_are_refused_with_those_that_are() -> None:
    with pytest.raises(BatchError, match=r"\['a', 'b'\].*names \['c'\]"):
        strategy("der", outputs=["a", "c"]).state(part({"a": scores(0), "b": scores(1)}))


def test_a_model_without_tensors_is_refused() -> None:
    with pytest.raises(BatchError, match="nothing to replay"):
        strategy("der").state(part({"loss": torch.tensor(1.0)}))


@pytest.mark.parametrize(("name", "keys"), [("er", {"loss_weight": 0.5}), ("er-ace", {})])
def test_who_needs_the_losses_apart_refuses_the_models_own(name: str, keys: dict[str, Any]) -> None:
    built = strategy(name, **keys)
    with pytest.raises(ConfigError, match=r"rehearsal\.loss\(criterion, outputs"):
        built.regularizer([part(scores(0), labels(0))])


def test_x_der_refuses_outputs_without_labels() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.loss\(criterion, outputs, labels\)"):
        strategy("x-der").state(part(scores(0)))
