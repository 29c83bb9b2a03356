"""Examples that end the help of each command."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["EXAMPLES"]

EXAMPLES: Mapping[str, str] = {
    "doctor": "rehearsal doctor ds_config.json\nrehearsal doctor rehearsal.yaml --ranks 4 --row-bytes 16KiB",
    "inspect": "rehearsal inspect out/checkpoint-500\nrehearsal inspect deepspeed_save_dir --json",
    "reshard": "rehearsal reshard out/checkpoint-500 resharded --ranks 16",
    "merge": "rehearsal merge english french --out both --ranks 8",
    "export": "rehearsal export out/checkpoint-500 rows.arrow",
    "seed": "rehearsal seed --data wiki.jsonl --tokenizer gpt2 --length 1024 --rows 20000 --out seeded\n"
    "rehearsal seed --from-model gpt2 --rows 20000 --length 1024 --out seeded",
    "plan": "rehearsal plan ds_config.json --ranks 64 --step-ms 300 --row-bytes 16KiB\n"
    "rehearsal plan ds_config.json --ranks 8 --step-ms 300 --field input_ids=int64[1024] --field labels=int64[1024]\n"
    "rehearsal plan ds_config.json --ranks 8 --step-ms 300 --rows-of out/checkpoint-500",
    "watch": "rehearsal watch metrics.jsonl\nrehearsal watch trainer_output_dir --once",
    "report": "rehearsal report metrics.jsonl -o report.html",
    "retrieve": 'rehearsal retrieve out/checkpoint-500 "rain in spring" -k 5',
}
"""Lines of a shell, by command."""
