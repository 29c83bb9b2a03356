"""The Hugging Face Trainer: losses that are right, and features that stay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BatchEncoding, EarlyStoppingCallback, Trainer, TrainerCallback, default_data_collator

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.checkpoint import saver
from rehearsal_plugin.errors import BatchError, ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import IGNORED, LENGTH, Row, Rows, digest, losses, row, trainer, whole

SECTION: dict[str, Any] = {"buffer": {"capacity": 60}, "representatives": 2, "exchange": {"timeout_s": 20}}
PADDED = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": IGNORED}
NEW, ADDED = 4, 2


class Given(Trainer):
    """A trainer without the plugin whose loader gives the batches that another one saw."""

    batches: list[dict[str, Any]]

    def get_train_dataloader(self) -> Any:
        return Given.Loader(self.batches)

    class Loader:
        def __init__(self, batches: list[dict[str, Any]]) -> None:
            self._batches = batches

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return ({name: value.clone() for name, value in batch.items()} for batch in self._batches)

        def __len__(self) -> int:
            return len(self._batches)


# --- the loss --------------------------------------------------------------------------------------------------------


def same_rows_same_loss(folder: Path, passes: int, across: bool) -> dict[str, Any]:
    """A job with replay, and one without the plugin that gets the very same batches."""
    keys: dict[str, Any] = {"gradient_accumulation_steps": passes, "average_tokens_across_devices": across}
    callback = RehearsalCallback(SECTION)
    job, seen = trainer(folder, callbacks=[callback], **keys)
    job.train()
    callback.close()
    kind: Any = type("Replaying", (Given,), {"batches": seen.batches})
    plain, again = trainer(folder, kind=kind, **keys)
    plain.train()
    return {
        "losses": (losses(job), losses(plain)),
        "gradients": [float((a - b).abs().max()) for a, b in zip(seen.gradients, again.gradients, strict=True)],
        "sizes": [len(batch["input_ids"]) for batch in seen.batches],
        "numbers": [whole(batch) for batch in seen.batches],
        "metrics": callback.rehearsal.metrics() if callback.rehearsal is not None else {},
        "digest": digest(job.model) == digest(plain.model),
    }


def check_same(found: dict[str, Any], passes: int) -> None:
    assert found["sizes"][-passes:] == [NEW + ADDED] * passes, "rows were replayed"
    with_plugin, without = found["losses"]
    assert with_plugin == pytest.approx(without, rel=1e-6)
    assert max(found["gradients"]) < 1e-7
    assert found["digest"]


GRID = [(passes, across) for passes in (1, 2) for across in (True, False)]


def losses_on_ranks(folder: Path) -> list[dict[str, Any]]:
    return [same_rows_same_loss(folder / f"{passes}-{across}", passes, across) for passes, across in GRID]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(losses_on_ranks, 2, tmp_path_factory.mktemp("losses"), timeout_s=120)


@pytest.mark.parametrize(("passes", "across"), GRID)
def test_the_loss_is_that_of_the_same_rows_without_the_plugin_on_two_ranks(
    passes: int, across: bool, on_two: list[Any]
) -> None:
    for rank in on_two:
        check_same(rank[GRID.index((passes, across))], passes)


@pytest.mark.parametrize("passes", [1, 3])
def test_the_loss_is_that_of_the_same_rows_without_the_plugin(passes: int, tmp_path: Path) -> None:
    check_same(same_rows_same_loss(tmp_path, passes, True), passes)


def test_every_row_is_replayed_as_it_was_with_labels_masks_and_document_boundaries(on_two: list[Any]) -> None:
    for ranks in zip(*on_two, strict=True):
        own = [{number for batch in rank["numbers"] for number in batch[:NEW]} for rank in ranks]
        for rank in ranks:
            replayed = {number for batch in rank["numbers"] for number in batch[NEW:]}
            assert replayed & own[0]
            assert replayed & own[1]
            assert replayed <= own[0] | own[1]


def to_the_longest(rows: list[Row]) -> BatchEncoding:
    """Rows as the collator of a tokenizer gives them: padded behind, to the longest one."""
    batch = default_data_collator(rows)
    real = batch["attention_mask"].bool()
    width = int(real.sum(1).max())
    return BatchEncoding({name: batch[name].where(real, value)[:, :width] for name, value in PADDED.items()})


def test_rows_of_different_length_have_the_loss_of_the_same_rows_too(tmp_path: Path) -> None:
    callback = RehearsalCallback({**SECTION, "padding": {"length": LENGTH, "values": PADDED}})
    job, seen = trainer(tmp_path, callbacks=[callback], gradient_accumulation_steps=2)
    job.data_collator = to_the_longest  # type: ignore[assignment]
    job.train()
    callback.close()
    kind: Any = type("Replaying", (Given,), {"batches": seen.batches})
    plain, _ = trainer(tmp_path, kind=kind, gradient_accumulation_steps=2)
    plain.train()
    assert losses(job) == pytest.approx(losses(plain), rel=1e-6)
    assert digest(job.model) == digest(plain.model)
    shapes = [tuple(batch["labels"].shape) for batch in seen.batches]
    assert shapes[-1][0] == NEW + ADDED
    assert len({width for _, width in shapes}) > 1


def test_replace_keeps_the_size_of_every_micro_batch(tmp_path: Path) -> None:
    callback = RehearsalCallback({**SECTION, "mode": "replace"})
    job, seen = trainer(tmp_path, callbacks=[callback], gradient_accumulation_steps=2)
    job.train()
    assert [len(whole(batch)) for batch in seen.batches] == [NEW] * 16
    assert callback.rehearsal is not None
    assert callback.rehearsal.metrics()["rows_displaced"] == callback.rehearsal.metrics()["rows_replayed"] > 0
    callback.close()


# --- strategies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["der", "topk"])
def test_a_strategys_term_is_a_mean_over_the_micro_batches_of_a_step(name: str, tmp_path: Path) -> None:
    """Rows that a model of the same outputs recorded are at no distance: the losses are those of plain replay."""
    runs = []
    for strategy in ({"name": name, "alpha": 0.7, "k": 4}, {"name": "er"}):
        callback = RehearsalCallback({**SECTION, "strategy": {**strategy, "outputs": ["logits"]}})
        keys: dict[str, Any] = {"gradient_accumulation_steps": 2, "learning_rate": 1e-12}
        job, seen = trainer(tmp_path, callbacks=[callback], **keys)
        job.train()
        callback.close()
        runs.append((losses(job), [whole(batch) for batch in seen.batches]))
    assert runs[0][1] == runs[1][1]
    if name == "der":
        assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    else:  # the cross-entropy of a distribution with itself is its entropy, the same in every step
        extra = [a - b for a, b in zip(*[run[0] for run in runs], strict=True)]
        assert extra[-1] == pytest.approx(extra[-2], rel=0.2)
        assert 0 < extra[-1] < 0.7 * 1.7


def test_a_strategy_that_needs_the_losses_apart_says_so(tmp_path: Path) -> None:
    callback = RehearsalCallback({**SECTION, "strategy": {"name": "er-ace"}})
    job, _ = trainer(tmp_path, callbacks=[callback])
    with pytest.raises(ConfigError, match="loss"):
        job.train()
    callback.close()


# --- nothing of the trainer is lost ----------------------------------------------------------------------------------


def test_evaluation_in_between_sees_its_own_rows_only(tmp_path: Path) -> None:
    callback = RehearsalCallback(SECTION)
    job, seen = trainer(
        tmp_path, callbacks=[callback], eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=5
    )
    job.train()
    evaluations = sum("eval_loss" in entry for entry in job.state.log_history)  # 3 where the last step is one, too
    assert evaluations >= 2
    assert seen.evaluated == [5] * 4 * evaluations
    assert callback.rehearsal is not None
    assert callback.rehearsal.metrics()["rows_offered"] == 8 * NEW
    callback.close()


def test_logs_have_what_they_had_and_what_is_replayed(tmp_path: Path) -> None:
    callback = RehearsalCallback(SECTION)
    plain, _ = trainer(tmp_path)
    plain.train()
    job, _ = trainer(tmp_path, callbacks=[callback])
    job.train()
    callback.close()
    for without, entry in zip(plain.state.log_history, job.state.log_history, strict=True):
        added = entry.keys() - without.keys()
        assert without.keys() <= entry.keys()
        assert all(name.startswith("rehearsal/") for name in added)
    assert job.state.log_history[-2]["rehearsal/rows_replayed"] > 0


def test_early_stopping_stops(tmp_path: Path) -> None:
    callback = RehearsalCallback(SECTION)
    keys: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
    }
    stopping = EarlyStoppingCallback(2, 1e9)  # no improvement is large enough
    job, _ = trainer(
        tmp_path,
        callbacks=[callback, stopping],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        **keys,
    )
    job.train()
    callback.close()
    assert job.state.global_step == 3
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert len(list(tmp_path.glob("checkpoint-*/rehearsal-*.safetensors"))) == 2


# --- columns that the model does not take ----------------------------------------------------------------------------

BY_DOMAIN = {**SECTION, "buffer": {"capacity": 60, "partition_by": "domain"}, "hidden": ["domain"]}


def test_a_domain_column_is_counted_by_and_hidden_in_training_and_evaluation(tmp_path: Path) -> None:
    callback = RehearsalCallback(BY_DOMAIN)
    data = Rows(domain=True)
    job, _ = trainer(
        tmp_path, callbacks=[callback], data=data, remove_unused_columns=False, eval_strategy="steps", eval_steps=4
    )
    job.eval_dataset = Rows(20, 10_000, domain=True)
    job.train()
    assert callback.rehearsal is not None
    metrics = callback.rehearsal.metrics()
    assert sum(metrics[f"rows_stored/{key}"] for key in range(3)) == metrics["rows_stored"] == 32
    callback.close()


def test_a_hidden_column_is_not_seen_in_evaluations_outside_training_either(tmp_path: Path) -> None:
    callback = RehearsalCallback(BY_DOMAIN)
    job, _ = trainer(tmp_path, callbacks=[callback], data=Rows(domain=True), remove_unused_columns=False)
    job.eval_dataset = Rows(20, 10_000, domain=True)
    given: list[set[str]] = []
    assert job.model is not None
    job.model.register_forward_pre_hook(lambda _, __, fields: given.append(set(fields)), with_kwargs=True)
    job.evaluate()
    job.train()
    job.evaluate()
    callback.close()
    job.predict(job.eval_dataset)
    assert len(given) == 3 + 8 + 3 + 3
    assert not any("domain" in fields for fields in given)


def test_the_log_has_totals_alone_where_there_are_many_partitions(tmp_path: Path) -> None:
    class Many(Rows):
        def __getitem__(self, index: int) -> Row:
            return {**row(index), "domain": torch.tensor(index)}

    section = {**BY_DOMAIN, "losses_every": 1}
    callback = RehearsalCallback(section)
    job, _ = trainer(tmp_path, callbacks=[callback], data=Many(), remove_unused_columns=False, max_steps=20)
    job.train()
    callback.close()
    log = [entry for entry in job.state.log_history if "loss" in entry]
    assert any(name.startswith("rehearsal/tokens_new/") for name in log[0]), "four partitions so far"
    assert not any(name.startswith("rehearsal/") and name.count("/") > 1 for name in log[-1])
    assert "rehearsal/loss_replayed" in log[-1]


def test_a_column_that_nobody_has_is_named_with_the_cure(tmp_path: Path) -> None:
    callback = RehearsalCallback(BY_DOMAIN)
    job, _ = trainer(tmp_path, callbacks=[callback], data=Rows())
    with pytest.raises(BatchError, match="neither the batch nor the trainer's dataset has"):
        job.train()
    callback.close()


def test_a_trainer_that_reads_another_way_is_told(tmp_path: Path) -> None:
    class Other(Trainer):
        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
            return [next(epoch_iterator) for _ in range(num_batches)], None

    callback = RehearsalCallback(SECTION)
    job, _ = trainer(tmp_path, callbacks=[callback], kind=Other)
    with pytest.raises(ConfigError, match=r"super\(\).get_batch_samples"):
        job.train()


def test_without_a_section_a_trainer_is_as_always(tmp_path: Path) -> None:
    plain, _ = trainer(tmp_path)
    plain.train()
    callbacks = [RehearsalCallback(), RehearsalCallback({"enabled": False})]
    for callback in callbacks:
        job, _ = trainer(tmp_path, callbacks=[callback])
        job.train()
        assert digest(job.model) == digest(plain.model)
        assert callback.rehearsal is None


def test_the_log_has_the_losses_of_new_and_replayed_rows(tmp_path: Path) -> None:
    callback = RehearsalCallback({**SECTION, "losses_every": 1})
    job, _ = trainer(tmp_path, callbacks=[callback], gradient_accumulation_steps=2)
    job.train()
    callback.close()
    log = [entry for entry in job.state.log_history if "loss" in entry]
    assert log[0]["rehearsal/loss_new"] == pytest.approx(log[0]["loss"], rel=1e-5), "nothing is replayed yet"
    assert "rehearsal/loss_replayed" not in log[0]
    last = log[-1]
    assert last["rehearsal/loss_new"] != last["rehearsal/loss_replayed"]
    low, high = sorted((last["rehearsal/loss_new"], last["rehearsal/loss_replayed"]))
    assert low < last["loss"] < high, "which is the mean over both"


def test_importance_is_scaled_as_the_trainer_scales_its_loss(tmp_path: Path) -> None:
    """With weights that make up for the shares exactly, nothing changes; with others, the loss does."""
    runs = []
    for weights in (None, {"0": 1.0, "1": 1.0, "2": 1.0}, {"0": 1.0, "1": 50.0, "2": 1.0}):
        section = {**BY_DOMAIN, "strategy": {"partition_weights": weights}, "sampling": {"weights": "balanced"}}
        callback = RehearsalCallback({**section, "representatives": 3})
        keys: dict[str, Any] = {"remove_unused_columns": False, "gradient_accumulation_steps": 2}
        job, _ = trainer(tmp_path, callbacks=[callback], data=Rows(domain=True), learning_rate=1e-12, **keys)
        job.train()
        callback.close()
        runs.append(losses(job))
    plain, alike, other = runs
    assert alike[-4:] == pytest.approx(plain[-4:], rel=0.02), "shares are equal but for the first rows"
    assert max(abs(a - b) for a, b in zip(other[-4:], plain[-4:], strict=True)) > 1e-3


def test_an_older_checkpoint_is_removed_when_it_is_written(tmp_path: Path) -> None:
    section = {"buffer": {"capacity": 400}, "ratio": 0.5, "checkpoint": {"asynchronous": True}}
    callback = RehearsalCallback(section)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 12}
    job, _ = trainer(tmp_path, callbacks=[callback], **settings)
    removed = []

    def slowly(*arguments: Any, write: Any = saver._write_and_prune) -> Any:
        folder = arguments[0].folder
        time.sleep(0.2)  # the Trainer removes it within that time if it does not wait
        removed.append(not folder.is_dir())
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(saver, "_write_and_prune", slowly)
        job.train()
    callback.close()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]
    assert list(tmp_path.glob("checkpoint-12/rehearsal-*"))
    assert not any(removed)


def test_a_trial_of_a_search_has_its_buffer_beside_its_model(tmp_path: Path) -> None:
    callback = RehearsalCallback({"ratio": 0.5})
    job, _ = trainer(tmp_path, callbacks=[callback], save_strategy="steps", save_steps=4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(job), "_get_output_dir", lambda *_, **__: str(tmp_path / "run-0"))
        job.train()
    callback.close()
    written = sorted(path.parent.name for path in tmp_path.glob("run-0/*/rehearsal-*"))
    assert written == ["checkpoint-4", "checkpoint-8"]
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("more", [{}, {"losses_every": 1}, {"strategy": {"name": "der", "alpha": 0.5}}])
def test_a_compiled_model_is_not_compiled_anew_from_step_to_step(more: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    callback = RehearsalCallback({"buffer": {"capacity": 100}, "representatives": 2, **more})
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    compiled: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 16}
    job, _ = trainer(tmp_path, callbacks=[callback, Count()], **compiled)
    job.train()
    callback.close()
    assert graphs[0] > 0
    assert len(set(graphs[8:])) == 1, graphs


def test_label_smoothing_beside_losses_apart_is_refused_with_the_cure(tmp_path: Path) -> None:
    job, _ = trainer(
        tmp_path, callbacks=[RehearsalCallback({"ratio": 0.5, "losses_every": 1})], label_smoothing_factor=0.1
    )
    with pytest.raises(ConfigError, match=r"label_smoothing_factor .*compute_loss_func"):
        job.train()


def test_a_loss_that_was_never_asked_for_is_told_with_the_cure(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            labels = inputs.pop("labels")
            return torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())

    job, _ = trainer(tmp_path, callbacks=[RehearsalCallback({"ratio": 0.5, "losses_every": 1})], kind=Own)
    with pytest.raises(BatchError, match=r"compute_loss calls the model without labels.*compute_loss_func"):
        job.train()


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    job, _ = trainer(tmp_path, callbacks=[RehearsalCallback({"ratio": 0.5}), RehearsalCallback({"ratio": 0.5})])
    with pytest.raises(ConfigError, match="more than one RehearsalCallback"):
        job.train()


def test_ends_of_documents_beside_several_rows_are_refused(tmp_path: Path) -> None:
    job, _ = trainer(tmp_path, callbacks=[RehearsalCallback({"ratio": 0.5})])
    job.data_collator = lambda rows: {
        **{name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        "cu_seq_lens_q": torch.tensor([0, 5, 12]),
    }
    with pytest.raises(BatchError, match=r"'cu_seq_lens_q', .* do not tell alike where its documents begin"):
        job.train()


@pytest.mark.parametrize("more", [{}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_hidden_states_are_watched_without_a_call(more: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    section = {"ratio": 0.5, "retrieval": {"module": "transformer"}}
    callback = RehearsalCallback(section)
    job, _ = trainer(tmp_path, callbacks=[callback], **more)
    job.train()
    assert callback.rehearsal is not None
    assert callback.rehearsal.metrics()["rows_replayed"] > 0
    callback.close()
