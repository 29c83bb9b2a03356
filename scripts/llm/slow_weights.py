"""Do slow weights keep what the fast ones forget? Moving averages of the weights, beside one phase of the recipe.

    python -m scripts.llm.slow_weights --seed 9

English, then French with 5 % replay by a ratio that rises, as in `scripts/llm/train.py`. Beside the second phase run
moving averages, `slow += (fast - slow) * every / horizon` after each `every` steps. They change nothing in the
training, so one run tries them all. At its end all of them are evaluated, and points on the line from the English
weights to the last ones, to which Reptile would go back: `start + share * (end - start)`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.common.arguments import positive_int
from scripts.common.launch import is_rank, launch
from scripts.common.paths import ROOT
from scripts.common.report import write_report, write_text
from scripts.common.tables import print_table
from scripts.llm.data import LENGTH, load
from scripts.llm.plan import LANGUAGES, RISING, plan, variants
from scripts.llm.train import MALLOC, Recipe, flags
from scripts.llm.train import parse as parse_recipe

HORIZONS = (30, 100, 300, 1000, 3000)
"""Steps that an average looks back over."""

SHARES = (0.9, 0.8, 0.6)
EVERY = 10


def main(argv: Sequence[str]) -> int:
    """Trains what is missing, and writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=9, help="one that nothing is reported of (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=3000, help="of a phase (default: %(default)s)")
    parser.add_argument("--weight", type=float, default=4.0, help="of a replayed row (default: %(default)s)")
    parser.add_argument("--pages", type=Path, help="folder of the pages, as for scripts.llm.train")
    parser.add_argument("--out", type=Path, default=ROOT / "out/slow_weights", help="folder of the report")
    arguments = parser.parse_args(argv)
    given = {"steps": arguments.steps, "pages": arguments.pages, "out": arguments.out}
    recipe = Recipe(parse_recipe(["--size", "full", *flags(given)]))
    setting = replace(variants(arguments.steps)[RISING], weight=arguments.weight)
    english, _, french, *_ = plan(setting, arguments.seed, (0.0, 5.0), german=False)
    if not (recipe.folder(english) / "model").is_dir():
        recipe.train(english)
    rows = beside(recipe, english, french, arguments)
    write_report(arguments.out, {}, rows, ranks=2)
    print_table("Held-out loss in nats a token", ["weights", *LANGUAGES[:2]], [cells(row) for row in rows])
    return 0


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [row["weights"], *(f"{row[language]:.4f}" for language in LANGUAGES[:2])]


def beside(recipe: Recipe, english: Any, french: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Losses of the last weights and of all slow ones, after a phase that goes on from English.

    Raises:
        SystemExit: The job failed.
    """
    out: Path = arguments.out / "french"
    write_text(out / "deepspeed.json", json.dumps(recipe.deepspeed_config(french), indent=1) + "\n")
    options = {"deepspeed": out / "deepspeed.json", "steps": french.steps, "seed": french.seed, "width": french.width}
    options |= {"out": out, "cache": recipe.cache, "pages": arguments.pages, "start": recipe.folder(english) / "model"}
    status = launch("scripts.llm.slow_weights", 2, [*flags(options), "--learn", "french"], MALLOC)
    if status:
        raise SystemExit(f"the job ended with status {status}")
    rows: list[dict[str, Any]] = json.loads((out / "slow.json").read_text())
    return rows


def run(argv: Sequence[str]) -> None:
    """One rank of the phase."""
    import torch
    from transformers import TrainerCallback

    from rehearsal_plugin.integrations.transformers.callback import RehearsalCallback
    from scripts.common.process_group import leave_together
    from scripts.llm import phase

    class Averages(TrainerCallback):
        """Keeps the averages, each as one vector."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Begin all at the first weights."""
            self.model = kwargs["model"]
            self.start = self.weights()
            self.slow = {horizon: self.start.clone() for horizon in HORIZONS}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Move all averages."""
            if state.global_step % EVERY == 0:
                fast = self.weights()
                for horizon, slow in self.slow.items():
                    slow.lerp_(fast, min(1.0, EVERY / horizon))

        def weights(self) -> torch.Tensor:
            """All parameters in one vector."""
            return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()

        def choices(self) -> Iterator[tuple[str, torch.Tensor]]:
            """All weights to be evaluated, by name; the last ones first."""
            end = self.weights()
            yield "as trained", end
            yield from ((f"average over {horizon:,} steps", slow) for horizon, slow in self.slow.items())
            yield from ((f"{share:.0%} of the way", self.start + share * (end - self.start)) for share in SHARES)

    phase.quiet()
    arguments, recorder, rehearsal, averages = phase.parse(argv), phase.Recorder(), RehearsalCallback(), Averages()
    corpora = load(arguments.cache, LENGTH, arguments.pages)
    trainer = phase.make_trainer(arguments, corpora, recorder, rehearsal)
    trainer.add_callback(averages)
    trainer.train()
    rows = []
    for name, weights in averages.choices():
        torch.nn.utils.vector_to_parameters(weights, averages.model.parameters())
        rows.append(
            {"weights": name, **{one: phase.held_out_loss(trainer, corpora[one], one) for one in LANGUAGES[:2]}}
        )
    rehearsal.close()
    if trainer.is_world_process_zero():
        write_text(arguments.out / "slow.json", json.dumps(rows, indent=1) + "\n")
    leave_together()


if __name__ == "__main__":
    if is_rank():
        run(sys.argv[1:])
    else:
        sys.exit(main(sys.argv[1:]))
