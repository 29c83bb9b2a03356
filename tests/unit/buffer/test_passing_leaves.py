"""Leaves that pass through are refused once they look like a field."""

from __future__ import annotations

import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.buffer.rows.passing_leaves import refuse_entries_of_rows, refuse_left_behind
from rehearsal_plugin.core.tree import flatten
from rehearsal_plugin.errors import BatchError


def test_leaves_as_in_the_first_batch_pass() -> None:
    batch = flatten({"table": torch.zeros(7), "scale": 2.0, "x": torch.zeros(4)})
    refuse_entries_of_rows(batch, 4, {"table": 7, "scale": None})


@pytest.mark.parametrize(
    ("length", "words"),
    [(None, "a value without entries"), (3, "of 3 entries")],
)
def test_one_entry_a_row_is_refused(length: int | None, words: str) -> None:
    with pytest.raises(BatchError, match=f"'w' was {words} in the first batch"):
        refuse_entries_of_rows(flatten({"w": torch.zeros(4)}), 4, {"w": length})


def test_a_table_of_another_length_is_refused() -> None:
    with pytest.raises(BatchError, match="'w' had 3 entries in the first batch and has 5 in this one of 4 rows"):
        refuse_entries_of_rows(flatten({"w": torch.zeros(5)}), 4, {"w": 3})


def test_what_belongs_to_displaced_rows_is_refused() -> None:
    refuse_left_behind(4, {"table": 3, "scale": None})
    with pytest.raises(BatchError, match=r"leaves out \['weight'\].*'replace'.*set rehearsal.mode to 'append'"):
        refuse_left_behind(4, {"weight": 4, "scale": None})


def test_a_job_that_displaces_rows_names_all_of_their_fields() -> None:
    section = {"buffer": {"capacity": 50}, "representatives": 2, "fields": ["x"]}
    batch = {"x": torch.zeros(4, 2), "weight": torch.ones(4), "caption": ["a", "b", "c", "d"]}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        assert len(rehearsal.update(batch)["x"]) == 4
    words, section = r"leaves out \['weight', 'caption'\]", {**section, "mode": "replace"}
    with Rehearsal(section, LocalTransport()) as rehearsal, pytest.raises(BatchError, match=words):
        rehearsal.update(batch)


def test_edges_between_rows_are_refused_and_those_of_each_row_are_not() -> None:
    graph = {"x": torch.zeros(5, 3), "edge_index": torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]), "y": torch.zeros(5)}
    section, words = {"buffer": {"capacity": 9}}, "'graph.edge_index' holds edges between the rows of this batch"
    with Rehearsal(section, LocalTransport()) as rehearsal, pytest.raises(BatchError, match=words):
        rehearsal.update({"graph": graph})
    graphs = {"x": torch.zeros(5, 4, 3), "edge_index": torch.zeros(5, 2, 6).long(), "y": torch.zeros(5)}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        assert set(rehearsal.update(graphs)) == set(graphs)


@pytest.mark.parametrize("size", [1, 2])
def test_patches_of_pictures_are_refused(size: int) -> None:
    grid = torch.tensor([[1, 4, 6], [1, 2, 4]][:size])
    batch = {"input_ids": torch.ones(size, 5).long(), "image_grid_thw": grid}
    batch["pixel_values"] = torch.zeros(int(grid.prod(1).sum()), 12)
    words = "'pixel_values' holds the .* patches that 'image_grid_thw' tells of.*all pictures at one size"
    with Rehearsal({"buffer": {"capacity": 9}}, LocalTransport()) as rehearsal, pytest.raises(BatchError, match=words):
        rehearsal.update(batch)
