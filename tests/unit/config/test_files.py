"""Config files that say a key twice, and paths with `~` and variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.errors import ConfigError

TWICE = {
    "top.yaml": "ratio: 0.1\nratio: 0.2\n",
    "inside.yaml": "rehearsal:\n  buffer:\n    capacity: 5\n    capacity: 6\n",
    "flow.yml": "{ratio: 0.1, mode: append, ratio: 0.1}",
    "top.json": '{"ratio": 0.1, "ratio": 0.2}',
    "inside.json": '{"rehearsal": {"buffer": {"capacity": 5, "capacity": 6}}}',
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_stands_twice_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TWICE[name])
    key = "capacity" if "inside" in name else "ratio"
    with pytest.raises(ConfigError, match=f"the key '{key}' stands twice"):
        RehearsalConfig.load(tmp_path / name)


def test_a_weight_of_one_partition_under_two_names_is_refused() -> None:
    weights = {"buffer": {"partition_by": "label"}, "sampling": {"weights": {"1": 1.0, "01": 2.0}}}
    with pytest.raises(ConfigError, match="each stand for another partition"):
        RehearsalConfig.load(weights)


def test_yaml_that_merges_and_nests_is_read_as_before(tmp_path: Path) -> None:
    text = "base: &base {capacity: 5}\nrehearsal:\n  buffer:\n    <<: *base\n    capacity: 6\n  strategy: {name: er}\n"
    (tmp_path / "merged.yaml").write_text(text)
    assert RehearsalConfig.load(tmp_path / "merged.yaml").buffer.capacity == 6


def test_home_and_variables_in_paths_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    mmap = {"storage": "mmap", "path": "$SCRATCH/rows", "preload": "~/seed", "partition_by": "label"}
    sampling = {"weights": "balanced", "weights_file": "${SCRATCH}/w.json"}
    config = RehearsalConfig.load({"buffer": mmap, "sampling": sampling})
    assert config.buffer.path == "/scratch/rows"
    assert config.buffer.preload == str(tmp_path / "seed")
    assert config.sampling.weights_file == "/scratch/w.json"
    (tmp_path / "r.yaml").write_text("ratio: 0.5\n")
    assert RehearsalConfig.load("~/r.yaml").ratio == 0.5


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match="environment variable NOT_SET, which is not set"):
        RehearsalConfig.load({"buffer": {"storage": "mmap", "path": "$NOT_SET/rows"}})


def test_the_nearest_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no file; .* did you mean '.*/ds_config\.json'\?"):
        RehearsalConfig.load(tmp_path / "ds_conifg.json")
    with pytest.raises(ConfigError, match=r"as there is no folder '.*/none' either"):
        RehearsalConfig.load(tmp_path / "none" / "ds_config.json")


def test_a_key_without_which_a_section_cannot_be_is_called_missing() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.ratio_schedule\.to is missing\. The ratio at the end"):
        RehearsalConfig.load({"ratio_schedule": {"steps": 5}})
