"""Horovod's optimizer with a rehearsal, on real ranks of `horovodrun`."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rehearsal_plugin
from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport.horovod import HorovodTransport
from rehearsal_plugin.errors import ConfigError, ExchangeError, ExchangeTimeout
from rehearsal_plugin.integrations.horovod import HorovodHandle, patch
from tests.helpers.horovod_ranks import ROOT, perform, run_horovod, try_horovod
from tests.helpers.samples import intact, new_batch, rank_of, step_of

pytest.importorskip("horovod.torch")
pytestmark = pytest.mark.horovod

SIZE, STEPS = 6, 9
LEAD = 3  # optimizer steps from offering a row to seeing it at the earliest
SECTION = {"buffer": {"capacity": 500, "partition_by": "label"}, "representatives": 5}


class Model(nn.Module):
    """Notes the ids of the rows of every pass, and whether all fields of every row belong together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.branch = nn.Linear(3, 5), nn.Linear(3, 5)
        self.seen: list[list[int]] = []
        self.whole = True

    def forward(self, x: Tensor, half: Tensor, odd: Tensor, id: Tensor, label: Tensor, branch: bool = True) -> Tensor:
        self.seen.append(id.tolist())
        self.whole &= intact({"x": x, "half": half, "odd": odd, "id": id, "label": label})
        features = x.float() / 1e6
        scores = self.linear(features) + (self.branch(features) if branch else 0)
        return nn.functional.cross_entropy(scores, label)

    def digest(self) -> str:
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.parameters())).hexdigest()


def optimizer_of(model: nn.Module, kind: Callable[..., Any] = torch.optim.SGD, **options: Any) -> Any:
    import horovod.torch as hvd

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return hvd.DistributedOptimizer(kind(model.parameters(), lr=0.1), list(model.named_parameters()), **options)


Backward = Callable[[Model, int], None]


def backward(model: Model, number: int) -> None:
    import horovod.torch as hvd

    model(**new_batch(hvd.rank(), number, SIZE)).backward()


def train(
    backward: Backward = backward,
    finish: Callable[[Any, Model], None] | None = None,
    passes: int = 1,
    prepare: Callable[[Any], None] = lambda optimizer: None,
    **options: Any,
) -> dict[str, Any]:
    """Train some steps; what a rank found out."""
    model = Model()
    start = model.digest()
    optimizer = optimizer_of(model, backward_passes_per_step=passes, **options)
    with closing(rehearsal_plugin.attach(optimizer, model=model, config=SECTION)) as handle:
        prepare(optimizer)
        for step in range(STEPS):
            for micro in range(passes):
                backward(model, step * passes + micro)
            if finish is None:
                optimizer.step()
            else:
                finish(optimizer, model)
            optimizer.zero_grad()
    return {
        "seen": model.seen,
        "whole": model.whole,
        "metrics": handle.metrics(),
        "learnt": model.digest() != start,
        "digest": model.digest(),
    }


def clipped(optimizer: Any, model: Model) -> None:
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with optimizer.skip_synchronize():
        optimizer.step()


def half_used(model: Model, number: int) -> None:
    import horovod.torch as hvd

    model(**new_batch(hvd.rank(), number, SIZE), branch=hvd.rank() == 0).backward()


def sometimes_idle(model: Model, number: int) -> None:
    import horovod.torch as hvd

    loss = model(**new_batch(hvd.rank(), number, SIZE))
    if hvd.rank() == 0 or number % 3:
        loss.backward()  # in the other steps Horovod averages zeros of this rank


def talking(model: Model, number: int) -> None:
    """A pass with operations without a name before, in and after it, and more of them in some steps."""
    import horovod.torch as hvd

    ones, ranks = torch.ones(3), hvd.size()
    open_until_the_end = hvd.allreduce_async(ones, op=hvd.Sum)
    loss = model(**new_batch(hvd.rank(), number, SIZE))
    assert hvd.broadcast(torch.tensor([hvd.rank()]), root_rank=1).item() == 1
    loss.backward()
    assert hvd.allreduce(ones, op=hvd.Sum).tolist() == [ranks] * 3
    if number % 2:
        assert hvd.broadcast_object(number, root_rank=0) == number
    assert hvd.synchronize(open_until_the_end).tolist() == [ranks] * 3


def talking_step(optimizer: Any, model: Model) -> None:
    import horovod.torch as hvd

    across = hvd.allreduce_async(torch.ones(1), op=hvd.Sum)
    optimizer.step()
    after = hvd.allreduce_async(torch.ones(2), op=hvd.Sum)
    assert hvd.allgather(torch.ones(1)).tolist() == [1.0] * hvd.size()
    assert hvd.synchronize(across).tolist() == [hvd.size()]
    assert hvd.synchronize(after).tolist() == [hvd.size()] * 2


def scheduled() -> dict[str, Any]:
    schedules: dict[int, Any] = {}

    def step(optimizer: Any, model: Model) -> None:
        schedule = schedules.setdefault(id(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 2))
        optimizer.step()
        schedule.step()

    return train(finish=step, kind=torch.optim.AdamW)


def broken_once() -> dict[str, Any]:
    """An error inside one step, caught by the script: steps are still counted right afterwards."""
    failures = [RuntimeError("once")]

    def step(optimizer: Any, model: Model) -> None:
        def fail(*_: Any) -> None:
            raise failures.pop()

        if failures:
            hook = optimizer.register_step_pre_hook(fail)
            with suppress(RuntimeError):
                optimizer.step()
            hook.remove()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                torch.optim.SGD.step(optimizer)
        else:
            optimizer.step()

    return train(finish=step)


def compressed() -> dict[str, Any]:
    import horovod.torch as hvd

    return train(compression=hvd.Compression.fp16)


def summed_into_one_set() -> dict[str, Any]:
    import horovod.torch as hvd

    return train(op=hvd.Sum)


def broadcast_late() -> dict[str, Any]:
    """Optimizer state is broadcast after attach, as from a checkpoint that only rank 0 has loaded."""
    import horovod.torch as hvd

    def prepare(optimizer: Any) -> None:
        if hvd.rank() == 0:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            torch.optim.SGD.step(optimizer)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)  # a step of the others, to set up their state

    return train(prepare=prepare, kind=functools.partial(torch.optim.SGD, momentum=0.9))


VARIANTS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "plain": (train, 1),
    "two passes a step": (functools.partial(train, passes=2), 2),
    "groups": (functools.partial(train, groups=2), 1),
    "fp16 compression": (compressed, 1),
    "sum": (summed_into_one_set, 1),
    "own synchronize, clipping": (functools.partial(train, finish=clipped), 1),
    "own synchronize, two passes": (functools.partial(train, finish=clipped, passes=2), 2),
    "parameters used on one rank": (functools.partial(train, half_used), 1),
    "no gradient on a rank": (functools.partial(train, sometimes_idle), 1),
    "operations without a name": (functools.partial(train, talking, talking_step), 1),
    "scheduler and AdamW": (scheduled, 1),
    "state broadcast from rank 0": (broadcast_late, 1),
}

OF_THREE = ("two passes a step", "no gradient on a rank", "operations without a name")
CASES = [(name, 2) for name in VARIANTS] + [(name, 3) for name in OF_THREE]


# --- without DistributedOptimizer ------------------------------------------------------------------------------------


def plain_loop(reduce: Callable[[Model], None], optimizer: Any, model: Model) -> dict[str, Any]:
    import horovod.torch as hvd

    with Rehearsal(SECTION, HorovodTransport()) as rehearsal:
        for number in range(STEPS):
            batch = rehearsal.update(new_batch(hvd.rank(), number, SIZE))
            model(**batch).backward()
            reduce(model)
            optimizer.step()
            optimizer.zero_grad()
        metrics = rehearsal.metrics()
    return {"seen": model.seen, "whole": model.whole, "metrics": metrics, "digest": model.digest()}


def update_and_optimizer() -> dict[str, Any]:
    model = Model()
    return plain_loop(lambda model: None, optimizer_of(model), model)


def update_and_allreduce() -> dict[str, Any]:
    import horovod.torch as hvd

    def average(model: Model) -> None:
        for parameter in model.parameters():
            hvd.allreduce_(parameter.grad)

    model = Model()
    return plain_loop(average, torch.optim.SGD(model.parameters(), lr=0.1), model)


# --- what is refused, and what is off --------------------------------------------------------------------------------


def message(kind: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def refusals() -> dict[str, str]:
    import horovod.torch as hvd

    model = Model()
    adasum, plain = optimizer_of(Model(), op=hvd.Adasum), torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = optimizer_of(model)

    def refused(target: Any, **given: Any) -> str:
        return message(ConfigError, lambda: rehearsal_plugin.attach(target, **{"config": {}, "model": model, **given}))

    found = {
        "adasum": refused(adasum),
        "plain": refused(plain),
        "model": refused(optimizer, model=None),
        "config": refused(optimizer, config=None),
    }
    handle = rehearsal_plugin.attach(optimizer, {}, model=model)
    found["twice"] = refused(optimizer)
    model.linear(torch.ones(1, 3)).sum().backward()
    found["unfed forward"] = message(ConfigError, optimizer.step)
    optimizer.synchronize()
    handle.close()
    handle = rehearsal_plugin.attach(optimizer, {"inject": "loader"})
    model.linear(torch.ones(1, 3)).sum().backward()
    found["unfed loader"] = message(ConfigError, optimizer.step)
    optimizer.synchronize()
    handle.close()
    return found


def switched_off() -> dict[str, Any]:
    model = Model()
    optimizer = optimizer_of(model)
    handle = rehearsal_plugin.attach(optimizer, {"enabled": False}, model=model)
    backward(model, 0)
    optimizer.step()
    hooks = len(model._forward_pre_hooks) + len(optimizer._optimizer_step_pre_hooks)
    return {"enabled": handle.enabled, "same": optimizer.rehearsal is handle, "hooks": hooks, "seen": model.seen}


def patched_and_switched_off() -> bool:
    """Whether `DistributedOptimizer` gives the same as always where the section says no."""
    import horovod.torch as hvd

    original, state = hvd.DistributedOptimizer, hvd.elastic.TorchState
    try:
        patch({"enabled": False, "inject": "loader"})
        optimizer = optimizer_of(Model())
    finally:
        hvd.DistributedOptimizer, hvd.elastic.TorchState = original, state
    return not optimizer.rehearsal.enabled and not optimizer._optimizer_step_pre_hooks


def closed_and_attached_again() -> list[int]:
    model = Model()
    optimizer = optimizer_of(model)
    handle = rehearsal_plugin.attach(optimizer, SECTION, model=model)
    for number in range(14):
        if number == 5:
            handle.close()
        if number == 8:
            handle = rehearsal_plugin.attach(optimizer, SECTION, model=model)
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    handle.close()
    return [len(ids) for ids in model.seen]


def evaluated() -> list[int]:
    """Training passes around an evaluation of each kind."""
    model = Model()
    optimizer = optimizer_of(model)
    with closing(rehearsal_plugin.attach(optimizer, SECTION, model=model)):
        for number in range(6):
            backward(model, number)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(**new_batch(7, number, 4))
            model.eval()
            model(**new_batch(8, number, 4))
            model.train()
    replayed = {rank_of(id) for ids in model.seen if len(ids) > SIZE for id in ids[SIZE:]}
    assert not replayed & {7, 8}, "rows of an evaluation were stored"
    return [len(ids) for ids in model.seen]


def asleep() -> tuple[str, float]:
    """Rank 1 stops stepping; rank 0 updates with a deadline of two seconds."""
    import horovod.torch as hvd

    rehearsal = Rehearsal({**SECTION, "exchange": {"timeout_s": 2}}, HorovodTransport())
    for number in range(4):
        rehearsal.update(new_batch(hvd.rank(), number, SIZE))
    if hvd.rank():
        time.sleep(4)
        return "", 0.0
    start = time.monotonic()
    rehearsal.update(new_batch(hvd.rank(), 4, SIZE))
    text = message(ExchangeTimeout, lambda: rehearsal.update(new_batch(0, 5, SIZE)))
    return text, time.monotonic() - start


def ended_in_flight() -> bool:
    """Left open: the process ends with an exchange in flight."""
    model = Model()
    optimizer = optimizer_of(model)
    rehearsal_plugin.attach(optimizer, SECTION, model=model)
    for number in range(4):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    return model.whole


# --- process sets ----------------------------------------------------------------------------------------------------


def in_sets(alone: bool) -> dict[str, Any]:
    """Ranks 0 and 2 train together; rank 1 trains alone, with or without a rehearsal of its own."""
    import horovod.torch as hvd

    sets = [hvd.add_process_set([0, 2]), hvd.add_process_set([1])]
    own = sets[hvd.rank() % 2]
    model = Model()
    optimizer = optimizer_of(model, process_set=own)
    if hvd.rank() != 1 or not alone:
        rehearsal_plugin.attach(optimizer, model=model, config=SECTION)
    sums = []
    for number in range(STEPS):
        backward(model, number)
        sums.append(hvd.allreduce(torch.ones(1), op=hvd.Sum, name=f"sum{number}" if alone else None).item())
        optimizer.step()
        optimizer.zero_grad()
        sums.append(hvd.allreduce(torch.ones(1), op=hvd.Sum, name=f"also{number}" if alone else None).item())
    if hasattr(optimizer, "rehearsal"):
        optimizer.rehearsal.close()
    for process_set in sets:
        hvd.remove_process_set(process_set)
    return {"sums": sums, "seen": model.seen, "whole": model.whole, "digest": model.digest()}


def both_kinds_of_sets() -> list[dict[str, Any]]:
    return [in_sets(alone=False), in_sets(alone=True)]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def half(model: Model, optimizer: Any, first: int) -> list[list[int]]:
    """Train some steps from number `first` on; the ids of the rows that the model saw."""
    start = len(model.seen)
    for number in range(first, first + STEPS):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    return model.seen[start:]


def resumed() -> list[tuple[list[list[int]], str]]:
    """The second half of a run: as it was, and from what was saved in its middle."""
    import horovod.torch as hvd

    made = tempfile.mkdtemp() if hvd.rank() == 0 else None
    folder = Path(hvd.broadcast_object(made, root_rank=0, name="folder"))  # without a name: that of the object's type
    model = Model()
    optimizer = optimizer_of(model)
    with closing(rehearsal_plugin.attach(optimizer, model=model, config=SECTION)) as handle:
        half(model, optimizer, 0)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        handle.save(folder)
        ends = [(half(model, optimizer, STEPS), model.digest())]
    again = Model()
    again.load_state_dict(weights)
    optimizer = optimizer_of(again)
    with closing(rehearsal_plugin.attach(optimizer, model=again, config=SECTION)) as handle:
        handle.load(folder)
        ends.append((half(again, optimizer, STEPS), again.digest()))
    hvd.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(folder)
    return ends


# --- the jobs ---------------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[], Any]] = {
    scenario.__name__: scenario
    for scenario in (
        broken_once,
        refusals,
        switched_off,
        patched_and_switched_off,
        closed_and_attached_again,
        evaluated,
        resumed,
        ended_in_flight,
        asleep,  # the last one: it leaves an exchange behind
    )
}
LOOPS: dict[str, Callable[[], Any]] = {loop.__name__: loop for loop in (update_and_optimizer, update_and_allreduce)}


@functools.cache
def outcomes(size: int) -> list[dict[str, Any]]:
    """All scenarios of two ranks; of three, those in which a third rank could matter."""
    variants = {name: variant for name, (variant, _) in VARIANTS.items() if (name, size) in CASES}
    more = OTHERS if size == 2 else {"sets": both_kinds_of_sets}
    environment = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if size == 3 else {}
    return run_horovod(perform, size, variants | LOOPS | more, timeout_s=150, environment=environment)


def found(name: str, size: int = 2) -> list[Any]:
    return [rank[name] for rank in outcomes(size)]


variants = pytest.mark.parametrize(("name", "size"), CASES)


@variants
def test_every_optimizer_step_has_one_exchange(name: str, size: int) -> None:
    for rank in found(name, size):
        assert rank["metrics"]["steps"] == STEPS
        assert rank["metrics"]["collectives"] == 2 * STEPS - 1  # headers and rows; at first there is no row


@variants
def test_rows_are_whole_of_all_ranks_and_of_earlier_steps(name: str, size: int) -> None:
    passes = VARIANTS[name][1]
    for number, rank in enumerate(found(name, size)):
        assert rank["whole"]
        own = [ids[:SIZE] for ids in rank["seen"]]
        assert own == [new_batch(number, i, SIZE)["id"].tolist() for i in range(STEPS * passes)]
        replayed = [(i // passes, id) for i, ids in enumerate(rank["seen"]) for id in ids[SIZE:]]
        assert all(step_of(id) // passes <= step - LEAD for step, id in replayed)
        assert {rank_of(id) for _, id in replayed} == set(range(size)), f"on rank {number}"


@variants
def test_every_micro_batch_has_its_rows(name: str, size: int) -> None:
    passes = VARIANTS[name][1]
    for rank in found(name, size):
        added = [len(ids) - SIZE for ids in rank["seen"]]
        assert added == [0] * (LEAD * passes) + [5] * ((STEPS - LEAD) * passes)


@variants
def test_parameters_stay_alike_on_all_ranks(name: str, size: int) -> None:
    assert len({rank["digest"] for rank in found(name, size)}) == 1
    assert all(rank["learnt"] for rank in found(name, size))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_its_own(name: str, size: int) -> None:
    ranks = found(name, size)
    assert len({rank["digest"] for rank in ranks}) == 1
    for rank in ranks:
        assert rank["whole"]
        assert [len(ids) - SIZE for ids in rank["seen"]] == [0, 0] + [5] * (STEPS - 2)
        assert {rank_of(id) for ids in rank["seen"] for id in ids[SIZE:]} == set(range(size))
        assert rank["metrics"]["collectives"] == 2 * STEPS - 1


def test_an_error_inside_a_step_does_not_put_the_clock_out() -> None:
    for rank in found("broken_once"):
        assert rank["metrics"]["steps"] == STEPS
        assert rank["whole"]


def test_refusals_name_cause_and_cure() -> None:
    for rank in found("refusals"):
        assert "op=hvd.Adasum steps inside backward" in rank["adasum"]
        assert "made by hvd.DistributedOptimizer" in rank["plain"]
        assert "model=..." in rank["model"]
        assert "config=..." in rank["config"]
        assert "has a rehearsal already" in rank["twice"]
        assert "itself, in training mode" in rank["unfed forward"]
        assert "optimizer.rehearsal.loader(...)" in rank["unfed loader"]


def test_switched_off_nothing_is_touched() -> None:
    for number, rank in enumerate(found("switched_off")):
        ids = new_batch(number, 0, SIZE)["id"].tolist()
        assert rank == {"enabled": False, "same": True, "hooks": 0, "seen": [ids]}


def test_switched_off_a_patched_job_is_as_always() -> None:
    assert found("patched_and_switched_off") == [True, True]


def test_after_close_training_goes_on_without_rows_and_attach_may_follow() -> None:
    for rank in found("closed_and_attached_again"):
        assert rank == [6, 6, 6, 11, 11] + [6] * 3 + [6, 6, 6, 11, 11, 11]


def test_evaluation_is_left_alone() -> None:
    for rank in found("evaluated"):
        assert rank == [size for train in (6, 6, 6, 11, 11, 11) for size in (train, 4, 4)]


def test_a_resumed_job_goes_on_bit_for_bit() -> None:
    for whole, again in found("resumed"):
        assert whole == again
        assert max(map(len, whole[0])) > SIZE, "rows were replayed"


def test_ranks_of_the_optimizers_process_set_share_a_buffer() -> None:
    for kind in (0, 1):
        first, second, third = (rank[kind] for rank in found("sets", 3))
        assert first["digest"] == third["digest"]
        assert all(rank["whole"] and rank["sums"] == [3.0] * 2 * STEPS for rank in (first, second, third))
        owners = [{rank_of(id) for ids in rank["seen"] for id in ids[SIZE:]} for rank in (first, second, third)]
        assert owners == [{0, 2}, set() if kind else {1}, {0, 2}]


# --- peers that are lost ---------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_rank_that_stops_stepping_is_a_timeout_that_names_rank_and_step() -> None:
    (text, seconds), _ = found("asleep")
    assert "on rank 0 at step 4" in text
    assert 1.5 < seconds < 5


def killed(in_flight: bool) -> tuple[list[str], float]:
    """Rank 1 is killed in the middle of training; the kinds of the error that rank 0 gets, and when.

    Args:
        in_flight: Whether it may be in the middle of an exchange; the gradients fail first if not.
    """
    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all ranks as soon as one has failed
    model = Model()
    optimizer = optimizer_of(model)
    handle = rehearsal_plugin.attach(optimizer, model=model, config=SECTION)
    assert isinstance(handle, HorovodHandle)
    start = 0.0
    try:
        for number in range(100):
            backward(model, number)
            optimizer.step()
            optimizer.zero_grad()
            if not in_flight and handle.rehearsal is not None:
                handle.rehearsal.drain()
                hvd.barrier()  # the peer has drained too
            start = time.monotonic()
            if number == 6 and hvd.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except HorovodInternalError:
        seconds = time.monotonic() - start

    def two_steps() -> None:
        handle.step()  # the first exchange without the peer begins here, if none was in flight
        handle.step()

    with pytest.raises(ExchangeError):
        two_steps()
    with pytest.raises(ExchangeError) as caught:  # and it stays so
        handle.step()
    return [kind.__name__ for kind in type(caught.value).__mro__], seconds


@pytest.mark.fault
@pytest.mark.parametrize("in_flight", [True, False])
def test_a_killed_peer_is_an_error_that_horovod_knows_and_the_process_ends(in_flight: bool) -> None:
    (survivor, victim), job = try_horovod(killed, 2, in_flight, timeout_s=60)
    assert victim is None
    assert survivor is not None, job.printed
    assert {"ExchangeError", "HorovodInternalError"} <= set(survivor[0])
    assert survivor[1] < 5
    assert job.status == 1, job.printed
    assert not job.left
    assert "terminate called" not in job.printed


# --- without Horovod -------------------------------------------------------------------------------------------------

BLOCKED = """
import sys
sys.modules["horovod"] = None
import torch, rehearsal_plugin
from rehearsal_plugin.errors import MissingDependencyError
from rehearsal_plugin.integrations.horovod import HorovodHandle, patch
from rehearsal_plugin.distributed.transport.horovod import HorovodTransport

def told(call):
    try:
        call()
    except MissingDependencyError as error:
        assert "scripts/install_horovod.sh" in str(error), error
    else:
        raise AssertionError("no error")

model = torch.nn.Linear(1, 1)
told(HorovodTransport)
told(lambda: rehearsal_plugin.attach(torch.optim.SGD(model.parameters(), lr=1.0), {}, model=model))
with rehearsal_plugin.Rehearsal({"representatives": 2}) as rehearsal:
    sizes = [len(rehearsal.update({"x": torch.ones(4, 1)})["x"]) for _ in range(3)]
assert sizes == [4, 4, 6], sizes
"""


def test_without_horovod_the_error_says_what_to_install_and_the_rest_works() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
