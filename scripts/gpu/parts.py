"""The parts, what matters most first."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PARTS", "Part"]

NO_TESTS = 5
"""Exit status of pytest where no test was chosen."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: Of its figures and its heading in the log.
        gpus: GPUs that it wants.
        limit_s: Seconds that it may take.
        command: What Python is called with; `{out}` is the file of its figures.
        good: Exit statuses that are none of a failure.
    """

    name: str
    gpus: int
    limit_s: float
    command: tuple[str, ...]
    good: tuple[int, ...] = (0,)


def ranks(name: str, gpus: int, number: int, backend: str) -> Part:
    """A job of some ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number))
    return Part(name, gpus, 60, (*launcher, "-m", "scripts.gpu.ranks", "--backend", backend, "--out", "{out}"))


PARTS = (
    Part("tests", 1, 150, ("-m", "pytest", "-q", "-m", "gpu", "tests/unit"), good=(0, NO_TESTS)),
    Part("identity", 0, 60, ("-m", "scripts.gpu.identity", "--out", "{out}")),
    ranks("nccl_1", 1, 1, "nccl"),
    ranks("gloo_2", 0, 2, "gloo"),
    ranks("nccl_2", 2, 2, "nccl"),
    Part("copies", 0, 60, ("-m", "scripts.gpu.copies", "--out", "{out}")),
    Part("overhead", 0, 150, ("-m", "scripts.gpu.overhead", "--out", "{out}")),
    Part("compiled", 0, 90, ("-m", "scripts.gpu.compiled", "--out", "{out}")),
)
