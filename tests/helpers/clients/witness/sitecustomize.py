"""Notes what a `Trainer` trains on, in every process that finds this folder on its `PYTHONPATH`.

Each process that trains writes `$CLIENT_WITNESS/rank<N>.pt`. It also logs what the plugin says at level INFO.
"""

from __future__ import annotations

import functools
import logging
import os
from importlib import util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[4]


def run_by_path(path: Path) -> Any:
    """A module, without its package."""
    spec = util.spec_from_file_location("_witness_import_hook", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def watch_trainers() -> None:
    """Have the methods of `transformers.Trainer` note what passes through them."""
    import torch
    from transformers import trainer as trainers

    torch.use_deterministic_algorithms(True, warn_only=True)
    note: dict[str, Any] = {"train": [], "items": [], "evaluation": [], "logs": [], "loss": []}

    def tensors(batch: Any) -> dict[str, Any]:
        return {name: value.detach().cpu().clone() for name, value in batch.items() if hasattr(value, "detach")}

    def training_step(original: Any, trainer: Any, model: Any, inputs: Any, items: Any = None, **keys: Any) -> Any:
        note["train"].append(tensors(inputs))
        note["items"].append(None if items is None else int(items))
        loss = original(trainer, model, inputs, items, **keys)
        note["loss"].append(float(loss))
        return loss

    def train(original: Any, trainer: Any, *arguments: Any, **keys: Any) -> Any:
        step = trainer.prediction_step

        def prediction_step(model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            note["evaluation"].append(tensors(inputs))
            return step(model, inputs, *others, **named)

        trainer.prediction_step = prediction_step  # not its caller: axolotl puts another loop in the place of that
        result = original(trainer, *arguments, **keys)
        note["logs"] = trainer.state.log_history
        note["weights"] = {name: value.detach().cpu().clone() for name, value in trainer.model.named_parameters()}
        torch.save(note, Path(os.environ["CLIENT_WITNESS"]) / f"rank{os.environ.get('RANK', 0)}.pt")
        return result

    for replacement in (training_step, train):
        replace(trainers.Trainer, replacement)
    logging.basicConfig()
    logging.getLogger("rehearsal_plugin").setLevel(logging.INFO)


def skip_shm() -> None:
    """Have DeepSpeed do without an operator that it would build for half a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def replace(owner: Any, replacement: Any) -> None:
    """Put `replacement(original, ...)` in the place of the method of its name."""
    original = getattr(owner, replacement.__name__)

    @functools.wraps(original)
    def method(*arguments: Any, **keys: Any) -> Any:
        return replacement(original, *arguments, **keys)

    setattr(owner, replacement.__name__, method)


if __name__ == "sitecustomize" and "CLIENT_WITNESS" in os.environ:
    hook = run_by_path(ROOT / "rehearsal_plugin" / "integrations" / "import_hook.py")
    hook.when_imported("transformers.trainer", watch_trainers)
    hook.when_imported("deepspeed", skip_shm)
