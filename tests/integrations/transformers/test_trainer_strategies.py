"""Strategies under a Trainer: gradients are those of their formulas, over micro-batches and ranks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainerCallback

from rehearsal_plugin import BatchError, RehearsalCallback
from rehearsal_plugin.strategies import Part, Strategy
from rehearsal_plugin.strategies.base import register
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import VOCABULARY, Row, Rows, number_of, row, trainer
from tests.integrations.transformers.test_trainer import Given

SECTION: dict[str, Any] = {"buffer": {"capacity": 60}, "representatives": 2, "exchange": {"timeout_s": 20}}
NEW, ADDED, PASSES, CLASSES, ALPHA = 4, 2, 2, 5, 0.7


@register("tilt")
class Tilt(Strategy):
    """Adds the mean of the logits of replayed rows: a term whose gradient is easily told."""

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        return ALPHA * replayed[0].outputs["logits"].mean() if replayed else None

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        raise AssertionError("the model computes its loss itself")


class Tilted(Given):
    """Without the plugin: the term is added by hand, a mean over the micro-batches of a step."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        replayed = outputs["logits"][NEW:]
        return loss + ALPHA * replayed.mean() / PASSES if len(replayed) else loss


def tilted(folder: Path, across: bool) -> float:
    """The largest difference between the gradients of a strategy and those of its formula."""
    keys: dict[str, Any] = {"gradient_accumulation_steps": PASSES, "average_tokens_across_devices": across}
    callback = RehearsalCallback({**SECTION, "strategy": {"name": "tilt"}})
    job, seen = trainer(folder, callbacks=[callback], **keys)
    job.train()
    callback.close()
    kind: Any = type("Replaying", (Tilted,), {"batches": seen.batches})
    plain, again = trainer(folder, kind=kind, **keys)
    plain.train()
    assert len(seen.batches[-1]["input_ids"]) == NEW + ADDED
    return max(float((a - b).abs().max()) for a, b in zip(seen.gradients, again.gradients, strict=True))


class Classes(Rows):
    """Rows with a class each, which their number tells."""

    def __getitem__(self, index: int) -> Row:
        number = self._first + index
        return {"input_ids": row(number)["input_ids"], "labels": torch.tensor(number % CLASSES)}


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embedding(input_ids).mean(1))}


def classified(folder: Path, across: bool) -> dict[str, Any]:
    """A job with ER-ACE that learns nothing, so that all its gradients are those of the first parameters."""
    callback = RehearsalCallback({**SECTION, "strategy": {"name": "er-ace"}})
    own: Any = Scores()
    keys: dict[str, Any] = {"gradient_accumulation_steps": PASSES, "average_tokens_across_devices": across}
    data: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"], "learning_rate": 0.0}
    job, seen = trainer(folder, network=own, data=Classes(), callbacks=[callback], **keys, **data)
    job.compute_loss_func = callback.loss(cross_entropy)
    job.train()
    evaluated = job.evaluate(Classes(16, 1000))["eval_loss"]
    callback.close()
    numbers = [[number_of(ids) for ids in batch["input_ids"]] for batch in seen.batches]
    return {"numbers": numbers, "gradients": [one.tolist() for one in seen.gradients], "evaluated": evaluated}


def by_hand(numbers: list[int]) -> Tensor:
    """The gradient of a micro-batch."""
    model = Scores()
    ids = torch.stack([row(number)["input_ids"] for number in numbers])
    scores, labels = model(ids)["logits"], torch.tensor(numbers) % CLASSES
    if len(numbers) == NEW:
        loss = cross_entropy(scores, labels)
    else:
        absent = [one for one in range(CLASSES) if one not in labels[:NEW]]
        among = scores[:NEW].clone()
        among[:, absent] = -torch.inf
        loss = cross_entropy(among, labels[:NEW]) + cross_entropy(scores[NEW:], labels[NEW:])
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def both(folder: Path) -> dict[str, Any]:
    places = {across: folder / f"{across}-{dist.is_initialized()}" for across in (True, False)}
    return {
        "tilted": [tilted(place, across) for across, place in places.items()],
        "classified": [classified(place, across) for across, place in places.items()],
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "two ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("strategies")
    return [both(folder)] if request.param == 1 else run_ranks(both, 2, folder, timeout_s=120)


def test_a_term_beside_the_models_loss_is_a_mean_over_micro_batches_and_ranks(ranks: list[Any]) -> None:
    for rank in ranks:
        assert max(rank["tilted"]) < 1e-7


@pytest.mark.parametrize("across", [True, False])
def test_a_loss_of_its_own_is_a_mean_over_micro_batches_and_ranks(across: bool, ranks: list[Any]) -> None:
    runs = [rank["classified"][0 if across else 1] for rank in ranks]
    for step, gradient in enumerate(runs[0]["gradients"]):
        passes = [numbers for run in runs for numbers in run["numbers"][PASSES * step : PASSES * (step + 1)]]
        wanted = torch.stack([by_hand(numbers) for numbers in passes]).mean(0)
        assert torch.allclose(torch.tensor(gradient), wanted, atol=1e-6)
    assert len(runs[0]["numbers"][-1]) == NEW + ADDED


@torch.no_grad()
def test_in_evaluation_the_loss_is_the_criterion(ranks: list[Any]) -> None:
    numbers = range(1000, 1016)
    ids = torch.stack([row(number)["input_ids"] for number in numbers])
    wanted = float(cross_entropy(Scores()(ids)["logits"], torch.tensor(numbers) % CLASSES))
    for rank in ranks:
        assert [run["evaluated"] for run in rank["classified"]] == pytest.approx([wanted] * 2, rel=1e-5)


class OwnLoss(Trainer):
    """As in the documentation of Hugging Face: the model gets its labels, and its loss is computed anew."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def with_own_loss(folder: Path, strategy: dict[str, Any]) -> RehearsalCallback:
    callback = RehearsalCallback({**SECTION, "strategy": strategy})
    job, _ = trainer(folder, kind=OwnLoss, callbacks=[callback])
    with closing(callback):
        job.train()
    return callback


@pytest.mark.parametrize("name", ["der", "topk"])
def test_a_compute_loss_that_leaves_the_term_out_is_refused_before_the_step(tmp_path: Path, name: str) -> None:
    with pytest.raises(BatchError, match=rf"leaves out the term of strategy '{name}'.*compute_loss_func"):
        with_own_loss(tmp_path, {"name": name, "k": 4, "outputs": ["logits"]})


def test_a_compute_loss_of_ones_own_is_fine_for_a_plain_strategy(tmp_path: Path) -> None:
    callback = with_own_loss(tmp_path, {"name": "er"})
    assert callback.rehearsal is not None
    assert callback.rehearsal.metrics()["rows_replayed"] > 0


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_the_model_of_a_running_job_can_be_copied(tmp_path: Path, duplicate: str) -> None:
    sizes: list[tuple[float, float]] = []

    class Copying(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            twin = copy.deepcopy(model) if duplicate == "deepcopy" else pickle.loads(pickle.dumps(model))
            batch = {name: tensor[None] for name, tensor in row(1).items()}
            sizes.append((float(twin.train()(**batch)["loss"]), float(model.eval()(**batch)["loss"])))
            model.train()

    callback = RehearsalCallback({**SECTION, "strategy": {"name": "der", "outputs": ["logits"]}})
    job, _ = trainer(tmp_path, callbacks=[callback, Copying()])
    with closing(callback):
        job.train()
    assert sizes
    assert all(twin == pytest.approx(model) for twin, model in sizes)
