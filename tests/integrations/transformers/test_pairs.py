"""Collators of TRL and LLaMA-Factory that make pairs are known by their class and the version of their library."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.transformers.pairs import with_answers, with_pairs
from tests.integrations.transformers.test_trainer_pairs import pairs, train

SECTION: dict[str, Any] = {"buffer": {"capacity": 50}, "representatives": 2}


def collator(name: str, made: Any = pairs) -> Any:
    """An object whose class has the full name of another one's."""
    module, _, kind = name.rpartition(".")
    return type(kind, (), {"__module__": module, "__call__": lambda _, examples: made(examples)})()


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda number: monkeypatch.setattr(metadata, "version", lambda _: number)


@pytest.mark.parametrize(
    ("name", "number", "rows"),
    [
        ("trl.trainer.dpo_trainer.DataCollatorForPreference", "1.16.0", 2),
        ("trl.trainer.dpo_trainer.DataCollatorForPreference", "0.29.0", 2),
        ("trl.trainer.dpo_trainer.DataCollatorForPreference", "0.28.0", 1),  # a field for each, and a row an example
        ("trl.trainer.dpo_trainer.DataCollatorForVisionPreference", "1.16.0", 2),
        ("trl.trainer.reward_trainer.DataCollatorForPreference", "0.24.0", 2),
        ("llamafactory.data.collator.PairwiseDataCollatorWithPadding", "0.9.5", 2),
        ("trl.trainer.sft_trainer.DataCollatorForLanguageModeling", "1.16.0", 1),
        ("mine.DataCollatorForPreference", "1.16.0", 1),
    ],
)
def test_the_rows_of_an_example_are_known_by_the_collator(name: str, number: str, rows: int, version: Any) -> None:
    version(number)
    section = with_pairs(RehearsalConfig.load(SECTION), collator(name))
    assert (section.rows_per_sample, section.sample_layout) == (rows, "halves")
    assert section.buffer.capacity == 50


def test_what_the_section_says_stays(version: Any) -> None:
    version("1.16.0")
    config = RehearsalConfig.load({**SECTION, "rows_per_sample": 1})
    assert with_pairs(config, collator("trl.trainer.dpo_trainer.DataCollatorForPreference")) is config


def answers_trainer(name: str, *, is_encoder_decoder: bool = False) -> Any:
    module, _, kind = name.rpartition(".")
    made = type(kind, (), {"__module__": module})()
    made.is_encoder_decoder = is_encoder_decoder
    return made


@pytest.mark.parametrize(
    "name", ["trl.experimental.orpo.orpo_trainer.ORPOTrainer", "trl.trainer.cpo_trainer.CPOTrainer"]
)
def test_the_fields_of_answers_are_known_by_the_trainer(name: str) -> None:
    section = with_answers(RehearsalConfig.load({**SECTION, "hidden": ["domain"]}), answers_trainer(name))
    assert section.fields is not None
    assert sorted(section.fields) == sorted(
        f"{answer}_{part}" for answer in ("chosen", "rejected") for part in ("input_ids", "attention_mask", "labels")
    )
    assert section.buffer.capacity == 50
    assert section.hidden == ["domain"]
    with_key = RehearsalConfig.load({**SECTION, "buffer": {"partition_by": "domain"}})
    assert "domain" in (with_answers(with_key, answers_trainer(name)).fields or [])


@pytest.mark.parametrize(
    ("section", "made"),
    [
        ({"fields": ["chosen_input_ids"]}, answers_trainer("trl.experimental.orpo.orpo_trainer.ORPOTrainer")),
        ({}, answers_trainer("mine.ORPOTrainer")),
        ({}, answers_trainer("trl.experimental.cpo.cpo_trainer.CPOTrainer", is_encoder_decoder=True)),
    ],
)
def test_other_trainers_and_sections_say_their_fields_themselves(section: dict[str, Any], made: Any) -> None:
    config = RehearsalConfig.load(section)
    assert with_answers(config, made) is config


def test_a_setting_for_single_rows_is_refused(version: Any) -> None:
    version("1.16.0")
    config = RehearsalConfig.load({**SECTION, "strategy": {"name": "der"}})
    with pytest.raises(ConfigError, match="rows_per_sample"):
        with_pairs(config, collator("trl.trainer.dpo_trainer.DataCollatorForPreference"))


def test_a_subclass_makes_pairs_too(version: Any) -> None:
    version("1.16.0")
    known = collator("trl.trainer.reward_trainer.DataCollatorForPreference")
    mine = type("Mine", (type(known),), {"__module__": "mine"})()
    assert with_pairs(RehearsalConfig.load(SECTION), mine).rows_per_sample == 2


def test_a_trainer_replays_the_pairs_of_such_a_collator_whole(tmp_path: Path, version: Any) -> None:
    version("1.16.0")
    seen = train(tmp_path, collator("trl.trainer.dpo_trainer.DataCollatorForPreference"))
    assert [len(batch) for batch in seen[-3:]] == [12, 12, 12]
    assert all(batch[: len(batch) // 2] == batch[len(batch) // 2 :] for batch in seen)
