"""Models that are sharded, adapted or compiled: FSDP2 and DDP without DeepSpeed, ZeRO-3, `torch.compile`."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.integrations.deepspeed import engine as integration
from tests.helpers.ranks import run_ranks
from tests.helpers.witness import BATCH, BLOCK, MADE, Failure, Witness, config_of, engine_of, owner, perform, samples

pytest.importorskip("deepspeed")

STEPS = 10
SECTION = {**BLOCK, "ratio": 0.4, "exchange": {"timeout_s": 20}}


def optimized(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)


# --- without DeepSpeed -----------------------------------------------------------------------------------------------


def looped(folder: Path, wrap: Callable[[Witness], nn.Module]) -> dict[str, Any]:
    """A plain loop, `update` once a step."""
    witness = Witness()
    model = wrap(witness)
    optimizer = optimized(model)
    with Rehearsal(SECTION) as rehearsal:
        for step in range(STEPS):
            model(**rehearsal.update(samples(step))).backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = [full(parameter).flatten() for parameter in witness.parameters()]
    return {"seen": witness.seen, "torn": witness.torn, "weights": torch.cat(weights).tolist()}


def full(parameter: Tensor) -> Tensor:
    whole: Tensor = parameter.detach()
    return whole.full_tensor() if hasattr(whole, "full_tensor") else whole


def sharded(model: Witness) -> nn.Module:
    fully_shard(model.linear)
    fully_shard(model)
    return model


# --- adapted models under ZeRO-3 -------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen layer with a trained product of two small matrices beside it (Hu et al., "LoRA", 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.up(self.down(x))
        return adapted


def frozen(model: Witness) -> nn.Module:
    model.linear.weight.requires_grad_(False)
    return model


def low_rank(model: Witness) -> nn.Module:
    model.linear = LowRank(model.linear)  # type: ignore[assignment]
    return model


def by_peft(model: Witness) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapted: nn.Module = get_peft_model(model, LoraConfig(r=2, target_modules=["linear"]))
    return adapted


def adapted(folder: Path, adapt: Callable[[Witness], nn.Module]) -> dict[str, Any]:
    witness = Witness()
    model = adapt(witness)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = integration.initialize(model=model, model_parameters=trained, config=config_of(SECTION, stage=3))[0]
    MADE.append(engine)
    start = digests(engine)
    for step in range(STEPS):
        engine.backward(engine(**samples(step)))
        engine.step()
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {"seen": witness.seen, "torn": witness.torn, "start": start, "end": digests(engine), "fixed": fixed}


def digests(engine: Any) -> dict[str, str]:
    """A digest of every parameter, gathered from all ranks."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {
            name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
            for name, parameter in engine.module.named_parameters()
        }


ADAPTED = {"frozen": frozen, "low rank": low_rank}
if importlib.util.find_spec("peft"):
    ADAPTED["peft"] = by_peft

# --- compiled models -------------------------------------------------------------------------------------------------

REPLACE, APPEND = {**SECTION, "mode": "replace"}, SECTION  # of 8 rows: 3 or 4 replaced, 5 or 6 appended
COMPILED = {f"append-zero{stage}": (APPEND, stage) for stage in range(4)}
COMPILED |= {f"replace-zero{stage}": (REPLACE, stage) for stage in (0, 3)}


class Linear(nn.Module):
    """A model without side effects, for one graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 10)

    def forward(self, x: Tensor, labels: Tensor, uid: Tensor, even: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.linear(x / 97), labels)


class Backend:
    """Runs graphs as they are, and keeps what they call; each compilation is one graph or more."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward


def compiled_engine(folder: Path, section: dict[str, Any], stage: int) -> dict[str, Any]:
    torch._dynamo.reset()
    model, backend, graphs = Linear(), Backend(), []
    engine = engine_of(config_of(None, stage=stage), model)
    first, second = partial(engine.compile, backend=backend), partial(integration.attach, engine, section)
    for start in (second, first) if stage % 2 else (first, second):  # either may come first
        start()
    for step in range(STEPS):
        engine.backward(engine(**samples(step)))
        engine.step()
        graphs.append(len(backend.graphs))
    return {"graphs": graphs, "calls": backend.graphs, "metrics": engine.rehearsal.metrics()}


def compiled_loop(section: dict[str, Any], **how: Any) -> tuple[list[int], list[int]]:
    """Compilations up to each step, and the rows that the model saw."""
    torch._dynamo.reset()
    backend, model = Backend(), Linear()
    step_of, optimizer = torch.compile(model, backend=backend, **how), optimized(model)
    graphs, sizes = [], []
    with Rehearsal(section) as rehearsal:
        for step in range(STEPS):
            batch = rehearsal.update(samples(step, rank=0))
            step_of(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            graphs.append(len(backend.graphs))
            sizes.append(len(batch["uid"]))
    return graphs, sizes


def compiled_before(folder: Path) -> list[int]:
    """A compiled model given to DeepSpeed; the rows of its partitions, named as the model's own parameters are."""
    model: Any = torch.compile(Linear(), backend="eager")
    engine = engine_of(config_of(SECTION), model)
    for step in range(STEPS):
        engine.backward(engine(*samples(step).values()))
        engine.step()
    return [int(n) for name, n in engine.rehearsal.metrics().items() if name.startswith("rows_stored/")]


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "ddp": partial(looped, wrap=DistributedDataParallel),
    "fsdp2": partial(looped, wrap=sharded),
    **{name: partial(adapted, adapt=adapt) for name, adapt in ADAPTED.items()},
    **{name: partial(compiled_engine, section=section, stage=stage) for name, (section, stage) in COMPILED.items()},
    "compiled before": compiled_before,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(perform, 2, SCENARIOS, tmp_path_factory.mktemp("models"), timeout_s=240)


@pytest.fixture
def found(request: pytest.FixtureRequest, outcomes: list[dict[str, Any]]) -> list[Any]:
    """What each rank found in the scenario that the test names."""
    if request.param not in SCENARIOS:
        pytest.skip(f"{request.param} is not installed")
    ranks = [outcome[request.param] for outcome in outcomes]
    for rank, outcome in enumerate(ranks):
        if isinstance(outcome, Failure):
            pytest.fail(f"rank {rank} raised:\n{outcome.trace}")
    return ranks


def scenario(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", names, indirect=True)


@scenario("ddp", "fsdp2", "frozen", "low rank", "peft")
def test_rows_of_both_ranks_are_replayed_whole(found: list[Any]) -> None:
    for number, rank in enumerate(found):
        own = [samples(step, rank=number)["uid"].tolist() for step in range(STEPS)]
        assert [uids[:BATCH] for uids in rank["seen"]] == own
        assert {owner(uid) for uids in rank["seen"] for uid in uids[BATCH:]} == {0, 1}
        assert rank["torn"] == 0


@scenario("ddp", "fsdp2")
def test_parameters_are_the_same_on_both_ranks(found: list[Any]) -> None:
    assert found[0]["weights"] == found[1]["weights"]


def test_fsdp2_and_ddp_train_on_the_same_rows_to_the_same_parameters(outcomes: list[dict[str, Any]]) -> None:
    for rank in outcomes:
        assert rank["fsdp2"]["seen"] == rank["ddp"]["seen"]
        torch.testing.assert_close(torch.tensor(rank["fsdp2"]["weights"]), torch.tensor(rank["ddp"]["weights"]))


@scenario("frozen", "low rank", "peft")
def test_under_zero3_frozen_parameters_stay_and_all_others_are_trained_alike(found: list[Any]) -> None:
    assert found[0]["end"] == found[1]["end"]
    for rank in found:
        unchanged = {name for name, digest in rank["start"].items() if rank["end"][name] == digest}
        assert unchanged == rank["fixed"] != set()


@scenario(*COMPILED)
def test_a_compiled_engine_is_compiled_anew_only_when_the_first_rows_are_replayed(found: list[Any]) -> None:
    """ZeRO-3 cuts the model into several graphs, which are compiled in the same steps."""
    for rank in found:
        assert rank["metrics"]["rows_replayed"] > 0
        anew = [step for step, (before, after) in enumerate(pairwise([0, *rank["graphs"]])) if after > before]
        assert anew in ([0], [0, 3])


@scenario(*(name for name in COMPILED if name.startswith("replace")))
def test_with_replace_an_engine_is_compiled_once(found: list[Any]) -> None:
    for rank in found:
        assert len(set(rank["graphs"])) == 1


@scenario(*COMPILED)
def test_rows_are_injected_outside_the_compiled_region(found: list[Any]) -> None:
    for rank in found:
        assert rank["calls"]
        assert not [call for calls in rank["calls"] for call in calls if call.startswith("<built-in method cat ")]


@scenario("compiled before")
def test_the_fields_of_a_compiled_model_have_the_names_of_its_parameters(found: list[Any]) -> None:
    assert [len(rows) for rows in found] == [10, 10]


@pytest.mark.parametrize(
    ("section", "most"), [(REPLACE, 1), ({**BLOCK, "ratio": None, "representatives": 3}, 2), (APPEND, 2)]
)
def test_a_compiled_model_in_a_plain_loop_settles_with_the_first_replayed_rows(
    section: dict[str, Any], most: int
) -> None:
    graphs, sizes = compiled_loop(section)
    assert graphs[2:] == [most] * (STEPS - 2)
    assert len(set(sizes[2:])) == 1 + (section is APPEND)


def test_with_fixed_shapes_there_is_one_compilation_for_each_number_of_rows() -> None:
    graphs, sizes = compiled_loop(APPEND, dynamic=False)
    assert graphs[-1] == len(set(sizes)) == 3
