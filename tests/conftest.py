"""What the tests of faults, of malformed input and of endurance tell the reliability report."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, settings

settings.register_profile("untimed", deadline=None)  # no test goes by the clock
settings.register_profile("fast", settings.get_profile("untimed"), max_examples=10)  # of scripts/test.sh --fast
settings.load_profile("untimed")


def pytest_configure() -> None:
    """Give each of several test processes its own folder of compiled extensions: PyTorch locks it while it compiles."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        shared = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(shared) / worker)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note what a test tries; `--junitxml` writes it down."""
    if item.get_closest_marker("fault"):
        item.user_properties.append(("faults", 1))
    if not item.get_closest_marker("fuzz"):
        return (yield)
    function: Any = getattr(item, "obj", None)
    if not is_hypothesis_test(function):
        item.user_properties.append(("inputs_fuzzed", 1))
        return (yield)
    inputs, inner = 0, function.hypothesis.inner_test

    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal inputs
        inputs += 1
        return inner(*args, **kwargs)

    function.hypothesis.inner_test = counted
    try:
        return (yield)
    finally:
        function.hypothesis.inner_test = inner
        item.user_properties.append(("inputs_fuzzed", inputs))
