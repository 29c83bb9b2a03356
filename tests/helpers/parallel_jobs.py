"""Jobs whose ranks are peers of tensor or sequence parallelism, and the rows that each of them trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rehearsal_plugin.integrations.peers import data_parallel_ranks
from tests.helpers.witness import BATCH, BLOCK, Witness, engine_of, payload, samples

__all__ = [
    "BASE",
    "DIGITS",
    "MESH",
    "RESUMED",
    "SAVED",
    "SECTION",
    "TENSOR",
    "Part",
    "Split",
    "fed",
    "llama",
    "place",
    "resumed",
    "shared",
    "spelt",
]

SAVED, RESUMED = 10, 6  # optimizer steps before a checkpoint, and after it
SECTION = {**BLOCK, "ratio": 0.4, "exchange": {"timeout_s": 20}}


def layer(pattern: str, kind: str) -> dict[str, Any]:
    return {"patterns": [rf".*{pattern}\.weight$"], "partition_type": kind}


TENSOR = {
    "autotp_size": 2,
    "partition_config": {"use_default_specs": False, "layer_specs": [layer("up", "column"), layer("down", "row")]},
}
BASE, DIGITS = 32, 4  # of the tokens that spell a number
MESH: dict[str, Any] = {"sequence_parallel_size": 2, "data_parallel_size": 2}


class Split(Witness):
    """A witness with two layers for AutoTP to split."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().loss(97 * self.down(torch.tanh(self.up(x / 97))), labels)


class Part(Witness):
    """A witness that sees half of the columns of every sample, as a rank does that has half of the sequence."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor, labels: Tensor, uid: Tensor, even: Tensor) -> Tensor:
        assert torch.equal(x, columns(payload(uid, x.dtype)["x"], self.side)), (
            "the parts of a sample do not belong together"
        )
        self.seen.append(uid.tolist())
        return self.loss(torch.cat((x, x), 1), labels)


def columns(x: Tensor, half: int) -> Tensor:
    return x[:, 3 * half : 3 * half + 3].contiguous()


def place(engine: Any) -> int:
    """This rank's place in its data-parallel group: whose samples it sees."""
    return data_parallel_ranks(engine).index(dist.get_rank())


def fed(engine: Any, steps: range, *, half: int | None = None, owner: int | None = None) -> None:
    for step in steps:
        batch = samples(step, rank=place(engine) if owner is None else owner)
        if half is not None:
            batch["x"] = columns(batch["x"], half)
        engine.backward(engine(**batch))
        engine.step()


def shared(folder: Path) -> Path:
    """The folder that rank 0 names."""
    names = [str(folder)]
    dist.broadcast_object_list(names)
    return Path(names[0])


def outcome(engine: Any) -> dict[str, Any]:
    """Rows and counts of a rank; ends the engine."""
    engine.destroy()
    metrics = {name: value for name, value in engine.rehearsal.metrics().items() if not name.endswith("_ms")}
    return {"place": place(engine), "seen": engine.module.seen, "torn": engine.module.torn, "metrics": metrics}


def resumed(folder: Path, config: dict[str, Any], make: Callable[[], nn.Module], **how: Any) -> dict[str, Any]:
    """A run with a checkpoint in its middle, and another that goes on from it."""
    folder = shared(folder)
    whole = engine_of(config, make())
    fed(whole, range(SAVED), **how)
    whole.save_checkpoint(folder)
    fed(whole, range(SAVED, SAVED + RESUMED), **how)
    resumed_engine = engine_of(config, make())
    resumed_engine.load_checkpoint(folder)
    fed(resumed_engine, range(SAVED, SAVED + RESUMED), **how)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*rehearsal-step*"))
    return {"whole": outcome(whole), "again": outcome(resumed_engine), "files": files}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    config = LlamaConfig(vocab_size=BASE, **{"attn_implementation": "sdpa", **small})
    model: nn.Module = LlamaForCausalLM(config)
    return model


def spelt(number: int) -> dict[str, Tensor]:
    digits = samples(number)["uid"][:, None] // BASE ** torch.arange(DIGITS) % BASE
    tokens = torch.cat((digits, digits), 1)
    return {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(2 * DIGITS).repeat(BATCH, 1)}
