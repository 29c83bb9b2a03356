"""Which limit on the length of rows is a trainer's own, and with what its collator pads."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.integrations.transformers.dataset_column import ColumnCollator, collator_of
from rehearsal_plugin.integrations.transformers.pairs import with_pairs
from rehearsal_plugin.integrations.transformers.row_lengths import with_padding

TRL, HUGGING_FACE = "trl.trainer", "transformers.data.data_collator"
PLAIN = f"{HUGGING_FACE}.DataCollatorForSeq2Seq", "transformers.trainer.Trainer"
SFT = f"{TRL}.sft_trainer.DataCollatorForLanguageModeling", f"{TRL}.sft_trainer.SFTTrainer"
REWARD = f"{TRL}.reward_trainer.DataCollatorForPreference", f"{TRL}.reward_trainer.RewardTrainer"
DPO = f"{TRL}.dpo_trainer.DataCollatorForPreference", f"{TRL}.dpo_trainer.DPOTrainer"
AXOLOTL = "axolotl.utils.collators.batching.DataCollatorForSeq2Seq", "axolotl.core.trainers.base.AxolotlTrainer"
ORPO = "trl.experimental.utils.DPODataCollatorWithPadding", "trl.experimental.orpo.orpo_trainer.ORPOTrainer"


def instance(name: str, **attributes: Any) -> Any:
    """An object whose class has the full name `name`."""
    module, _, kind = name.rpartition(".")
    made = type(kind, (), {"__module__": module})()
    vars(made).update(attributes)
    return made


def trainer(names: tuple[str, str], arguments: dict[str, Any], *, pad: int | None = 5, **collator: Any) -> Any:
    """A trainer with the collator and class `names`, whose tokenizer makes at most 64 tokens."""
    tokenizer = SimpleNamespace(pad_token_id=pad, model_max_length=64, padding_side="right")
    made = instance(names[0], **{"tokenizer": tokenizer, **collator})
    return instance(names[1], data_collator=made, processing_class=tokenizer, args=SimpleNamespace(**arguments))


@pytest.mark.parametrize(
    ("names", "arguments", "collator", "length"),
    [
        pytest.param(PLAIN, {}, {}, None, id="a tokenizer holds nobody's rows to its limit"),
        pytest.param(PLAIN, {"max_length": 32}, {}, None, id="arguments of a class that nobody knows"),
        pytest.param(PLAIN, {}, {"max_length": 32}, None, id="a length that rows are padded to, and may exceed"),
        pytest.param(SFT, {"max_length": 32}, {}, 32, id="SFT"),
        pytest.param(SFT, {"max_length": None}, {}, None, id="SFT without a limit"),
        pytest.param(
            SFT, {"max_length": 32, "dataset_kwargs": {"skip_prepare_dataset": True}}, {}, None, id="SFT unprepared"
        ),
        pytest.param(SFT, {"max_length": 30}, {"pad_to_multiple_of": 8}, 32, id="SFT, padded to a multiple"),
        pytest.param(AXOLOTL, {"max_seq_length": 32}, {}, None, id="axolotl, which may join the rows of a batch"),
        pytest.param(REWARD, {"max_length": 32}, {}, 32, id="reward"),
        pytest.param(DPO, {"max_length": 32}, {"max_length": 32}, 32, id="DPO"),
        pytest.param(DPO, {"max_length": 32}, {"max_length": None}, None, id="DPO with a collator that does not cut"),
        pytest.param(ORPO, {"max_length": 32}, {}, None, id="ORPO, which does not cut prompts"),
    ],
)
def test_only_a_limit_that_is_enforced_is_taken(
    names: tuple[str, str], arguments: dict[str, Any], collator: dict[str, Any], length: int | None
) -> None:
    section = with_padding(RehearsalConfig.load({}), trainer(names, arguments, **collator))
    assert section.padding is not None
    assert (section.padding.length, section.padding.token_id) == (length, 5)


def test_without_a_token_to_pad_with_nothing_is_said_of_padding() -> None:
    assert with_padding(RehearsalConfig.load({}), trainer(PLAIN, {}, pad=None)).padding is None
    assert with_padding(RehearsalConfig.load({}), trainer(SFT, {"max_length": 9}, pad_token_id=None)).padding is None


def test_what_the_section_says_stays() -> None:
    section = RehearsalConfig.load({"padding": {"length": 7}})
    assert with_padding(section, trainer(SFT, {"max_length": 32})) is section


def template(**attributes: Any) -> Any:
    """The collator of ms-swift: a method of its template, with an argument set."""
    tokenizer = SimpleNamespace(pad_token_id=5)
    made = instance("swift.template.base.Template", **{"tokenizer": tokenizer, "padding_side": "right", **attributes})
    type(made).data_collator = lambda self, batch, *, padding_to=None: batch
    return functools.partial(made.data_collator, padding_to=None)


def test_the_template_of_ms_swift_pads_behind_unless_it_says_otherwise() -> None:
    for collator in (template(), ColumnCollator(template(), "domain")):
        made = SimpleNamespace(data_collator=collator, args=SimpleNamespace())
        padding = with_padding(RehearsalConfig.load({}), made).padding
        assert padding is not None
        assert padding.token_id == 5
    left = SimpleNamespace(data_collator=template(padding_side="left"), args=SimpleNamespace())
    assert with_padding(RehearsalConfig.load({}), left).padding is None


def test_the_template_of_ms_swift_makes_pairs_in_one_of_its_modes() -> None:
    for mode, rows in (("train", 1), ("kto", 1), ("rlhf", 2)):
        collator = collator_of(SimpleNamespace(data_collator=template(mode=mode)))
        assert with_pairs(RehearsalConfig.load({}), collator).rows_per_sample == rows
