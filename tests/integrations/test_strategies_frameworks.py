"""Strategies under DeepSpeed and Horovod: a loss of one's own beside logits, or one that the model computes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rehearsal_plugin
from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.integrations import Handle
from rehearsal_plugin.integrations.inject.forward import ForwardInjection
from rehearsal_plugin.integrations.inject.loader import RehearsalLoader
from rehearsal_plugin.strategies import Strategy
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import new_batch
from tests.helpers.witness import BATCH, Failure, config_of, engine_of, perform, samples

WANTED, STEPS, ALPHA, K = 3, 8, 0.5, 4


def block(name: str, **keys: Any) -> dict[str, Any]:
    strategy = {"name": name, "alpha": ALPHA, "k": K, **keys.pop("strategy", {})}
    return {"buffer": {"capacity": 500}, "representatives": WANTED, "strategy": strategy, **keys}


def spy(strategy: Strategy, method: str) -> list[Any]:
    """The arguments of every call of a method from now on, the last one first."""
    calls: list[Any] = []
    original = getattr(strategy, method)

    def called(*args: Any) -> Any:
        calls.insert(0, args)
        return original(*args)

    setattr(strategy, method, called)
    return calls


# --- a loss of one's own ---------------------------------------------------------------------------------------------


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(x.to(self.linear.weight.dtype) / 97)
        return scores


def criterion(outputs: Tensor, labels: Tensor, uid: Tensor) -> Tensor:
    return cross_entropy(outputs.float(), labels)


def score(folder: Path, *, name: str, stage: int = 0, gas: int = 1, bf16: bool = False) -> bytes:
    """Train with `inject: loader`; what was given to new rows and what came back with replayed ones."""
    engine = engine_of(config_of(block(name, inject="loader"), stage=stage, gas=gas, bf16=bf16), Scores())
    handle = engine.rehearsal
    calls = spy(handle.rehearsal.strategy, "loss")
    given: dict[Any, Tensor] = {}
    back: list[Any] = []
    errors = []
    for batch in handle.loader([samples(number) for number in range(STEPS * gas)]):
        outputs = engine(batch["x"])
        loss = handle.loss(criterion, outputs, batch["labels"], batch["uid"])
        given.update(zip(batch["uid"][:BATCH].tolist(), outputs.detach().clone(), strict=False))
        recorded = [part.state["output"] for part in calls[0][1]] if calls else []
        ids = batch["uid"][BATCH:].tolist()
        back += zip(ids, torch.cat(recorded), strict=True) if recorded else []
        errors.append(abs(loss.item() - by_hand(outputs, batch["labels"], recorded).item()))
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return pickle.dumps((given, back, max(errors), handle.metrics()))


def by_hand(outputs: Tensor, labels: Tensor, recorded: list[Tensor]) -> Tensor:
    """The loss of `er`, or that of `der++` where something was recorded."""
    if not recorded:
        return cross_entropy(outputs.float(), labels)
    new, first, second = slice(BATCH), slice(BATCH, BATCH + WANTED), slice(BATCH + WANTED, None)
    dark = (outputs[first].float() - recorded[0].float()).square().mean()
    task, later = (cross_entropy(outputs[part].float(), labels[part]) for part in (new, second))
    return task + ALPHA * dark + 0.5 * later


# --- a loss that the model computes ----------------------------------------------------------------------------------


def language_model(folder: Path, *, name: str) -> bytes:
    """Train a tiny GPT-2 with `inject: forward`; the loss against what it should be."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    engine = engine_of(config_of(block(name)), model)
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs["input_ids"]), with_kwargs=True)
    calls = spy(engine.rehearsal.rehearsal.strategy, "regularizer")
    given: dict[Any, Tensor] = {}
    back: list[Any] = []
    errors = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * dist.get_rank() + step)
        tokens = torch.randint(64, (BATCH, 16), generator=generator)
        output = engine(input_ids=tokens, labels=tokens)
        seen = inputs[-1]
        given.update(zip(map(tuple, seen[:BATCH].tolist()), output.logits.detach().clone(), strict=False))
        expected = cross_entropy(output.logits[:, :-1].flatten(0, 1), seen[:, 1:].flatten())
        if calls and calls[0][0]:
            ((part,),) = calls[0]
            assert torch.equal(part.outputs["logits"], output.logits[BATCH:])
            rows = [tuple(row) for row in seen[BATCH:].tolist()]
            states = zip(*part.state.values(), strict=True)
            back += list(zip(rows, states, strict=True))
            expected = expected + ALPHA * term(name, part.outputs["logits"], part.state)
        errors.append(abs(output.loss.item() - expected.item()))
        assert output["loss"] is output.loss
        engine.backward(output.loss)
        engine.step()
    engine.destroy()
    return pickle.dumps((given, back, max(errors), engine.rehearsal.metrics()))


def term(name: str, logits: Tensor, state: dict[str, Tensor]) -> Tensor:
    if name == "der":
        return (logits - state["logits"]).square().mean()
    p, q = state["values"].exp(), logits.softmax(-1).gather(-1, state["ids"].long())
    rest = (1 - p.sum(-1)) * (1 - q.sum(-1)).log()
    return -((p * q.log()).sum(-1) + rest).mean()


class Own(nn.Module):
    """Computes its loss itself and returns it in the form that is asked for."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.form = Scores(), form

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.inner(x)
        return self.form(cross_entropy(logits, labels), logits)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scalar": lambda loss, logits: loss,
    "tuple": lambda loss, logits: (loss, logits),
    "mapping": lambda loss, logits: {"loss": loss, "logits": logits},
}


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except (BatchError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def own_loss(folder: Path, *, name: str, form: str, **strategy: Any) -> str:
    """What is said when a strategy meets a model with its own loss."""
    engine = engine_of(config_of(block(name, strategy=strategy)), Own(FORMS[form]))

    def train() -> None:
        for number in range(5):
            batch = samples(number)
            output = engine(batch["x"], batch["labels"])
            engine.backward(output["loss"] if form == "mapping" else output[0] if form == "tuple" else output)
            engine.step()

    return message(train)


def disabled(folder: Path) -> bool:
    engine = engine_of(config_of(), Scores())
    batch = samples(0)
    outputs = engine(batch["x"])
    loss = engine.rehearsal.loss(cross_entropy, outputs, batch["labels"])
    return torch.equal(loss, cross_entropy(outputs, batch["labels"]))


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "er": partial(score, name="er"),
    "der++": partial(score, name="der++"),
    "accumulated": partial(score, name="der++", stage=2, gas=2, bf16=True),
    **{f"gpt2-{name}": partial(language_model, name=name) for name in ("er", "der", "topk")},
    "er-ace": partial(own_loss, name="er-ace", form="mapping"),
    "weighted": partial(own_loss, name="er", form="mapping", loss_weight=0.5),
    "x-der": partial(own_loss, name="x-der", form="mapping"),
    "hidden-er-ace": partial(own_loss, name="er-ace", form="scalar"),
    "hidden-weighted": partial(own_loss, name="er", form="scalar", loss_weight=0.5),
    "hidden-der": partial(own_loss, name="der", form="tuple"),
    "plain-er": partial(own_loss, name="er", form="scalar"),
    "mapping-der": partial(own_loss, name="der", form="mapping"),
    "disabled": disabled,
}


@pytest.fixture(scope="module")
def jobs() -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    pytest.importorskip("transformers")
    return run_ranks(perform, 2, SCENARIOS, Path(), timeout_s=100)


def found(jobs: list[dict[str, Any]], name: str) -> list[Any]:
    results = [rank[name] for rank in jobs]
    for rank, result in enumerate(results):
        if isinstance(result, Failure):
            pytest.fail(f"rank {rank} raised:\n{result.trace}")
    return [pickle.loads(result) if isinstance(result, bytes) else result for result in results]


@pytest.mark.parametrize("name", ["der++", "accumulated"])
def test_deepspeed_rows_of_the_loader_bring_the_logits_they_were_given(jobs: Any, name: str) -> None:
    given = {row: answer for rank in found(jobs, name) for row, answer in rank[0].items()}
    for rank, (_, back, _, metrics) in enumerate(found(jobs, name)):
        assert all(torch.equal(state, given[row]) for row, state in back)
        assert {row in found(jobs, name)[rank][0] for row, _ in back} == {True, False}, "rows of both ranks"
        passes = 2 if name == "accumulated" else 1
        assert len(back) == metrics["rows_replayed"] == 2 * WANTED * passes * (STEPS - 3)


@pytest.mark.parametrize("name", ["er", "der++", "accumulated"])
def test_deepspeed_losses_are_those_of_the_formula(jobs: Any, name: str) -> None:
    assert all(error < 1e-5 and metrics["rows_replayed"] for _, _, error, metrics in found(jobs, name))


@pytest.mark.parametrize("name", ["gpt2-er", "gpt2-der", "gpt2-topk"])
def test_deepspeed_adds_the_strategys_term_to_a_loss_of_the_models_own(jobs: Any, name: str) -> None:
    for _, _, error, metrics in found(jobs, name):
        assert metrics["rows_replayed"] == WANTED * (STEPS - 3)
        assert error < 1e-5


@pytest.mark.parametrize("name", ["gpt2-der", "gpt2-topk"])
def test_deepspeed_rows_of_the_forward_bring_the_logits_they_were_given(jobs: Any, name: str) -> None:
    given = {row: answer for rank in found(jobs, name) for row, answer in rank[0].items()}
    for own, back, _, _ in found(jobs, name):
        assert {row in own for row, _ in back} == {True, False}, "rows of both ranks"
        for row, state in back:
            if name == "gpt2-der":
                assert torch.equal(state[0], given[row])
            else:
                top = given[row].log_softmax(-1).topk(K)
                assert torch.equal(state[0], top.values)
                assert torch.equal(state[1], top.indices.int())


@pytest.mark.parametrize("name", ["er-ace", "x-der"])
def test_deepspeed_refuses_a_models_own_loss_where_losses_are_needed_apart(jobs: Any, name: str) -> None:
    for told in found(jobs, name):
        assert told.startswith("ConfigError")
        assert "rehearsal.loss(criterion, outputs" in told


@pytest.mark.parametrize("name", ["hidden-er-ace", "hidden-weighted", "hidden-der"])
def test_deepspeed_notices_that_a_strategy_was_never_asked_for_its_loss(jobs: Any, name: str) -> None:
    for told in found(jobs, name):
        assert told.startswith("BatchError")
        assert "call rehearsal.loss(criterion, outputs, *targets)" in told


@pytest.mark.parametrize("name", ["plain-er", "mapping-der", "weighted"])
def test_deepspeed_takes_a_loss_alone_where_it_is_the_strategys_and_plain_mappings(jobs: Any, name: str) -> None:
    assert found(jobs, name) == ["no error"] * 2


def test_without_a_section_the_handles_loss_is_the_criterion(jobs: Any) -> None:
    assert all(found(jobs, "disabled"))


# --- handle, loader and forward alone --------------------------------------------------------------------------------


def test_a_handle_without_rehearsal_gives_the_criterion() -> None:
    outputs, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    closed = Handle(Rehearsal({"strategy": {"name": "er-ace"}}, LocalTransport()))
    closed.close()
    for handle in (Handle(None), closed):
        assert torch.equal(handle.loss(cross_entropy, outputs, labels), cross_entropy(outputs, labels))


def test_a_plain_mapping_gets_the_term_and_stays_as_it_was_for_its_owner() -> None:
    model = Own(FORMS["mapping"])
    with Rehearsal(block("der"), LocalTransport()) as rehearsal:
        injection = ForwardInjection(rehearsal, model)
        for step in range(6):
            batch = new_batch(0, step, BATCH)
            x = torch.cat((batch["x"], batch["x"]), 1).float() % 97
            args, kwargs = injection((x, batch["label"]), {})
            outputs = model(*args, **kwargs)
            before = outputs["loss"].item()
            finished = injection.finish(outputs)
            assert outputs["loss"].item() == before
            with torch.no_grad():
                model.inner.linear.weight += 1
            assert (finished["loss"].item() > before) == (step >= 3), f"step {step}"
            rehearsal.step()


def test_a_loader_never_displaces_more_rows_than_a_batch_has() -> None:
    keys = block("der++", mode="replace", inject="loader", representatives=4)
    with (
        Rehearsal(keys, LocalTransport()) as rehearsal,
        pytest.raises(ConfigError, match=r"rehearsal\.representatives is 4 and a batch has 6 rows.*2 draw"),
    ):
        next(iter(RehearsalLoader([new_batch(0, 0, 6)], rehearsal)))


@pytest.mark.parametrize("size", [1, 3])
def test_a_loader_skips_no_row_where_draws_take_whole_batches(size: int) -> None:
    keys = {**block("der++", mode="replace", inject="loader"), "representatives": None, "ratio": 0.9}
    seen: list[int] = []
    with Rehearsal(keys, LocalTransport()) as rehearsal:
        for batch in RehearsalLoader([new_batch(0, step, size) for step in range(12)], rehearsal):
            replayed = rehearsal.metrics()["rows_replayed"] - rehearsal.metrics()["rows_displaced"]
            rehearsal.loss(lambda outputs, *_: outputs.mean(), batch["half"].float(), batch["label"])
            rehearsal.step()
            seen += batch["id"].tolist()
            assert len(seen) < 1000, "the loader does not end"
    assert replayed
    assert set(seen) == {row for step in range(12) for row in new_batch(0, step, size)["id"].tolist()}


# --- Horovod ---------------------------------------------------------------------------------------------------------


def horovod_jobs() -> bytes:
    return pickle.dumps((horovod_score(), horovod_own(), horovod_unasked()))


def horovod_optimizer(model: nn.Module) -> Any:
    import horovod.torch as hvd

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), list(model.named_parameters()))


def horovod_batches(steps: int = STEPS) -> list[dict[str, Tensor]]:
    import horovod.torch as hvd

    return [samples(number, rank=hvd.rank()) for number in range(steps)]


def horovod_score() -> Any:
    model = Scores()
    optimizer = horovod_optimizer(model)
    given: dict[int, Tensor] = {}
    back: list[tuple[int, Tensor]] = []
    with closing(rehearsal_plugin.attach(optimizer, block("der++", inject="loader"))) as handle:
        assert handle.rehearsal is not None
        calls = spy(handle.rehearsal.strategy, "loss")
        for batch in handle.loader(horovod_batches()):
            outputs = model(batch["x"])
            torch.autograd.backward(handle.loss(criterion, outputs, batch["labels"], batch["uid"]))
            given.update(zip(batch["uid"][:BATCH].tolist(), outputs.detach().clone(), strict=False))
            for part in calls[0][1]:
                back += zip(part.targets[1].tolist(), part.state["output"], strict=True)
            optimizer.step()
            optimizer.zero_grad()
    return given, back


def horovod_own() -> list[int]:
    """Rows that the model saw beside its own at each step; without their outputs a step would be refused."""
    model = Own(FORMS["mapping"])
    optimizer = horovod_optimizer(model)
    added = []
    with closing(rehearsal_plugin.attach(optimizer, block("der"), model=model)):
        for batch in horovod_batches():
            output = model(batch["x"], batch["labels"])
            output["loss"].backward()
            added.append(len(output["logits"]) - BATCH)
            optimizer.step()
            optimizer.zero_grad()
    return added


def horovod_unasked() -> str:
    """What is said when outputs are recorded and none are given."""
    model = Scores()
    optimizer = horovod_optimizer(model)

    def train() -> None:
        with closing(rehearsal_plugin.attach(optimizer, block("der", inject="loader"))) as handle:
            for batch in handle.loader(horovod_batches(1)):
                torch.autograd.backward(cross_entropy(model(batch["x"]), batch["labels"]))
                optimizer.step()

    return message(train)


@pytest.fixture(scope="module")
def horovod() -> list[Any]:
    pytest.importorskip("horovod.torch")
    from tests.helpers.horovod_ranks import run_horovod

    return [pickle.loads(result) for result in run_horovod(horovod_jobs, 2, timeout_s=60)]


@pytest.mark.horovod
def test_horovod_rows_of_the_loader_bring_the_logits_they_were_given(horovod: Any) -> None:
    given = {row: answer for (own, _), _, _ in horovod for row, answer in own.items()}
    for (own, back), _, _ in horovod:
        assert len(back) == 2 * WANTED * (STEPS - 3)
        assert all(torch.equal(state, given[row]) for row, state in back)
        assert {row in own for row, _ in back} == {True, False}, "rows of both ranks"


@pytest.mark.horovod
def test_horovod_takes_a_models_own_loss(horovod: Any) -> None:
    for _, added, _ in horovod:
        assert added == [0] * 3 + [WANTED] * (STEPS - 3)


@pytest.mark.horovod
def test_horovod_says_that_the_loss_was_not_asked_for(horovod: Any) -> None:
    for _, _, told in horovod:
        assert "'der'" in told
        assert "call rehearsal.loss(criterion, outputs, *targets)" in told
