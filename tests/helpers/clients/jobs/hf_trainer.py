"""A script with a Hugging Face Trainer that knows nothing of the plugin."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.helpers.trainer_jobs import allow_indexed_cpu, trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--resume")
    arguments = parser.parse_args()
    allow_indexed_cpu()
    job, _ = trainer(
        arguments.folder,
        gradient_accumulation_steps=arguments.passes,
        save_strategy="steps",
        save_steps=5,
        eval_strategy="steps",
        eval_steps=4,
        eval_on_start=True,
        average_tokens_across_devices=True,  # not yet the default in 4.53
    )
    job.train(resume_from_checkpoint=arguments.resume)


if __name__ == "__main__":
    main()
