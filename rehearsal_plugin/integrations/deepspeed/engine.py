"""DeepSpeed: rows are injected at the engine's forward or at its loader, and the engine's step ends the step.

Only methods of the attached engine are wrapped: `forward`, `step` (`train_batch` of a pipeline), `save_checkpoint`,
`load_checkpoint` and `destroy`. `patch` also replaces `deepspeed.initialize`, for the whole process.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rehearsal_plugin.config import ConfigSource, RehearsalConfig, find_block
from rehearsal_plugin.core.attached import note_attached
from rehearsal_plugin.core.metrics import few_partitions
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.distributed.transport import announcing_failure, open_transport
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.deepspeed.checkpoints import load_checkpoint, save_checkpoint
from rehearsal_plugin.integrations.deepspeed.pipeline_engine import check_pipeline, inject_at_stage, pulls_batches
from rehearsal_plugin.integrations.handle import Handle, check_fed
from rehearsal_plugin.integrations.inject.forward import ForwardInjection
from rehearsal_plugin.integrations.peers import check_sequence_parallelism, data_parallel_ranks, peers_of
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies import make_strategy

__all__ = ["attach", "connect", "initialize", "left_alone", "patch"]

LOG = logging.getLogger(__name__)

LEFT_ALONE: ContextVar[bool] = ContextVar("left_alone", default=False)


def attach(engine: Any, config: ConfigSource | None = None) -> Handle:
    """Give a DeepSpeed engine a rehearsal buffer.

    Ranks of the engine's data-parallel group share one distributed buffer. All ranks of the job must call this.

    Args:
        engine: The engine, the first result of `deepspeed.initialize`.
        config: The `rehearsal` section; None takes it from the engine's own config.

    Returns:
        The handle, also found at `engine.rehearsal`. Without a section, which is logged once, or with
        `enabled: false`, the engine is left unchanged and the handle does nothing.

    Raises:
        ConfigError: The section cannot be used, or not with this engine, or the engine has a rehearsal already.
    """
    if config is None and find_block(engine.config) is None:
        _warn_without_section()
    return _attach(engine, config)


def _attach(engine: Any, config: ConfigSource | None) -> Handle:
    if isinstance(getattr(engine, "rehearsal", None), Handle) and engine.rehearsal.enabled:
        raise ConfigError(
            "this engine has a rehearsal already; call attach(engine) once, or engine.rehearsal.close() first"
        )
    block = find_block(engine.config) if config is None else config
    with announcing_failure(getattr(engine, "data_parallel_group", None)):
        section = None if block is None else RehearsalConfig.load(block)
        if section is not None and section.enabled:
            section.look_up_names()
            make_strategy(section.strategy)  # refuses what it cannot use
    handle = Handle(None) if section is None or not section.enabled else _start_rehearsal(engine, section)
    engine.rehearsal = handle
    return handle


@functools.cache  # once in a process
def _warn_without_section() -> None:
    LOG.warning(
        "the DeepSpeed config has no section 'rehearsal', so attach(engine) does nothing: no row is replayed; add the "
        "section, or call attach(engine, config)"
    )


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` and `attach` in one call.

    Arguments and result are those of `deepspeed.initialize`; the handle is at `engine.rehearsal`.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        ConfigError: As for `attach`.
    """
    return _initialize_and_attach(attach, *args, **kwargs)


def patch(fallback: RehearsalConfig | None = None) -> None:
    """Replace `deepspeed.initialize` by `initialize`, so that a script needs no change.

    Args:
        fallback: The section for engines whose config has none.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
    """
    original = _original_initialize()
    import deepspeed

    def attach_or_fall_back(engine: Any) -> Handle:
        return _attach(engine, fallback if find_block(engine.config) is None else None)

    wrapper = functools.wraps(original)(functools.partial(_initialize_and_attach, attach_or_fall_back))
    wrapper.rehearsal_original = original  # type: ignore[attr-defined]
    deepspeed.initialize = wrapper


@contextmanager
def left_alone() -> Iterator[None]:
    """Context in which new engines get no rehearsal from `patch`, as their framework has one already."""
    token = LEFT_ALONE.set(True)
    try:
        yield
    finally:
        LEFT_ALONE.reset(token)


def _initialize_and_attach(attach: Callable[[Any], Handle], *args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    engine, optimizer, loader, scheduler = _original_initialize()(*args, **kwargs)
    if LEFT_ALONE.get():
        return engine, optimizer, loader, scheduler
    handle = attach(engine)
    if loader is not None and handle.rehearsal is not None and handle.rehearsal.config.inject == "loader":
        engine.training_dataloader = loader = handle.loader(loader)
    return engine, optimizer, loader, scheduler


def _original_initialize() -> Callable[..., tuple[Any, Any, Any, Any]]:
    deepspeed = optional_import("deepspeed", extra="deepspeed", name="DeepSpeed")
    create: Callable[..., tuple[Any, Any, Any, Any]] = deepspeed.initialize
    return getattr(create, "rehearsal_original", create)


def _start_rehearsal(engine: Any, config: RehearsalConfig) -> Handle:
    pipelined = bool(getattr(engine, "pipeline_parallelism", False))
    if pipelined:
        check_pipeline(engine, config)
    handle = connect(engine, config, pulls=not pipelined or pulls_batches(engine))
    rehearsal = handle.rehearsal
    if pipelined and rehearsal is not None:
        inject_at_stage(engine, rehearsal)
    elif rehearsal is not None and config.inject == "forward":
        injection = ForwardInjection(rehearsal, engine.module)
        _wrap_method(engine, "forward", functools.partial(_forward_with_rehearsal, rehearsal, injection))
    _wrap_method(
        engine, "train_batch" if pipelined else "step", functools.partial(_step_with_rehearsal, engine, handle)
    )
    if config.checkpoint.enabled:
        _wrap_method(engine, "save_checkpoint", functools.partial(save_checkpoint, engine, handle))
        _wrap_method(engine, "load_checkpoint", functools.partial(load_checkpoint, engine, handle))
    _wrap_method(engine, "destroy", functools.partial(_close_and_destroy, handle))
    return handle


def connect(engine: Any, config: RehearsalConfig, *, pulls: bool = True) -> Handle:
    """Start a rehearsal over the ranks of an engine, which stays unchanged.

    Args:
        engine: A DeepSpeed engine.
        config: The `rehearsal` section.
        pulls: Whether this rank reads batches.

    Raises:
        ConfigError: The section cannot be used with this engine.
    """
    check_sequence_parallelism(engine, config)
    ranks = data_parallel_ranks(engine)
    rehearsal = _make_rehearsal(config, engine, ranks) if pulls else None
    note_attached()  # a stage between the first and the last has no rehearsal, and is attached all the same
    return Handle(rehearsal, peers_of(engine, rehearsal, ranks), engine.module)


def _make_rehearsal(config: RehearsalConfig, engine: Any, ranks: list[int]) -> Rehearsal:
    exchange, group = config.exchange, ranks if engine.data_parallel_group is None else engine.data_parallel_group
    with announcing_failure(group):
        config.look_up_names()
        make_strategy(config.strategy)  # as the rehearsal will; one rank's error is to be heard before the others wait
    return Rehearsal(config, open_transport(exchange.backend, exchange.timeout_s, group))


def _wrap_method(engine: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of this engine by `around(method, *args, **kwargs)`, with its signature."""
    method = getattr(engine, name)
    setattr(engine, name, functools.wraps(method)(functools.partial(around, method)))


def _forward_with_rehearsal(
    rehearsal: Rehearsal, injection: ForwardInjection, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if kwargs.get("num_items_in_batch") is not None and not rehearsal.closed:
        raise ConfigError(
            "the model was given num_items_in_batch, counted before rows were replayed, so the loss would be scaled "
            "wrongly; a Trainer takes RehearsalCallback() in place of attach(engine), and a loop of your own leaves it "
            "out or sets rehearsal.inject to 'loader'"
        )
    args, kwargs = injection(args, kwargs)
    try:
        outputs = forward(*args, **kwargs)
    except BaseException:
        injection.give_up()
        raise
    return injection.finish(outputs)


def _step_with_rehearsal(engine: Any, handle: Handle, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before, rehearsal = engine.global_steps, handle.rehearsal
    if rehearsal is not None and not rehearsal.closed and engine.is_gradient_accumulation_boundary():
        rehearsal.pending.check_step()  # before the update, so that nothing wrong is trained on
    result = step(*args, **kwargs)
    if engine.global_steps == before:
        return result
    if rehearsal is not None and not rehearsal.closed:
        check_fed(rehearsal, "engine")
        rehearsal.step()
        _report_metrics(engine, rehearsal)
    handle.check_peers()
    return result


def _close_and_destroy(handle: Handle, destroy: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    handle.close()
    return destroy(*args, **kwargs)


def _report_metrics(engine: Any, rehearsal: Rehearsal) -> None:
    """Write the metrics to DeepSpeed's monitor, as it writes its own: on rank 0, against samples."""
    if not engine.monitor.enabled or engine.global_rank != 0:
        return
    metrics = few_partitions(rehearsal.metrics())
    engine.monitor.write_events([(f"Train/Rehearsal/{k}", v, engine.global_samples) for k, v in metrics.items()])
