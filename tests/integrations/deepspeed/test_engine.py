"""DeepSpeed engines with a rehearsal block, on real gloo ranks."""

from __future__ import annotations

import base64
import csv
import hashlib
import inspect
import json
import logging
import math
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rehearsal_plugin
from rehearsal_plugin.errors import BatchError, ConfigError, RehearsalError
from rehearsal_plugin.integrations.deepspeed import engine as integration
from tests.helpers.errors import message
from tests.helpers.ranks import run_ranks
from tests.helpers.witness import (
    BATCH,
    BLOCK,
    MADE,
    Failure,
    Witness,
    config_of,
    engine_of,
    owner,
    perform,
    samples,
    sockets,
    threads,
    train,
)

pytest.importorskip("deepspeed")

STEPS = 8
LEAD = 3  # optimizer steps from offering a row to seeing it at the earliest

# --- training over all ZeRO stages -----------------------------------------------------------------------------------

GRID = [(2, stage, gas, bf16) for stage in range(4) for gas in (1, 2) for bf16 in (False, True)]
GRID += [(4, stage, 1, False) for stage in range(4)]


def trained(folder: Path, *, stage: int, gas: int, bf16: bool) -> dict[str, Any]:
    engine = engine_of(config_of({**BLOCK, "ratio": 0.4}, stage=stage, gas=gas, bf16=bf16))
    start = weights(engine, stage)
    train(engine, STEPS, dtype=torch.bfloat16 if bf16 else torch.float32)
    model = engine.module
    found = {
        "seen": model.seen,
        "torn": model.torn,
        "spoilt": model.spoilt,
        "weights": weights(engine, stage),
        "start": start,
    }
    engine.destroy()  # the exchange of the last step has ended and was counted
    return {**found, "metrics": engine.rehearsal.metrics()}


def weights(engine: Any, stage: int) -> str:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        whole = torch.cat([parameter.detach().float().flatten() for parameter in engine.module.parameters()])
    return hashlib.sha256(whole.numpy().tobytes()).hexdigest()


def grid_name(case: tuple[int, int, int, bool]) -> str:
    size, stage, gas, bf16 = case
    return f"{size}ranks-zero{stage}-accumulation{gas}-{'bf16' if bf16 else 'fp32'}"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for size in (2, 4):
        cases = {
            grid_name((ranks, stage, gas, bf16)): partial(trained, stage=stage, gas=gas, bf16=bf16)
            for ranks, stage, gas, bf16 in GRID
            if ranks == size
        }
        found |= by_scenario(run_ranks(perform, size, cases, tmp_path_factory.mktemp("grid"), timeout_s=240))
    return found


def by_scenario(ranks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.fixture(params=GRID, ids=grid_name)
def job(request: pytest.FixtureRequest, grid: dict[str, list[Any]]) -> Any:
    return Namespace(ranks=checked(grid[grid_name(request.param)]), size=request.param[0], gas=request.param[2])


def checked(ranks: list[Any]) -> list[Any]:
    for rank, found in enumerate(ranks):
        if isinstance(found, Failure):
            pytest.fail(f"rank {rank} raised:\n{found.trace}")
    return ranks


def test_all_fields_of_every_replayed_row_belong_together(job: Any) -> None:
    assert [rank["torn"] for rank in job.ranks] == [0] * job.size
    assert all(rank["metrics"]["rows_replayed"] > 0 for rank in job.ranks)


def test_a_batch_keeps_its_own_rows_first_and_bit_identical(job: Any) -> None:
    assert [rank["spoilt"] for rank in job.ranks] == [0] * job.size
    for number, rank in enumerate(job.ranks):
        own = [samples(i, rank=number)["uid"].tolist() for i in range(STEPS * job.gas)]
        assert [uids[:BATCH] for uids in rank["seen"]] == own


def test_replayed_rows_are_of_all_ranks_and_of_earlier_steps(job: Any) -> None:
    for number, rank in enumerate(job.ranks):
        replayed = [(i // job.gas, uid) for i, uids in enumerate(rank["seen"]) for uid in uids[BATCH:]]
        assert {owner(uid) for _, uid in replayed} == set(range(job.size)), f"on rank {number}"
        batches = [(step, uid % (BATCH * 1000) // BATCH) for step, uid in replayed]
        assert all(batch // job.gas <= step - LEAD for step, batch in batches)


def test_the_ratio_is_met_in_every_micro_batch(job: Any) -> None:
    per_batch = BATCH * Fraction(2, 5) / (1 - Fraction(2, 5))
    due = [math.floor((i + 1) * per_batch) - math.floor(i * per_batch) for i in range((STEPS - LEAD) * job.gas)]
    for rank in job.ranks:
        assert [len(uids) - BATCH for uids in rank["seen"]] == [0] * (LEAD * job.gas) + due


def test_parameters_stay_alike_on_all_ranks(job: Any) -> None:
    assert len({rank["weights"] for rank in job.ranks}) == 1
    assert job.ranks[0]["weights"] != job.ranks[0]["start"]


def test_there_is_one_exchange_an_optimizer_step(job: Any) -> None:
    for rank in job.ranks:
        assert rank["metrics"]["steps"] == STEPS
        assert rank["metrics"]["collectives"] == 2 * STEPS - 1  # headers and rows; at first there is no row


# --- what is injected, and into what ---------------------------------------------------------------------------------


class Noting(nn.Module):
    """Keeps what its forward was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)
        self.calls: list[Any] = []

    def answer(self, x: Tensor, given: Any) -> Tensor:
        self.calls.append(given)
        loss: Tensor = self.linear(x).mean()
        return loss


class Nested(Noting):
    def forward(self, inputs: Any, *, meta: Any) -> Tensor:
        return self.answer(inputs["x"], (inputs, meta))


class Variadic(Noting):
    def forward(self, *tensors: Any) -> Tensor:
        return self.answer(tensors[0], tensors)


def run_steps(engine: Any, call: Callable[[dict[str, Tensor]], Tensor], steps: int = 5) -> None:
    for number in range(steps):
        engine.backward(call(samples(number)))
        engine.step()


def positional(folder: Path) -> dict[str, Any]:
    engine = engine_of(config_of(BLOCK))
    run_steps(engine, lambda batch: engine(batch["x"], batch["labels"], even=batch["even"], uid=batch["uid"]))
    return {"torn": engine.module.torn, "seen": engine.module.seen, "metrics": engine.rehearsal.metrics()}


def nested(folder: Path) -> dict[str, Any]:
    block = {"representatives": 3, "buffer": {"partition_by": "inputs.pair.0", "capacity": 99}}
    engine = engine_of(config_of(block), Nested())
    fixed, scalar = torch.arange(3), torch.tensor(2.0)

    def call(batch: dict[str, Tensor]) -> Tensor:
        inputs = {"x": batch["x"], "pair": (batch["labels"], [batch["uid"]])}
        loss: Tensor = engine(inputs, meta={"name": "text", "fixed": fixed, "scalar": scalar, "none": None})
        return loss

    run_steps(engine, call)
    inputs, meta = engine.module.calls[-1]
    return {
        "types": [type(inputs["pair"]), type(inputs["pair"][1])],
        "rows": [len(inputs["x"]), len(inputs["pair"][0]), len(inputs["pair"][1][0])],
        "labels": (inputs["pair"][1][0] % 10 == inputs["pair"][0]).all().item(),
        "same": meta["fixed"] is fixed and meta["scalar"] is scalar and meta["none"] is None,
        "name": meta["name"],
        "partitions": [name for name in engine.rehearsal.metrics() if name.startswith("rows_stored/")],
    }


def variadic(folder: Path) -> list[int]:
    engine = engine_of(config_of({"representatives": 2, "buffer": {"partition_by": "1", "capacity": 99}}), Variadic())
    run_steps(engine, lambda batch: engine(batch["x"], batch["labels"]))
    return [len(tensor) for tensor in engine.module.calls[-1]]


def chosen_fields(folder: Path) -> list[int]:
    engine = engine_of(config_of({"representatives": 2, "fields": ["0", "2"]}), Variadic())
    run_steps(engine, lambda batch: engine(batch["x"], batch["labels"], batch["uid"]))
    return [len(tensor) for tensor in engine.module.calls[-1]]


def replacing(folder: Path) -> dict[str, Any]:
    engine = engine_of(config_of({**BLOCK, "mode": "replace"}))
    for number in range(7):
        engine.backward(engine(**samples(number)))
        engine.step()
    return {"seen": engine.module.seen, "torn": engine.module.torn, "metrics": engine.rehearsal.metrics()}


def evaluation(folder: Path) -> dict[str, Any]:
    engine = engine_of(config_of(BLOCK))
    train(engine, 5)
    before = counted(engine)
    engine.eval()
    engine(**samples(50))
    engine.train()
    with torch.no_grad():
        engine(**samples(51))
    after = counted(engine)
    train(engine, 1, first=5)
    return {"sizes": [len(uids) for uids in engine.module.seen], "unchanged": before == after}


def counted(engine: Any) -> dict[str, float]:
    """What the training thread counts."""
    names = ("steps", "rows_offered", "rows_stored", "rows_replayed", "waited_ms")
    return {name: value for name, value in engine.rehearsal.metrics().items() if name in names}


def language_model(folder: Path) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    engine = engine_of(config_of({"representatives": 3}), model)
    sizes = []
    for step in range(5):
        tokens = torch.randint(64, (BATCH, 16), generator=torch.Generator().manual_seed(step))
        output = engine(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
        engine.backward(output.loss)
        engine.step()
        sizes.append(len(output.logits))
    return {"sizes": sizes, "loss": output.loss.item()}


def signature(folder: Path) -> bool:
    import deepspeed

    engine = engine_of(config_of(BLOCK))
    plain = deepspeed.DeepSpeedEngine
    return all(
        inspect.signature(getattr(engine, name)) == inspect.signature(MethodType(getattr(plain, name), engine))
        for name in ("forward", "step", "destroy")
    )


# --- what is refused -------------------------------------------------------------------------------------------------


def refusals(folder: Path) -> dict[str, str]:
    engine = engine_of(config_of(BLOCK))
    batch = samples(0)
    engine.backward(engine(batch["x"], batch["labels"], batch["uid"], batch["even"]))
    engine.step()
    long = {**samples(1), "x": torch.zeros(BATCH, 7)}
    return {
        "shape": message(BatchError, lambda: engine(*long.values())),
        "twice": message(TypeError, lambda: engine(batch["x"], batch["labels"], x=batch["x"])),
        "items": message(ConfigError, lambda: engine(**batch, num_items_in_batch=8)),
        "attached": message(ConfigError, lambda: rehearsal_plugin.attach(engine)),
        "loader": message(ConfigError, lambda: engine.rehearsal.loader([batch])),
        "stranger": message(ConfigError, lambda: rehearsal_plugin.attach(nn.Linear(1, 1))),
    }


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(x)
        return scores


def outside(folder: Path) -> dict[str, Any]:
    """The loss outside the model, with rows injected at its forward."""
    refused = {}
    for mode in ("append", "replace"):
        engine = engine_of(config_of({"representatives": 2, "mode": mode}), Scores())
        before = weights(engine, 0)
        batch = samples(0)
        loss = nn.functional.cross_entropy(engine(batch["x"]), batch["labels"])
        refused[mode] = message(BatchError, partial(engine.backward, loss))
        refused[f"{mode}, learnt"] = str(weights(engine, 0) != before)
        engine.destroy()
    return refused


def unfed(folder: Path) -> dict[str, str]:
    def step(block: dict[str, Any], *, inside: bool) -> str:
        engine = engine_of(config_of({**BLOCK, **block}))
        model = engine.module if inside else engine
        engine.backward(model(**samples(0)))
        text = message(ConfigError, engine.step)
        engine.destroy()
        return text

    return {"forward": step({}, inside=True), "loader": step({"inject": "loader"}, inside=False)}


# --- no rehearsal, and the end of one --------------------------------------------------------------------------------


def switched_off(folder: Path) -> dict[str, Any]:
    import deepspeed

    model = Witness()
    plain = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config_of())[0]
    state = threads(), sockets()
    engines = {"no block": engine_of(config_of()), "disabled": engine_of(config_of({**BLOCK, "enabled": False}))}
    losses = train(plain, 4)
    return {
        name: {
            "added": sorted(vars(engine).keys() - vars(plain).keys()),
            "bound": [
                getattr(engine, method).__func__ is getattr(deepspeed.DeepSpeedEngine, method)
                for method in ("forward", "step", "destroy")
            ],
            "enabled": engine.rehearsal.enabled,
            "metrics": engine.rehearsal.metrics(),
            "loader": engine.rehearsal.loader(losses) is losses,
            "same loss": train(engine, 4) == losses,
            "closed": engine.rehearsal.close(),
            "untouched": (threads(), sockets()) == state,
        }
        for name, engine in engines.items()
    }


def warned(folder: Path) -> dict[str, list[str]]:
    """Warnings where engines without a section are attached: by hand twice, and by the patch of `run`."""
    integration._warn_without_section.cache_clear()
    by_hand = warnings_of(lambda: [engine_of(config_of()) for _ in range(2)])
    integration._warn_without_section.cache_clear()

    def patched() -> None:
        original = deepspeed.initialize
        integration.patch()
        try:
            model = Witness()
            MADE.append(deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config_of())[0])
        finally:
            deepspeed.initialize = original

    import deepspeed

    return {"by hand": by_hand, "patched": warnings_of(patched)}


def warnings_of(call: Callable[[], object]) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("rehearsal_plugin")
    logger.addHandler(handler)
    try:
        call()
    finally:
        logger.removeHandler(handler)
    return lines


def endings(folder: Path) -> dict[str, Any]:
    idle = threads(), sockets()
    engine = engine_of(config_of(BLOCK))
    train(engine, 4)
    running = threads(), sockets()
    engine.destroy()
    engine.destroy()
    ended = threads(), sockets()
    again = engine_of(config_of(BLOCK))
    train(again, 4)
    rows = again.rehearsal.metrics()["rows_replayed"]
    again.rehearsal.close()
    again.rehearsal.close()
    train(again, 2, first=4)
    closed = {"enabled": again.rehearsal.enabled, "sizes": [len(uids) for uids in again.module.seen]}
    rehearsal_plugin.attach(again)
    train(again, 4, first=6)
    reattached = [len(uids) for uids in again.module.seen[6:]]
    again.destroy()
    return {"idle": idle, "running": running, "ended": ended, "rows": rows, "closed": closed, "reattached": reattached}


def two_engines(folder: Path) -> dict[str, Any]:
    first, second = engine_of(config_of(BLOCK)), engine_of(config_of({**BLOCK, "ratio": 0.5}))
    for step in range(5):
        train(first, 1, first=step)
        train(second, 1, first=100 + step)
    batches = [
        {uid % (BATCH * 1000) // BATCH for uids in engine.module.seen for uid in uids} for engine in (first, second)
    ]
    offered = [engine.rehearsal.metrics()["rows_offered"] for engine in (first, second)]
    first.destroy()
    train(second, 1, first=105)
    return {"batches": batches, "offered": offered, "torn": first.module.torn + second.module.torn}


# --- configs, monitor, checkpoints -----------------------------------------------------------------------------------


def config_forms(folder: Path) -> dict[str, Any]:
    config = config_of(BLOCK)
    folder.mkdir(exist_ok=True)
    path = folder / f"config{dist.get_rank()}.json"
    path.write_text(json.dumps(config))
    coded = base64.urlsafe_b64encode(path.read_bytes()).decode()
    forms: dict[str, dict[str, Any]] = {
        "dict": {"config": config},
        "path": {"config": str(path)},
        "base64": {"config": coded},
        "config_params": {"config_params": config},
        "args": {"args": Namespace(deepspeed_config=str(path))},
    }
    return {name: started(**form) for name, form in forms.items()}


def started(**form: Any) -> tuple[bool, list[str]]:
    import deepspeed

    model = Witness()
    engine, optimizer, loader, scheduler = rehearsal_plugin.initialize(
        model=model, model_parameters=model.parameters(), **form
    )
    same = isinstance(engine, deepspeed.DeepSpeedEngine) and optimizer is engine.optimizer
    train(engine, 4)
    replayed = engine.rehearsal.metrics()["rows_replayed"]
    engine.destroy()
    return engine.rehearsal.enabled is False and replayed > 0, [] if same and loader is scheduler is None else ["odd"]


def explicit_section(folder: Path) -> list[float]:
    """A section of its own wins over the one in the engine's config, in any form."""
    folder.mkdir(exist_ok=True)
    path = folder / f"rehearsal{dist.get_rank()}.yaml"
    path.write_text("rehearsal: {representatives: 5, buffer: {capacity: 100}}\n")
    import deepspeed

    model = Witness()
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config_of(BLOCK))[0]
    handle = rehearsal_plugin.attach(engine, path)
    train(engine, 5)
    engine.destroy()
    return [float(len(uids)) for uids in model.seen] + [handle.metrics()["rows_replayed"]]


def monitored(folder: Path) -> dict[str, Any]:
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "job"}
    engine = engine_of(config_of(BLOCK, csv_monitor=monitor))
    train(engine, 5)
    return {"metrics": engine.rehearsal.metrics(), "folder": folder / "job", "samples": engine.global_samples}


def checkpointed(folder: Path) -> dict[str, Any]:
    engine = engine_of(config_of(BLOCK, stage=1))
    train(engine, 4)
    saved = weights(engine, 1)
    engine.save_checkpoint(folder)
    train(engine, 2, first=4)
    moved = weights(engine, 1)
    path, _ = engine.load_checkpoint(folder)
    loaded, step = weights(engine, 1), engine.global_steps
    train(engine, 2, first=6)
    block = torch.load(next(Path(path).parent.glob("mp_rank_00_*")), weights_only=False)["ds_config"]["rehearsal"]
    return {"weights": [saved, loaded, moved], "step": step, "block": block, "torn": engine.module.torn}


RESUMED = [(stage, gas) for stage in range(4) for gas in (1, 2)]


def resumed(folder: Path, *, stage: int, gas: int) -> dict[str, Any]:
    """The second half of a run: as it was, and by an engine that began with the checkpoint of its middle."""
    folder = Path(exchanged(str(folder)))
    config = config_of({**BLOCK, "ratio": 0.4, "strategy": {"name": "er"}}, stage=stage, gas=gas)
    whole = engine_of(config)
    train(whole, STEPS)
    whole.save_checkpoint(folder)
    seen = len(whole.module.seen)
    train(whole, STEPS, first=STEPS * gas)
    parameters = weights(whole, stage)
    whole.destroy()  # the exchange of the last step has ended and was counted
    halves = {"whole": (whole.module.seen[seen:], parameters, whole.rehearsal.metrics())}
    again = engine_of(config)
    again.load_checkpoint(folder)
    train(again, STEPS, first=STEPS * gas)
    parameters = weights(again, stage)
    again.destroy()
    halves["resumed"] = again.module.seen, parameters, again.rehearsal.metrics()
    return {**halves, "files": sorted(path.name for path in folder.rglob("rehearsal-*"))}


def exchanged(text: str) -> str:
    """What rank 0 says."""
    told = [text]
    dist.broadcast_object_list(told)
    return told[0]


def without_buffer(folder: Path) -> dict[str, Any]:
    folder = Path(exchanged(str(folder)))
    plain = engine_of(config_of({**BLOCK, "checkpoint": {"enabled": False}}))
    train(plain, 6)
    plain.save_checkpoint(folder, tag="plain")
    plain.destroy()
    engine = engine_of(config_of(BLOCK))
    engine.load_checkpoint(folder, tag="plain")
    empty = engine.rehearsal.rehearsal.buffer is None
    train(engine, 6, first=6)
    engine.save_checkpoint(folder, tag="full")
    engine.load_checkpoint(folder, tag="full", load_module_only=True)
    kept = engine.rehearsal.rehearsal.buffer.slot_index.count
    torn = engine.module.torn
    engine.destroy()
    return {"empty": empty, "kept": kept, "torn": torn, "files": [p.name for p in folder.glob("plain/rehearsal-*")]}


SCENARIOS = (
    positional, nested, variadic, chosen_fields, replacing, evaluation, language_model, signature, refusals, unfed,
    switched_off, warned, outside, endings, two_engines, config_forms, explicit_section, monitored, checkpointed,
    without_buffer,
)  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    scenarios = {scenario.__name__: scenario for scenario in SCENARIOS}
    return by_scenario(run_ranks(perform, 2, scenarios, tmp_path_factory.mktemp("scenarios"), timeout_s=240))


@pytest.fixture
def found(request: pytest.FixtureRequest, outcomes: dict[str, list[Any]]) -> list[Any]:
    """What each rank found in the scenario that the test names."""
    return checked(outcomes[request.param.__name__])


def scenario(function: Callable[[Path], Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", [function], indirect=True, ids=[function.__name__])


@scenario(positional)
def test_positional_arguments_are_fields_by_the_names_of_the_models_parameters(found: list[Any]) -> None:
    for rank in found:
        assert rank["torn"] == 0
        assert [len(uids) for uids in rank["seen"]] == [8, 8, 8, 10, 11]
        assert sum(n for name, n in rank["metrics"].items() if name.startswith("rows_stored/")) == 40


@scenario(nested)
def test_nested_arguments_keep_their_form_and_what_is_no_row_passes_through(found: list[Any]) -> None:
    for rank in found:
        assert rank["types"] == [tuple, list]
        assert rank["rows"] == [BATCH + 3] * 3
        assert rank["labels"]
        assert rank["same"]
        assert rank["name"] == "text"
        assert len(rank["partitions"]) == 10


@scenario(variadic)
def test_a_model_that_takes_any_arguments_has_them_numbered(found: list[Any]) -> None:
    assert found == [[BATCH + 2, BATCH + 2]] * 2


@scenario(chosen_fields)
def test_only_the_chosen_fields_make_up_a_row(found: list[Any]) -> None:
    assert found == [[BATCH + 2, BATCH, BATCH + 2]] * 2


@scenario(replacing)
def test_replace_keeps_the_size_and_offers_displaced_rows_all_the_same(found: list[Any]) -> None:
    for number, rank in enumerate(found):
        assert rank["torn"] == 0
        for step, uids in enumerate(rank["seen"]):
            replayed = 2 if step >= LEAD else 0
            assert len(uids) == BATCH
            assert uids[: BATCH - replayed] == samples(step, rank=number)["uid"].tolist()[: BATCH - replayed]
        assert rank["metrics"]["rows_displaced"] == rank["metrics"]["rows_replayed"] == 8
        assert rank["metrics"]["rows_offered"] == 7 * BATCH


@scenario(evaluation)
def test_evaluation_and_no_grad_passes_are_left_alone(found: list[Any]) -> None:
    for rank in found:
        assert rank["sizes"] == [8, 8, 8, 10, 11, 8, 8, 11]
        assert rank["unchanged"]


@scenario(language_model)
def test_a_transformers_model_gets_replayed_rows(found: list[Any]) -> None:
    for rank in found:
        assert rank["sizes"] == [8, 8, 8, 11, 11]
        assert math.isfinite(rank["loss"])


@scenario(signature)
def test_the_engines_methods_keep_their_signatures(found: list[Any]) -> None:
    assert found == [True, True]


@scenario(refusals)
def test_refusals_name_the_cause(found: list[Any]) -> None:
    for rank in found:
        assert "'x' must have shape (8, 6)" in rank["shape"]
        assert "multiple values for argument 'x'" in rank["twice"]
        assert "num_items_in_batch" in rank["items"]
        assert "has a rehearsal already" in rank["attached"]
        assert "rehearsal.inject is 'forward'" in rank["loader"]
        assert "not a Linear" in rank["stranger"]


@scenario(outside)
def test_a_loss_outside_the_model_is_refused_in_the_first_backward_pass(found: list[Any]) -> None:
    for rank in found:
        for mode in ("append", "replace"):
            assert "set rehearsal.inject to 'loader'" in rank[mode]
            assert rank[f"{mode}, learnt"] == "False"


@scenario(unfed)
def test_a_job_whose_batches_miss_the_rehearsal_is_told(found: list[Any]) -> None:
    for rank in found:
        assert "call the engine" in rank["forward"]
        assert "engine.rehearsal.loader(...)" in rank["loader"]


@scenario(switched_off)
def test_without_a_block_or_switched_off_the_engine_is_untouched(found: list[Any]) -> None:
    expected = {
        "added": ["rehearsal"],
        "bound": [True, True, True],
        "enabled": False,
        "metrics": {},
        "loader": True,
        "same loss": True,
        "closed": None,
        "untouched": True,
    }
    assert found == [{"no block": expected, "disabled": expected}] * 2


@scenario(warned)
def test_an_engine_without_a_section_is_told_of_once(found: list[Any]) -> None:
    for rank in found:
        assert len(rank["by hand"]) == 1
        assert "has no section 'rehearsal'" in rank["by hand"][0]
        assert rank["patched"] == []


@scenario(endings)
def test_destroy_ends_thread_and_group_and_another_engine_may_follow(found: list[Any]) -> None:
    for rank in found:
        (idle_threads, idle_sockets), (running_threads, running_sockets) = rank["idle"], rank["running"]
        assert running_threads == idle_threads + 2, "the background, and who waits for messages"
        assert running_sockets > idle_sockets
        assert rank["ended"] == rank["idle"]
        assert rank["rows"] > 0


@scenario(endings)
def test_after_close_training_goes_on_without_rows_and_attach_may_follow(found: list[Any]) -> None:
    for rank in found:
        assert rank["closed"] == {"enabled": False, "sizes": [8, 8, 8, 10, 8, 8]}
        assert rank["reattached"] == [8, 8, 8, 10]


@scenario(two_engines)
def test_two_engines_have_a_buffer_each(found: list[Any]) -> None:
    for rank in found:
        assert rank["batches"] == [set(range(5)), set(range(100, 105))]
        assert rank["offered"] == [5 * BATCH, 5 * BATCH]
        assert rank["torn"] == 0


@scenario(config_forms)
def test_initialize_takes_every_form_of_config_and_returns_what_deepspeed_does(found: list[Any]) -> None:
    for rank in found:
        assert rank.keys() == {"dict", "path", "base64", "config_params", "args"}
        assert all(outcome == (True, []) for outcome in rank.values()), rank


@scenario(explicit_section)
def test_attach_takes_a_section_of_its_own(found: list[Any]) -> None:
    assert found == [[8, 8, 8, 13, 13, 10]] * 2


@scenario(monitored)
def test_metrics_reach_deepspeeds_monitor(found: list[Any]) -> None:
    metrics, folder = found[0]["metrics"], found[0]["folder"]
    for name in ("rows_offered", "rows_stored", "rows_replayed", "rows_stored/3", "waited_ms"):
        with (folder / f"Train_Rehearsal_{name.replace('/', '_')}.csv").open() as file:
            rows = list(csv.reader(file))
        assert rows[0][0] == "step"
        assert len(rows) == 1 + 5
        assert float(rows[-1][0]) == found[0]["samples"]
        assert float(rows[-1][1]) == pytest.approx(metrics[name])


@scenario(checkpointed)
def test_checkpoints_keep_working(found: list[Any]) -> None:
    for rank in found:
        saved, loaded, moved = rank["weights"]
        assert saved == loaded != moved
        assert rank["step"] == 4
        assert rank["block"] == BLOCK
        assert rank["torn"] == 0


@pytest.fixture(scope="module")
def resumptions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases = {f"zero{stage}-accumulation{gas}": partial(resumed, stage=stage, gas=gas) for stage, gas in RESUMED}
    return by_scenario(run_ranks(perform, 2, cases, tmp_path_factory.mktemp("resumptions"), timeout_s=240))


@pytest.mark.parametrize(("stage", "gas"), RESUMED)
def test_a_resumed_job_goes_on_bit_for_bit(stage: int, gas: int, resumptions: dict[str, list[Any]]) -> None:
    for rank in checked(resumptions[f"zero{stage}-accumulation{gas}"]):
        (seen, parameters, metrics), (again, same, counted) = rank["whole"], rank["resumed"]
        assert again == seen
        assert same == parameters
        assert all(counted[name] == value for name, value in metrics.items() if not name.endswith("_ms"))
        assert counted["rows_replayed"] > 0
        assert rank["files"] == [f"rehearsal-step{STEPS}-rank{r}-of-2.safetensors" for r in range(2)]


@scenario(without_buffer)
def test_a_checkpoint_without_a_buffer_can_be_loaded_and_weights_alone_too(found: list[Any]) -> None:
    for rank in found:
        assert rank["empty"]
        assert rank["kept"] == 6 * BATCH
        assert rank["torn"] == 0
        assert rank["files"] == []


def test_errors_of_the_integration_are_errors_of_the_package() -> None:
    with pytest.raises(RehearsalError, match="make a Rehearsal"):
        rehearsal_plugin.attach(object())
