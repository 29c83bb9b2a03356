"""One phase of continual pre-training: a job of the Hugging Face Trainer under DeepSpeed.

    deepspeed --num_gpus 2 --module scripts.llm.phase --deepspeed ds_config.json --learn french --start DIR --out DIR

Nothing in it knows of rehearsal but the callback: what is replayed, and how much, is in the `rehearsal` block of the
DeepSpeed config. Every phase warms the learning rate up anew, with a new optimizer, and lets it fall along a cosine to
a tenth. `scripts/llm/train.py` starts the phases one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from rehearsal_plugin.buffer.policies import register
from rehearsal_plugin.integrations.transformers.callback import RehearsalCallback
from scripts.common.process_group import leave_together
from scripts.common.report import write_text
from scripts.llm.bandit import Bandit
from scripts.llm.data import DOMAINS, LANGUAGES, LENGTH, VOCABULARY, Corpus, load
from scripts.llm.first_language import FIRST_LANGUAGE, first_language
from scripts.llm.rows import Rows

LAYERS = 4
HEAD = 32  # the width of one attention head
WARMUP, FLOOR = 0.05, 0.1  # of the steps of a phase, of the learning rate

QUICK = 128
"""Held-out rows of every language that the losses during a phase come from; those at its end come from all."""


class Recorder(TrainerCallback):
    """Keeps the held-out losses of a phase: `{"step": ..., "english": ..., ...}`."""

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once for every language."""
        metrics = kwargs["metrics"]
        if not self.curve or self.curve[-1]["step"] != state.global_step:
            self.curve.append({"step": state.global_step})
        for language in LANGUAGES:
            if f"eval_{language}_loss" in metrics:
                self.curve[-1][language] = metrics[f"eval_{language}_loss"]


def main(argv: Sequence[str]) -> int:
    """One rank of one phase, from the rows to `result.json`, the model and the buffer."""
    arguments = parse(argv)
    register(FIRST_LANGUAGE)(first_language)
    quiet()
    corpora = load(arguments.cache, LENGTH, arguments.pages)
    recorder, rehearsal = Recorder(), RehearsalCallback()
    trainer = make_trainer(arguments, corpora, recorder, rehearsal)
    trained = trainer.train()
    losses = {language: held_out_loss(trainer, corpus, language) for language, corpus in corpora.items()}
    trainer.save_model(str(arguments.out / "model"))
    result = {"losses": losses, "curve": recorder.curve, "seconds": trained.metrics["train_runtime"]}
    result["parameters"] = sum(parameter.numel() for parameter in trainer.model_wrapped.parameters())
    if rehearsal.rehearsal is not None:
        rehearsal.rehearsal.save(arguments.out / "buffer")
        result["rehearsal"] = rehearsal.rehearsal.metrics()
    rehearsal.close()
    if trainer.is_world_process_zero():
        write_text(arguments.out / "result.json", json.dumps(result, indent=1) + "\n")
    leave_together()
    return 0


def quiet() -> None:
    """No warnings of transformers, and no compilation before the first step."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # An optional operator for collectives in shared memory, which would first be compiled for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--deepspeed", type=Path, required=True, help="DeepSpeed config, with its rehearsal block")
    parser.add_argument("--learn", nargs="+", choices=LANGUAGES, required=True, help="languages, mixed as they are")
    parser.add_argument("--start", type=Path, help="folder of the model to go on with; a new one when left out")
    parser.add_argument("--width", type=int, default=128, help="of a new model (default: %(default)s)")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--bandit", action="store_true", help="whether a bandit mixes the old languages")
    parser.add_argument("--evaluations", type=int, default=10, help="in the course of the phase (default: %(default)s)")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the rows, made where they are missing")
    parser.add_argument("--pages", type=Path, help="folder of the pages by language, in place of Debian's packages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    return parser.parse_args(argv)


def make_trainer(
    arguments: argparse.Namespace, corpora: Mapping[str, Corpus], recorder: Recorder, rehearsal: RehearsalCallback
) -> Trainer:
    """A Trainer whose settings are those of the DeepSpeed config."""
    config, interval = json.loads(arguments.deepspeed.read_text()), max(1, arguments.steps // arguments.evaluations)
    weighted = config["rehearsal"].get("strategy", {}).get("loss_weight", 1) != 1  # so the model's own loss will not do
    return Trainer(
        model=make_model(arguments),
        args=settings_of(
            config,
            arguments.out,
            arguments.steps,
            seed=arguments.seed,
            warmup_steps=max(1, round(WARMUP * arguments.steps)),
            eval_strategy="steps",
            eval_steps=interval,
            logging_steps=interval,
        ),
        train_dataset=ConcatDataset([Rows(corpora[language].train, DOMAINS[language]) for language in arguments.learn]),
        eval_dataset={language: quick(corpus, language) for language, corpus in corpora.items()},
        callbacks=[recorder, rehearsal, *bandits(arguments, config["rehearsal"], rehearsal)],
        compute_loss_func=rehearsal.loss(next_token_loss) if weighted else None,
    )


def bandits(arguments: argparse.Namespace, section: Mapping[str, Any], rehearsal: RehearsalCallback) -> list[Bandit]:
    """The bandit that mixes the old languages, if there is one."""
    if not arguments.bandit:
        return []
    return [Bandit(rehearsal, [int(key) for key in section["sampling"]["weights"]], arguments.steps)]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a causal model, as it computes it itself."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def settings_of(config: dict[str, Any], out: Path, steps: int, **more: Any) -> TrainingArguments:
    """Arguments of a Trainer that agree with a DeepSpeed config.

    Args:
        config: With optimizer, rows of a micro-batch, accumulation and clipping.
        out: Folder of what the Trainer writes.
        steps: Optimizer steps.
        more: Further arguments.
    """
    optimizer, rows = config["optimizer"]["params"], config["train_micro_batch_size_per_gpu"]
    return TrainingArguments(
        output_dir=str(out),
        deepspeed=config,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=4 * rows,
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        max_grad_norm=config["gradient_clipping"],
        learning_rate=optimizer["lr"],
        adam_beta1=optimizer["betas"][0],
        adam_beta2=optimizer["betas"][1],
        adam_epsilon=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": FLOOR},
        max_steps=steps,
        prediction_loss_only=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # the number of the language is no argument of the model
        **more,
    )


def make_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """The model to go on with, or a new one; the same seed gives the same weights on every rank."""
    if arguments.start is not None:
        return LlamaForCausalLM.from_pretrained(arguments.start)
    transformers.set_seed(arguments.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=arguments.width,
            intermediate_size=arguments.width * 8 // 3 // 16 * 16,
            num_hidden_layers=LAYERS,
            num_attention_heads=arguments.width // HEAD,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def quick(corpus: Corpus, language: str) -> Rows:
    """Evenly spaced held-out rows."""
    return Rows(corpus.held_out[:: -(-len(corpus.held_out) // QUICK)], DOMAINS[language])


def held_out_loss(trainer: Trainer, corpus: Corpus, language: str) -> float:
    """Mean loss over all held-out rows of a language, in nats a token."""
    metrics: dict[str, float] = trainer.evaluate(Rows(corpus.held_out, DOMAINS[language]))
    return metrics["eval_loss"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
