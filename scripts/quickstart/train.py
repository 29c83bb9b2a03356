"""Training of the quickstart: one engine learns Python; then two, with and without rehearsal, go on with C++.

The second phase alternates between the two arms in short segments, whose order is swapped every time. Both arms see
the same batches, and their step times are compared pair by pair, minutes of a busy machine hitting both alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from scripts.quickstart.data import LENGTH, Corpus
from scripts.quickstart.model import GPT

__all__ = ["Course", "Evaluation", "start_engine"]

SEGMENT = 10
"""Optimizer steps that one arm makes before it is the other's turn."""

EVALUATIONS = 5
"""Evaluations a phase; the last one at its end."""

WINDOWS = 256
"""Held-out windows of each domain, over all ranks."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses in nats per byte, by domain, after `step` steps of a phase."""

    phase: int
    arm: str
    step: int
    loss: dict[str, float]

    def row(self) -> dict[str, object]:
        """This evaluation as a line of the report."""
        losses = {f"{domain}_loss": value for domain, value in self.loss.items()}
        return {"phase": self.phase, "arm": self.arm, "step": self.step, **losses}


def start_engine(config: Mapping[str, Any], steps: int, seed: int) -> Any:
    """A DeepSpeed engine around a new GPT; the same seed gives the same weights on every rank.

    The learning rate of the config falls to zero in the last fifth of the `steps` steps of all phases together: at
    a constant one the losses of two arms differ by a percent for no other reason than noise.
    """
    # An optional operator for collectives in shared memory, which would first be compiled for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(seed)
    model = GPT(length=LENGTH)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        lr_scheduler=partial(LambdaLR, lr_lambda=lambda step: min(1.0, 5 * (1 - step / steps))),
        config=dict(config),
    )
    return engine


@dataclass
class Course:
    """Course of the training, alike on all ranks: domains, length of a phase, seed, evaluations.

    Attributes:
        evaluations: in the order in which they were made.
        pairs: for every pair of segments of phase two, mean seconds of a step by arm.
    """

    corpora: Mapping[str, Corpus]
    steps: int
    seed: int
    evaluations: list[Evaluation] = field(default_factory=list)
    pairs: list[dict[str, float]] = field(default_factory=list)

    def run_phase(self, phase: int, domain: str, arms: Mapping[str, Any]) -> None:
        """Trains every engine of `arms` for `steps` steps on the same batches of `domain`."""
        segments = [range(first, min(first + SEGMENT, self.steps)) for first in range(0, self.steps, SEGMENT)]
        spacing = -(-len(segments) // EVALUATIONS)
        with self._progress(f"phase {phase}: {domain}", len(arms)) as progress:
            for index, segment in enumerate(segments):
                order = list(arms) if index % 2 == 0 else list(arms)[::-1]
                seconds = {arm: self._train(arms[arm], domain, phase, segment, progress) for arm in order}
                if len(arms) > 1:
                    self.pairs.append(seconds)
                if (len(segments) - 1 - index) % spacing == 0:
                    self._evaluate(phase, segment.stop, arms)

    def final(self, phase: int, arm: str) -> Evaluation:
        """The last evaluation of an arm in a phase."""
        return [evaluation for evaluation in self.evaluations if (evaluation.phase, evaluation.arm) == (phase, arm)][-1]

    def _train(self, engine: Any, domain: str, phase: int, steps: range, progress: tqdm[Any]) -> float:
        """Trains one segment; returns the mean seconds of a step.

        The first step does not count: what the other arm left running in the background would be charged to it.
        """
        rows = engine.train_micro_batch_size_per_gpu()
        dist.barrier()
        seconds = []
        for step in steps:
            start = time.perf_counter()
            batch = self.corpora[domain].batch(rows, (self.seed, phase, step, dist.get_rank()))
            loss = engine(*(tensor.to(engine.device) for tensor in batch))
            engine.backward(loss)
            engine.step()
            seconds.append(time.perf_counter() - start)
            progress.update()
        counted = seconds[1:] or seconds
        return sum(counted) / len(counted)

    def _evaluate(self, phase: int, step: int, arms: Mapping[str, Any]) -> None:
        for arm, engine in arms.items():
            losses = {domain: held_out_loss(engine, corpus) for domain, corpus in self.corpora.items()}
            self.evaluations.append(Evaluation(phase, arm, step, losses))
            if dist.get_rank() == 0:
                shown = ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())
                tqdm.write(f"phase {phase}, step {step:4d}, {arm}: {shown}")

    def _progress(self, name: str, arms: int) -> tqdm[Any]:
        """A bar on rank 0 of a terminal; elsewhere the lines of the evaluations are enough."""
        hidden = None if dist.get_rank() == 0 else True
        return tqdm(total=self.steps * arms, desc=name, unit="step", disable=hidden, leave=False)


def held_out_loss(engine: Any, corpus: Corpus) -> float:
    """Mean loss over the held-out windows of all ranks, in nats per byte; the same on every rank."""
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for input_ids, labels in _share(engine, corpus):
            total[0] += engine(input_ids.to(engine.device), labels.to(engine.device)) * len(labels)
            total[1] += len(labels)
    engine.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _share(engine: Any, corpus: Corpus) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = engine.train_micro_batch_size_per_gpu()
    return corpus.held_out_batches(WINDOWS, rows, dist.get_rank(), dist.get_world_size())
