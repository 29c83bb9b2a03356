"""Domains of mixed datasets, by the column that the page on the Trainer adds to each before they are mixed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from datasets import Dataset, concatenate_datasets, interleave_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from rehearsal_plugin import RehearsalCallback
from tests.helpers.clients.tiny_llm import LONGEST
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.clients

PAGE = (ROOT / "docs" / "guides" / "trainers" / "hf_trainer.md").read_text()
RECIPE = next(block for block in re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL) if "interleave_datasets" in block)


def parts(tiny: Path, folder: Path, data: str, *, streamed: bool) -> list[Any]:
    """The law, code and news of the recipe."""
    whole = Dataset.from_json(str(tiny / data / "train.jsonl"), cache_dir=str(folder / "cache"))
    shards = [whole.shard(3, number) for number in range(3)]
    return [shard.to_iterable_dataset() for shard in shards] if streamed else shards


def domains(mixed: Any) -> dict[str, int]:
    """The domain of each text."""
    return {row.get("text") or row["prompt"] + row["chosen"]: row["domain"] for row in mixed}


def by_recipe(law: Any, code: Any, news: Any) -> Any:
    names = {"law": law, "code": code, "news": news}
    exec(RECIPE, names)
    return names["train_dataset"]


def concatenated(*datasets: Any) -> Any:
    return concatenate_datasets([one.map(lambda _, n=number: {"domain": n}) for number, one in enumerate(datasets)])


def interleaved(*datasets: Any) -> Any:
    marked = [one.map(lambda _, n=number: {"domain": n}) for number, one in enumerate(datasets)]
    return interleave_datasets(marked, probabilities=[0.5, 0.3, 0.2], seed=0, stopping_strategy="all_exhausted")


@pytest.mark.parametrize("mix", [by_recipe, concatenated, interleaved])
@pytest.mark.parametrize(
    ("kinds", "data", "streamed"),
    [
        pytest.param((SFTTrainer, SFTConfig), "text", False, id="SFT"),
        pytest.param((SFTTrainer, SFTConfig), "text", True, id="SFT, streamed"),
        pytest.param((ORPOTrainer, ORPOConfig), "pairs", False, id="ORPO"),  # which reads no streams
    ],
)
def test_rows_are_counted_and_weighed_by_the_dataset_that_they_come_from(
    tiny: Path, tmp_path: Path, kinds: tuple[Any, Any], data: str, mix: Callable[..., Any], streamed: bool
) -> None:
    trainer_class, config_class = kinds
    mixed = mix(*parts(tiny, tmp_path, data, streamed=streamed))
    expected = domains(mixed)
    assert set(expected.values()) == {0, 1, 2}
    mixed = mixed.shuffle(seed=0)
    callback = RehearsalCallback(
        {
            "buffer": {"capacity": 300, "partition_by": "domain"},
            "representatives": 2,
            "sampling": {"weights": {"1": 1}},
        }
    )
    settings: dict[str, Any] = {"max_steps": 12, "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True}
    job = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(tiny / "model"),
        args=config_class(str(tmp_path / "out"), bf16=False, save_strategy="no", max_length=LONGEST, **settings),
        train_dataset=mixed,
        processing_class=AutoTokenizer.from_pretrained(tiny / "model"),
        callbacks=[callback],
    )
    seen: set[str] = set()
    job.model.register_forward_pre_hook(lambda _, __, fields: seen.update(fields), with_kwargs=True)
    job.train()
    assert callback.rehearsal is not None
    metrics = callback.rehearsal.metrics()
    callback.close()
    assert "domain" not in seen
    assert metrics["rows_stored"] == 96
    assert all(metrics[f"rows_stored/{key}"] > 5 for key in range(3))
    assert metrics["rows_replayed/1"] == metrics["rows_replayed"] > 10
