"""Samples of several batch rows: stored, replayed and put back whole, in the layout of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from rehearsal_plugin import LocalTransport, Rehearsal, RehearsalConfig
from rehearsal_plugin.errors import BatchError, ConfigError

Batch = dict[str, Tensor]
PADDING = {"length": 9, "values": {"tokens": 0}}


def batch(step: int, layout: str, count: int, samples: int = 4) -> Batch:
    """Rows that know their sample and their place in it; tokens are as long as the step says."""
    ids = torch.arange(samples) + 100 * step
    halves = layout == "halves"
    sample = ids.repeat(count) if halves else ids.repeat_interleave(count)
    place = torch.arange(count).repeat_interleave(samples) if halves else torch.arange(count).repeat(samples)
    width = 3 + step % 5
    return {"sample": sample, "place": place, "tokens": (sample + 1)[:, None].repeat(1, width)}


def pairs(step: int) -> Batch:
    return {name: batch(step, "halves", 2)[name] for name in ("sample", "place")}


def is_whole(seen: Batch, layout: str, count: int) -> bool:
    """Whether the rows of every sample stand where the layout has them, each once."""
    halves = layout == "halves"
    sample, place = (seen[name].reshape((count, -1) if halves else (-1, count)) for name in ("sample", "place"))
    if not halves:
        sample, place = sample.T, place.T
    return bool((sample == sample[0]).all() and (place == torch.arange(count)[:, None]).all())


def run(layout: str, count: int, steps: int = 8, **keys: Any) -> list[Batch]:
    section = {"buffer": {"capacity": 100}, "representatives": 2, "rows_per_sample": count, "sample_layout": layout}
    seen = []
    with Rehearsal({**section, **keys}, LocalTransport()) as rehearsal:
        for step in range(steps):
            rows = batch(step, layout, count)
            if "padding" not in keys:
                del rows["tokens"]
            seen.append(rehearsal.update(rows))
    return seen


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_samples_are_replayed_whole_and_stand_as_the_batch_has_them(
    layout: str, count: int, mode: str, padded: bool
) -> None:
    keys: dict[str, Any] = {"padding": PADDING} if padded else {}
    seen = run(layout, count, mode=mode, **keys)
    added = 2 if mode == "append" else 0
    assert [len(rows["sample"]) for rows in seen] == [4 * count] * 2 + [(4 + added) * count] * 6
    assert all(is_whole(rows, layout, count) for rows in seen)
    assert len(set(seen[-1]["sample"].tolist()) - set(batch(7, layout, count)["sample"].tolist())) == 2
    if padded:
        assert all((rows["tokens"][:, 0] == rows["sample"] + 1).all() for rows in seen)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("keys", [{}, {"padding": PADDING}], ids=["plain", "padded"])
def test_a_leaf_with_one_entry_a_sample_goes_with_its_sample(layout: str, mode: str, keys: dict[str, Any]) -> None:
    section = {"buffer": {"capacity": 100}, "representatives": 2, "rows_per_sample": 2, "sample_layout": layout}
    with Rehearsal({**section, "mode": mode, **keys}, LocalTransport()) as rehearsal:
        for step in range(8):
            rows = batch(step, layout, 2)
            if not keys:
                del rows["tokens"]
            seen = rehearsal.update({**rows, "margin": 0.5 * (torch.arange(4) + 100 * step), "table": torch.zeros(7)})
    samples = seen["sample"].chunk(2)[0] if layout == "halves" else seen["sample"][::2]
    assert seen["margin"].tolist() == (0.5 * samples).tolist()
    assert len(samples) == (6 if mode == "append" else 4)
    assert len(seen["table"]) == 7


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("named", [False, True], ids=["by size", "named"])
def test_as_many_leaves_of_samples_as_of_rows_go_with_their_samples(layout: str, named: bool) -> None:
    section: dict[str, Any] = {"buffer": {"capacity": 100}, "representatives": 2}
    section |= {"rows_per_sample": 2, "sample_layout": layout}
    if named:
        section["fields"] = ["margin", "sample"]
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for step in range(8):
            rows = {"sample": batch(step, layout, 2)["sample"], "margin": 0.5 * (torch.arange(4) + 100 * step)}
            seen = rehearsal.update({**rows, "other": torch.zeros(4)} if named else rows)
    samples = seen["sample"].chunk(2)[0] if layout == "halves" else seen["sample"][::2]
    assert seen["margin"].tolist() == (0.5 * samples).tolist()
    assert len(samples) == 6
    if named:
        assert len(seen["other"]) == 4


def test_named_fields_of_other_lengths_are_refused() -> None:
    section = {"rows_per_sample": 2, "fields": ["sample", "margin"]}
    with Rehearsal(section, LocalTransport()) as rehearsal, pytest.raises(BatchError, match="'margin' has 3 samples"):
        rehearsal.update({"sample": torch.zeros(8), "margin": torch.zeros(3)})


def test_strings_with_one_entry_a_sample_are_refused() -> None:
    with (
        Rehearsal({"buffer": {"capacity": 100}, "representatives": 2, "rows_per_sample": 2}) as rehearsal,
        pytest.raises(BatchError, match="'text' is a list of str"),
    ):
        rehearsal.update({**pairs(0), "text": list("abcd")})


def test_a_pair_without_a_setting_would_come_apart() -> None:
    with Rehearsal({"buffer": {"capacity": 100}, "representatives": 2}, LocalTransport()) as rehearsal:
        for step in range(8):
            seen = rehearsal.update(pairs(step))
    assert not is_whole(seen, "halves", 2)


def test_amounts_are_amounts_of_samples() -> None:
    section = {"buffer": {"capacity": 6}, "ratio": 0.5, "rows_per_sample": 2}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for step in range(8):
            seen = rehearsal.update(pairs(step))
        assert rehearsal.metrics()["rows_stored"] == 6
    assert len(seen["sample"]) == 2 * (4 + 4)


def test_rows_that_are_no_whole_number_of_samples_are_refused() -> None:
    rehearsal = Rehearsal({"rows_per_sample": 2}, LocalTransport())
    with rehearsal, pytest.raises(BatchError, match=r"'x' has 5 rows, .* rehearsal\.rows_per_sample is 2"):
        rehearsal.update({"x": torch.zeros(5)})


def test_the_loss_of_er_is_the_criterion_of_all_rows() -> None:
    with Rehearsal({"buffer": {"capacity": 9}, "rows_per_sample": 2}, LocalTransport()) as rehearsal:
        rehearsal.augment({"x": torch.zeros(4)})
        assert rehearsal.loss(mse_loss, torch.ones(4), torch.zeros(4)).item() == 1.0
        rehearsal.step()


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": {"name": "der"}},
        {"losses_every": 1},
        {"buffer": {"partition_by": "place"}},
        {"inject": "loader", "mode": "replace"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_what_goes_by_single_rows_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"goes by single rows, and rehearsal\.rows_per_sample is 2"):
        RehearsalConfig.load({"rows_per_sample": 2, **keys})


@pytest.mark.parametrize("which", ["replayed", "all"])
def test_a_transform_gets_rows_and_not_samples(which: str) -> None:
    shapes = []

    def transform(batch: Any) -> Any:
        shapes.append(tuple(batch["x"].shape[1:]))
        return batch

    section = {"buffer": {"capacity": 9}, "representatives": 1, "rows_per_sample": 2, "strategy": {"transform": which}}
    with Rehearsal(section, LocalTransport(), transform=transform) as rehearsal:
        for _ in range(6):
            seen = rehearsal.update({"x": torch.zeros(4, 3)})
    assert set(shapes) == {(3,)}
    assert seen["x"].shape == (6, 3)


def test_a_leaf_with_one_entry_a_row_that_comes_later_is_refused() -> None:
    with Rehearsal({"rows_per_sample": 2}, LocalTransport()) as rehearsal:
        rehearsal.update({"x": torch.zeros(4), "y": torch.zeros(4), "mask": None})
        with pytest.raises(BatchError, match="'mask' was a value without entries"):
            rehearsal.update({"x": torch.zeros(4), "y": torch.zeros(4), "mask": torch.zeros(4)})
