"""Names of implementations: how they are registered, and how the config answers one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rehearsal_plugin import LocalTransport, Rehearsal, RehearsalConfig
from rehearsal_plugin.buffer import policies, storage
from rehearsal_plugin.config.registries import POLICIES, STORAGES, STRATEGIES, TRANSPORTS, RegisteredPolicy
from rehearsal_plugin.core.registry import Registry
from rehearsal_plugin.distributed import transport
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.strategies import ExperienceReplay
from rehearsal_plugin.strategies import register as register_strategy
from tests.helpers.samples import new_batch

SECTIONS: dict[str, dict[str, Any]] = {
    "rehearsal.buffer.policy": {"buffer": {"policy": "mine"}},
    "rehearsal.buffer.storage": {"buffer": {"storage": "mine"}},
    "rehearsal.strategy.name": {"strategy": {"name": "mine"}},
    "rehearsal.exchange.backend": {"exchange": {"backend": "mine"}},
}
REGISTRIES: list[Registry[Any]] = [POLICIES, STORAGES, STRATEGIES, TRANSPORTS]


@contextmanager
def registered_for_now(registry: Registry[Any], name: str) -> Iterator[None]:
    """What is registered inside as `name` is forgotten outside."""
    try:
        yield
    finally:
        registry._entries.pop(name, None)


def test_a_name_gives_what_was_registered_last() -> None:
    registry: Registry[int] = Registry("key")
    registry.add("one", 0)
    registry.add("one", 1)
    assert registry["one"] == 1
    assert list(registry) == ["one"]


def test_a_decorator_leaves_what_it_decorates() -> None:
    registry: Registry[Any] = Registry("key")

    @registry.register("twice", lambda function: (function, function))
    def function() -> int:
        return 3

    assert function() == 3
    assert registry["twice"] == (function, function)


def test_an_unknown_name_is_answered_with_the_nearest_and_all_others() -> None:
    registry: Registry[int] = Registry("rehearsal.key")
    registry.add("reservoir", 0)
    registry.add("fifo", 1)
    with pytest.raises(ConfigError, match=r"rehearsal.key is 'resevoir'; did you mean 'reservoir'\? .*reservoir, fifo"):
        registry["resevoir"]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_the_config_answers_an_unknown_name_with_the_nearest(registry: Registry[Any]) -> None:
    name = next(iter(registry))
    (outer, inner), *_ = ((outer, inner) for outer, keys in SECTIONS[registry.key].items() for inner in keys)
    with pytest.raises(ConfigError, match=rf"{registry.key} must .*did you mean '{name}'.*, not '{name}x'"):
        RehearsalConfig.load({outer: {inner: f"{name}x"}})


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_the_config_takes_a_name_once_it_is_registered(registry: Registry[Any]) -> None:
    section = SECTIONS[registry.key]
    with pytest.raises(ConfigError, match=registry.key):
        RehearsalConfig.load(section)
    with registered_for_now(registry, "mine"):
        registry.add("mine", RegisteredPolicy(policies.fifo) if registry is POLICIES else object())
        RehearsalConfig.load(section)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_a_name_that_was_left_open_is_looked_up_when_the_rehearsal_is_made(registry: Registry[Any]) -> None:
    config = RehearsalConfig.load(SECTIONS[registry.key], open_names=True)
    with pytest.raises(ConfigError, match=f"{registry.key} is 'mine'"):
        Rehearsal(config)


def test_a_policy_of_ones_own_decides_who_stays() -> None:
    with registered_for_now(POLICIES, "nobody"):

        @policies.register("nobody")
        def nobody(index: Any, offer: Any, rng: Any) -> Any:
            return policies.fifo(index, offer, rng) * 0 - 1

        with Rehearsal({"buffer": {"capacity": 8, "policy": "nobody"}}) as rehearsal:
            rehearsal.update(new_batch(0, 0, 4))
            assert rehearsal.metrics()["rows_stored"] == 0


@pytest.mark.parametrize(("needs", "key"), [({"partitions": True}, "partition_by"), ({"judges": "score"}, "score_by")])
def test_a_policy_of_ones_own_says_which_keys_it_needs(needs: dict[str, Any], key: str) -> None:
    with registered_for_now(POLICIES, "needy"):
        policies.register("needy", **needs)(policies.fifo)
        with pytest.raises(ConfigError, match=rf"{key} is missing: policy 'needy'"):
            RehearsalConfig.load({"buffer": {"policy": "needy"}})
        RehearsalConfig.load({"buffer": {"policy": "needy", key: "labels"}})


def test_a_storage_of_ones_own_holds_the_rows() -> None:
    shapes = []
    with registered_for_now(STORAGES, "noted"):

        @storage.register("noted")
        def noted(config: Any, shape: tuple[int, int], rank: int) -> storage.RowStorage:
            shapes.append(shape)
            return storage.open_memory(config, shape, rank)

        with Rehearsal({"buffer": {"capacity": 8, "storage": "noted"}}) as rehearsal:
            rehearsal.update(new_batch(0, 0, 4))
            assert shapes == [(8, rehearsal.buffer.layout.row_bytes if rehearsal.buffer else 0)]


def test_a_strategy_of_ones_own_is_made() -> None:
    with registered_for_now(STRATEGIES, "same"):

        @register_strategy("same")
        class Same(ExperienceReplay):
            pass

        with Rehearsal({"strategy": {"name": "same"}}) as rehearsal:
            assert isinstance(rehearsal.strategy, Same)


def test_a_transport_of_ones_own_connects_the_ranks() -> None:
    asked = []
    with registered_for_now(TRANSPORTS, "noted"):

        @transport.register("noted")
        def connect(group: Any, timeout_s: float) -> transport.Transport:
            asked.append((group, timeout_s))
            return LocalTransport()

        with Rehearsal({"exchange": {"backend": "noted", "timeout_s": 5}}):
            assert asked == [(None, 5.0)]
