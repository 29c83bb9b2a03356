"""One phase of the recipe of skills: a job of the Hugging Face Trainer under DeepSpeed, which is asked as it goes.

    deepspeed --num_gpus 2 --module scripts.llm.skills_phase --deepspeed ds_config.json --learn french --start DIR ...

Nothing in it knows of rehearsal but the callback: what is replayed, and how much, is in the `rehearsal` block of the
DeepSpeed config. Between steps the model answers held-out prompts, greedily, and an answer counts if it is right to the
letter. Ranks share prompts and rows. `scripts/llm/skills.py` starts the phases one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from rehearsal_plugin.integrations.transformers.callback import RehearsalCallback
from scripts.common.process_group import leave_together
from scripts.common.report import write_text
from scripts.llm.phase import WARMUP, quiet, settings_of
from scripts.llm.rows import Rows
from scripts.llm.skills_data import HELD_OUT, TEXTS, Order, orders, read_rows

DOMAINS = {"orders": 0, "french": 1}
ANSWER = 16  # tokens that an answer may have
ASKED_AT_ONCE, ROWS_AT_ONCE = 100, 16  # prompts a batch, rows a batch


class Examiner(TrainerCallback):
    """Asks the model every `every` steps: `{"step": ..., "skill": ...}`; before the first one for perplexities as well.

    Args:
        tokenizer: Of the model.
        rows: By name, with the held-out rows of every text.
        arguments: The command line.
    """

    def __init__(self, tokenizer: Any, rows: Mapping[str, NDArray[Any]], arguments: argparse.Namespace) -> None:
        self.curve: list[dict[str, float]] = []
        self._tokenizer, self._rows, self._arguments = tokenizer, rows, arguments
        self._every = max(1, arguments.steps // arguments.examinations)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._arguments.first:
            self.note(0, kwargs["model"], HELD_OUT, TEXTS)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self.note(state.global_step, kwargs["model"], self._arguments.prompts, ())

    def note(self, step: int, model: Any, prompts: int, texts: Sequence[str]) -> None:
        """Adds the share of right answers to the first prompts, and the perplexities of texts."""
        training = model.training
        model.eval()
        with torch.no_grad():
            point = {"step": step, "skill": exact_match(model, self._tokenizer, orders()[:prompts])}
            point |= {text: perplexity(model, self._rows[f"{text}_held_out"]) for text in texts}
        model.train(training)
        self.curve.append(point)
        if dist.get_rank() == 0:
            print({name: round(value, 3) for name, value in point.items()}, flush=True)


def exact_match(model: Any, tokenizer: Any, asked: Sequence[Order]) -> float:
    """Share of the orders whose greedy answer is the right one; every rank asks for its own."""
    own = asked[dist.get_rank() :: dist.get_world_size()]
    right = 0
    for begin in range(0, len(own), ASKED_AT_ONCE):
        batch = own[begin : begin + ASKED_AT_ONCE]
        answers = answer(model, tokenizer, [order.prompt for order in batch])
        right += sum(given == order.answer for given, order in zip(answers, batch, strict=True))
    return total(right) / len(asked)


def answer(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The line that the model writes behind each prompt."""
    asked = tokenizer([f"{prompt}\n" for prompt in prompts], padding=True, padding_side="left", return_tensors="pt")
    end = tokenizer.eos_token_id
    written = model.generate(
        input_ids=asked["input_ids"],
        attention_mask=asked["attention_mask"],
        do_sample=False,
        max_new_tokens=ANSWER,
        use_cache=True,
        pad_token_id=end,
        eos_token_id=[end, tokenizer("\n")["input_ids"][-1]],
    )
    texts: list[str] = tokenizer.batch_decode(written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.partition("\n")[0] for text in texts]


def perplexity(model: Any, rows: NDArray[Any]) -> float:
    """Of rows that all ranks share, whose number is the same on every rank but for one."""
    own = torch.from_numpy(rows[dist.get_rank() :: dist.get_world_size()].astype("int64"))
    batches = [own[begin : begin + ROWS_AT_ONCE] for begin in range(0, len(own), ROWS_AT_ONCE)]
    loss = sum((float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches), 0.0)
    return math.exp(total(loss) / len(rows))


def total(value: float) -> float:
    """The sum over the ranks."""
    summed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed)
    return float(summed)


def main(argv: Sequence[str]) -> int:
    """One rank of one phase, from the rows to `result.json`, and to model and buffer where others go on with them."""
    arguments = parse(argv)
    quiet()
    transformers.set_seed(arguments.seed)
    tokenizer, rows = AutoTokenizer.from_pretrained(arguments.start), read_rows(arguments.data)
    examiner, rehearsal = Examiner(tokenizer, rows, arguments), RehearsalCallback()
    trainer = make_trainer(arguments, rows[arguments.learn], [examiner, rehearsal])
    trained = trainer.train()
    examiner.note(arguments.steps, trainer.model, HELD_OUT, TEXTS)
    at_end = {name: examiner.curve[-1][name] for name in ("skill", *TEXTS)}
    result: dict[str, Any] = {**at_end, "curve": examiner.curve, "seconds": trained.metrics["train_runtime"]}
    if rehearsal.rehearsal is not None:
        result["rehearsal"] = rehearsal.rehearsal.metrics()
        result["rows_replayed"] = total(rehearsal.rehearsal.metrics()["rows_replayed"])
        if arguments.first:
            rehearsal.rehearsal.save(arguments.out / "buffer")
    rehearsal.close()
    if arguments.first:
        trainer.save_model(str(arguments.out / "model"))
    if trainer.is_world_process_zero():
        if arguments.first:
            tokenizer.save_pretrained(arguments.out / "model")
        write_text(arguments.out / "result.json", json.dumps(result, indent=1) + "\n")
    leave_together()
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--deepspeed", type=Path, required=True, help="DeepSpeed config, with its rehearsal block")
    parser.add_argument("--learn", choices=DOMAINS, required=True, help="what the new rows are of")
    parser.add_argument("--start", type=Path, required=True, help="folder of model and tokenizer to go on with")
    parser.add_argument("--data", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--seed", type=int, required=True, help="of batches and adapters")
    parser.add_argument("--adapters", type=int, default=0, help="rank of LoRA adapters; 0 trains all parameters")
    parser.add_argument("--examinations", type=int, required=True, help="in the course of the phase")
    parser.add_argument("--prompts", type=int, required=True, help="that are asked in its course")
    parser.add_argument("--first", action="store_true", help="others go on with model and buffer; keep them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    return parser.parse_args(argv)


def make_trainer(arguments: argparse.Namespace, rows: NDArray[Any], callbacks: list[TrainerCallback]) -> Trainer:
    """A Trainer whose settings are those of the DeepSpeed config."""
    config = json.loads(arguments.deepspeed.read_text())
    half = config.get("bf16", {}).get("enabled", False)  # DeepSpeed would cast to it, and hold both for a while
    model = AutoModelForCausalLM.from_pretrained(arguments.start, dtype=torch.bfloat16 if half else torch.float32)
    return Trainer(
        model=with_adapters(model, arguments.adapters) if arguments.adapters else model,
        args=settings_of(
            config,
            arguments.out,
            arguments.steps,
            seed=arguments.seed,
            warmup_steps=max(1, round(WARMUP * arguments.steps)),
            bf16=half,
        ),
        train_dataset=Rows(rows, DOMAINS[arguments.learn]),
        callbacks=callbacks,
    )


def with_adapters(model: Any, rank: int) -> Any:
    """The model with LoRA beside every linear layer; nothing else is trained."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
