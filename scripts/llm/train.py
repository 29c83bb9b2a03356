"""Continual pre-training of a language model: English, then French, then German, with and without replay.

    python -m scripts.llm.train --size small       # nine minutes on two cores: one seed, 0, 5 and 25 % replay
    python -m scripts.llm.train --size full        # all ratios, German, three seeds, variants; hours

Every phase is a job of the Hugging Face Trainer on two ranks under the DeepSpeed launcher (`scripts/llm/phase.py`).
Replay is compute-equivalent: x % of the rows of a step are old ones, and as many new ones are left out. The union is
trained from scratch, for as many steps as the phases together. A finished training is kept in `out/train_llm` and not
run again, so that an interrupted recipe goes on where it was, and a smaller one can be made larger. `--known
docs/results/train_llm.json` leaves out what that report has, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.common.arguments import positive_int
from scripts.common.launch import launch
from scripts.common.paths import ROOT
from scripts.common.report import write_report, write_text
from scripts.common.tables import print_table
from scripts.llm.data import LENGTH, Corpus, load
from scripts.llm.plan import BASE, EXP3, LANGUAGES, SIZES, Run, config_of, key_of, plan, rows_of, variants
from scripts.llm.results import Row, summarise, table

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""Lets glibc keep large blocks; it would give them back and fault them in again at every step, a fifth of its time."""


def main(argv: Sequence[str]) -> int:
    """Runs what is missing, tells the results, writes the report."""
    arguments = parse(argv)
    recipe = Recipe(arguments)
    wanted = list(wanted_runs(arguments))
    for number, (variant, run) in enumerate([] if arguments.report_only else wanted, 1):
        print(f"{number} of {len(wanted)}: {run.name} ({variant}, {run.steps} steps)", flush=True)
        if not recipe.finished(run):
            recipe.train(run)
            publish(recipe, wanted, arguments)
    publish(recipe, wanted, arguments)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what is not given is that of the size."""
    parser = argparse.ArgumentParser(description="Continual pre-training: English, then French, then German.")
    parser.add_argument("--size", choices=SIZES, default="small", help="how much of the recipe (default: %(default)s)")
    parser.add_argument(
        "--ranks", type=positive_int, default=2, help="processes on this machine (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive_int, help="optimizer steps of a phase")
    parser.add_argument("--seeds", type=positive_int, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="others follow it (default: %(default)s)")
    parser.add_argument("--ratios", type=float, nargs="+", metavar="PERCENT", help="0 is always among them")
    parser.add_argument("--german", action=argparse.BooleanOptionalAction, help="whether German follows French")
    parser.add_argument("--variants", choices=("none", "all"), help="whether other settings are tried")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/llm_en_fr_de.json", help="DeepSpeed config")
    parser.add_argument("--pages", type=Path, help="folder of the pages by language, in place of Debian's packages")
    parser.add_argument("--out", type=Path, default=ROOT / "out/train_llm", help="folder of the results")
    parser.add_argument("--known", type=Path, help="report of trainings that are not run again")
    parser.add_argument("--report-only", action="store_true", help="of what is finished, and train nothing")
    arguments = parser.parse_args(argv)
    size = SIZES[arguments.size]
    for name in ("steps", "seeds", "ratios", "german"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(size, name))
    arguments.ratios = sorted({0.0, *arguments.ratios})
    arguments.variants = size.variants if arguments.variants is None else arguments.variants == "all"
    return arguments


def wanted_runs(arguments: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """Every training of every variant, what matters most first: French, then the variants, then German."""
    base, *others = variants(arguments.steps).items()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    yield from ((BASE, run) for seed in seeds for run in plan(base[1], seed, arguments.ratios, german=False))
    if arguments.variants:
        for seed in seeds:
            of_seed = ((name, it) for name, it in others if seed < arguments.first_seed + it.seeds)
            yield from ((name, run) for name, it in of_seed for run in plan(it, seed, it.ratios, german=it.german))
    if arguments.german:
        runs = (run for seed in seeds for run in plan(base[1], seed, arguments.ratios, german=True))
        yield from ((BASE, run) for run in runs if run.learns[-1] == LANGUAGES[2])


class Recipe:
    """Trainings and the folders that they are kept in.

    Args:
        arguments: The command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._config: dict[str, Any] = json.loads(arguments.config.read_text())
        self._runs: Path = arguments.out / "runs"
        self.cache = ROOT / "out/llm_data" if arguments.pages is None else arguments.out / "data"
        known = [] if arguments.known is None else json.loads(arguments.known.read_text())["rows"]
        self._known: dict[str, Row] = {row["key"]: row for row in known}

    def key(self, run: Run) -> str:
        """See `key_of`."""
        return key_of(run, self._config, self._arguments.ranks)

    def folder(self, run: Run) -> Path:
        """Folder of a training: its config, its model, its buffer, its result."""
        name = "-".join([f"seed{run.seed}", *run.learns, *([run.arm] if run.arm != run.learns[-1] else [])])
        return self._runs / f"{name}-{self.key(run)}"

    def finished(self, run: Run) -> bool:
        """Whether a training came to its end, here or in the known report."""
        return self.key(run) in self._known or (self.folder(run) / "result.json").is_file()

    def train(self, run: Run) -> None:
        """One training, after the one that it goes on from where that is missing.

        Raises:
            SystemExit: The job failed; what it printed is above.
        """
        if run.after is not None and not (self.folder(run.after) / "model").is_dir():
            self.train(run.after)
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "deepspeed.json"
        write_text(config, json.dumps(self.deepspeed_config(run), indent=1) + "\n")
        if run.made_up:
            self.make_up(run)
        elif run.surprising and run.after is not None:
            self._take_out(run.after, run)
        options = {"deepspeed": config, "steps": run.steps, "seed": run.seed, "width": run.width, "out": folder}
        options |= {"cache": self.cache, "pages": self._arguments.pages}
        options |= {"start": run.after and self.folder(run.after) / "model"}
        bandit = ["--bandit"] if run.mixture == EXP3 else []
        job = [*flags(options), *bandit, "--learn", *run.learns]
        status = launch("scripts.llm.phase", self._arguments.ranks, job, MALLOC)
        if status:
            raise SystemExit(f"{run.name}: the job ended with status {status}; the same command tries it again")

    def make_up(self, run: Run) -> None:
        """Rows that the English model says itself, with the fields of those that it was trained on."""
        assert run.after is not None  # by the plan,
        assert run.buffer is not None  # as this
        rows = rows_of(run.buffer, len(self._corpora[LANGUAGES[0]].train))
        options = {"from-model": self.folder(run.after) / "model", "length": LENGTH, "rows": rows, "seed": run.seed}
        options |= {"fields": "input_ids,labels", "partition": "domain=0", "seen": self._rows(run.after)}
        options |= {"out": self._preload(run), "ranks": self._arguments.ranks, "device": "cpu"}
        subprocess.run([sys.executable, "-m", "rehearsal_plugin.cli", "seed", *flags(options)], check=True)

    def _take_out(self, source: Run, run: Run) -> None:
        """The rows that another training stored, without the losses beside them: no policy looks at these any more."""
        rows = self.folder(run) / "rows.safetensors"
        rehearsal = [sys.executable, "-m", "rehearsal_plugin.cli"]
        subprocess.run([*rehearsal, "export", str(self.folder(source) / "buffer"), str(rows)], check=True)
        options = {"data": rows, "fields": "input_ids,labels,domain", "seen": self._rows(source)}
        options |= {"out": self._preload(run), "ranks": self._arguments.ranks}
        subprocess.run([*rehearsal, "seed", *flags(options)], check=True)

    def _preload(self, run: Run) -> Path | None:
        """The folder of the rows that a training begins with."""
        if run.made_up or (run.surprising and run.after is not None):
            return self.folder(run) / "rows"
        return None if run.after is None else self.folder(run.after) / "buffer"

    @cached_property
    def _corpora(self) -> dict[str, Corpus]:
        return load(self.cache, LENGTH, self._arguments.pages)

    def deepspeed_config(self, run: Run) -> dict[str, Any]:
        english, preload = len(self._corpora[LANGUAGES[0]].train), self._preload(run)
        rows = None if preload is None else str(preload)
        return config_of(run, self._config, english, self._arguments.ranks, rows)

    def _rows(self, run: Run) -> int:
        """Rows that a training goes through, on all ranks."""
        micro_batches = run.steps * int(self._config["gradient_accumulation_steps"])
        return micro_batches * int(self._config["train_micro_batch_size_per_gpu"]) * int(self._arguments.ranks)

    def row(self, variant: str, run: Run) -> Row:
        """A finished training as a line of the report."""
        known = self._known.get(self.key(run))
        if known is not None:  # also where it was trained again, for one that goes on from it
            return {**known, "variant": variant}
        result = json.loads((self.folder(run) / "result.json").read_text())
        named = {"variant": variant, "seed": run.seed, "arm": run.arm, "learns": " + ".join(run.learns)}
        named |= {"key": self.key(run)}
        named |= {"after": run.learns[-1], "ratio": run.ratio, "steps": run.steps, "rate": run.rate}
        rows = self._rows(run)
        epochs = rows / sum(len(self._corpora[language].train) for language in run.learns)
        named |= {"tokens": rows * LENGTH, "epochs": epochs}
        losses = result.pop("losses")
        return {**named, **losses, **result}


def flags(options: Mapping[str, object]) -> list[str]:
    """A command line of what is given."""
    return [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]


def publish(recipe: Recipe, wanted: Sequence[tuple[str, Run]], arguments: argparse.Namespace) -> None:
    """Prints the table and writes the report of all that is finished."""
    base = {run for variant, run in wanted if variant == BASE}
    done = [one for one in wanted if recipe.finished(one[1])]
    begun = {variant for variant, run in done if run not in base} | {BASE}  # the others have but what they share
    rows = [recipe.row(variant, run) for variant, run in done if variant in begun]
    summary = summarise(rows, arguments.ratios)
    report = write_report(arguments.out, summary, rows, ranks=arguments.ranks)
    print_table("Held-out loss in nats a token", *table(rows))
    print(*(f"{name}: {value:.4f}" for name, value in summary.items()), report, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
