"""What is tested with which tool: the tests behind each cell of the table in `docs/guides/trainers/index.md`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CELLS", "SCENARIOS", "TOOLS", "Cell", "Tool"]


@dataclass(frozen=True)
class Tool:
    """A column of the table.

    Attributes:
        name: As people write it.
        page: File in `docs/guides/trainers`.
        environment: The one of `scripts/test_clients.sh` that it is tested in.
        package: Package whose version counts.
    """

    name: str
    page: str
    environment: str
    package: str


@dataclass(frozen=True)
class Cell:
    """A scenario with a tool.

    Attributes:
        tests: Beginnings of the names of its tests.
        word: What it means that all of them pass.
    """

    tests: tuple[str, ...]
    word: str = "works"


TRL = Tool("TRL", "trl.md", "trl", "trl")
LLAMA_FACTORY = Tool("LLaMA-Factory", "llama_factory.md", "llamafactory", "llamafactory")
AXOLOTL = Tool("axolotl", "axolotl.md", "axolotl", "axolotl")
MS_SWIFT = Tool("ms-swift", "ms_swift.md", "ms_swift", "ms_swift")
LAUNCH = Tool("`accelerate launch`", "accelerate.md", "trl", "accelerate")
LIGHTNING = Tool("Lightning", "lightning.md", "trl", "lightning")
LOOP = Tool("plain loop", "plain_loop.md", "trl", "torch")
TRAINER_457 = Tool("Trainer", "hf_trainer.md", "transformers457", "transformers")
TRAINER_453 = Tool("Trainer", "hf_trainer.md", "transformers453", "transformers")

TOOLS = (TRL, LLAMA_FACTORY, AXOLOTL, MS_SWIFT, LAUNCH, LIGHTNING, LOOP, TRAINER_457, TRAINER_453)

COMMANDS = "tests/clients/trl/test_commands.py::"
WORKERS = f"{COMMANDS}test_rows_are_replayed_in_the_workers"
UNDER_DEEPSPEED = f"{COMMANDS}test_rows_are_replayed_under_deepspeed"
PACKING = "tests/clients/trl/test_packing.py::"
DOCUMENTS = f"{PACKING}test_documents_are_replayed_in_the_workers"
PREFERENCE = "tests/clients/trl/test_preference.py::"
WHOLE = f"{PREFERENCE}test_samples_are_replayed_whole"
FACTORY = "tests/clients/llamafactory/test_train.py::"
STAGES = f"{FACTORY}test_rows_are_replayed_in_the_workers"
AXO = "tests/clients/axolotl/test_train.py::"
SWIFT = "tests/clients/ms_swift/test_sft.py::"
LOOPS = "tests/clients/loops/test_loops.py::test_rows_are_replayed_and_a_resumed_loop_goes_on"
EARLIER = "tests/clients/transformers/test_resume.py::test_rows_are_replayed_and_a_resumed_job_goes_on_bit_for_bit"
TRAINER = ("tests/integrations/transformers/",)
BY_DOCUMENT, BY_ROW, RESUMES = "works, by document", "works, by packed row", "resumes"

CELLS: dict[str, dict[Tool, Cell]] = {
    "text, padded": {
        TRL: Cell((f"{WORKERS}[plain]",)),
        LLAMA_FACTORY: Cell((f"{STAGES}[sft]",)),
        AXOLOTL: Cell((f"{AXO}test_rows_are_replayed[text]",)),
        MS_SWIFT: Cell((f"{SWIFT}test_rows_are_replayed_in_the_workers[sft]",)),
        LAUNCH: Cell((f"{COMMANDS}test_accelerate_launch_reaches_its_ranks",)),
        LIGHTNING: Cell((f"{LOOPS}[lightning_ddp-",)),
        LOOP: Cell((f"{LOOPS}[nanogpt_ddp-",)),
        TRAINER_457: Cell((f"{EARLIER}[1]",)),
        TRAINER_453: Cell((f"{EARLIER}[1]",)),
    },
    "packed rows": {
        TRL: Cell((f"{WORKERS}[wrapped]",), BY_ROW),
        LLAMA_FACTORY: Cell(
            (f"{STAGES}[pt, packed]", f"{STAGES}[sft, packed]", f"{STAGES}[sft, neat_packing]"), BY_ROW
        ),
        AXOLOTL: Cell((f"{AXO}test_rows_are_replayed[sample_packing]",), BY_ROW),
    },
    "one flat row of documents": {
        TRL: Cell((f"{DOCUMENTS}[bfd", f"{DOCUMENTS}[padding-free]"), BY_DOCUMENT),
        MS_SWIFT: Cell((f"{SWIFT}test_packing_asks_for_flash_attention",), "its own error without flash attention"),
    },
    "completions, `assistant_only_loss`": {
        TRL: Cell((f"{WORKERS}[completion only]", f"{WORKERS}[assistant only]")),
    },
    "LoRA": {
        TRL: Cell((f"{WORKERS}[LoRA]", f"{DOCUMENTS}[bfd, LoRA")),
        MS_SWIFT: Cell((f"{SWIFT}test_rows_are_replayed_in_the_workers[sft, LoRA",)),
    },
    "gradient accumulation": {
        TRL: Cell((f"{WORKERS}[accumulation]", f"{DOCUMENTS}[bfd, LoRA")),
        AXOLOTL: Cell((f"{AXO}test_rows_are_replayed[text, accumulation]",)),
        MS_SWIFT: Cell((f"{SWIFT}test_rows_are_replayed_in_the_workers[sft, LoRA",)),
        LOOP: Cell((f"{LOOPS}[nanogpt_ddp-",)),
        TRAINER_457: Cell((f"{EARLIER}[2]",)),
        TRAINER_453: Cell((f"{EARLIER}[2]",)),
    },
    "`mode: replace`": {
        TRL: Cell((f"{COMMANDS}test_rows_take_the_places_of", f"{PACKING}test_documents_take_the_places_of")),
    },
    "`ratio_in: tokens`": {TRL: Cell((f"{PACKING}test_a_ratio_in_tokens_is_met",))},
    "mixed datasets, a domain each": {
        TRL: Cell(("tests/clients/trl/test_domains.py::test_rows_are_counted_and_weighed",)),
    },
    "ZeRO-2": {
        TRL: Cell(
            (f"{COMMANDS}test_rows_are_replayed_under_deepspeed[2]", f"{PACKING}test_documents_are_replayed_under")
        ),
        LLAMA_FACTORY: Cell((f"{FACTORY}test_a_resumed_run",), RESUMES),
    },
    "ZeRO-3": {TRL: Cell((f"{UNDER_DEEPSPEED}[3]",))},
    "DPO, reward model": {
        TRL: Cell(
            (
                f"{COMMANDS}test_pairs_are_replayed_whole",
                f"{WHOLE}[DPO]",
                f"{WHOLE}[reward]",
                f"{PREFERENCE}test_the_loss_is_the_mean",
                f"{PREFERENCE}test_reference_log_probabilities",
            )
        ),
        LLAMA_FACTORY: Cell((f"{STAGES}[dpo]", f"{STAGES}[rm]")),
        MS_SWIFT: Cell((f"{SWIFT}test_rows_are_replayed_in_the_workers[dpo]",)),
    },
    "KTO, TPO": {TRL: Cell((f"{WHOLE}[KTO]", f"{WHOLE}[TPO"))},
    "ORPO, CPO": {
        TRL: Cell(
            (
                f"{WHOLE}[ORPO]",
                f"{WHOLE}[CPO]",
            ),
        )
    },
    "GRPO": {
        TRL: Cell(
            (f"{COMMANDS}test_a_trainer_that_generates", f"{PREFERENCE}test_a_trainer_that_generates"),
            "refused by name",
        )
    },
    "stop and resume": {
        TRL: Cell((f"{COMMANDS}test_a_resumed_run", f"{PACKING}test_a_resumed_run"), RESUMES),
        LLAMA_FACTORY: Cell((f"{FACTORY}test_a_resumed_run",), "resumes, under DeepSpeed"),
        AXOLOTL: Cell((f"{AXO}test_a_resumed_run",), RESUMES),
        MS_SWIFT: Cell((f"{SWIFT}test_a_resumed_run",), RESUMES),
        LIGHTNING: Cell((f"{LOOPS}[lightning_ddp-",), "resumes after an epoch"),
        LOOP: Cell((f"{LOOPS}[nanogpt_ddp-",), RESUMES),
        TRAINER_457: Cell((EARLIER,), RESUMES),
        TRAINER_453: Cell((EARLIER,), RESUMES),
    },
    "all tests of the Trainer": {TRAINER_457: Cell(TRAINER, "pass"), TRAINER_453: Cell(TRAINER, "pass")},
}
"""By scenario and tool; a cell that is missing has not been tried."""

SCENARIOS = tuple(CELLS)
