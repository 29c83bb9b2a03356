"""A Llama of 0.1 M parameters, its tokenizer, and data of every kind that trainers of language models read."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["LONGEST", "PAD", "make_tiny_llm"]

LONGEST = 64
"""Tokens of the longest row."""

PAD, ROWS = 1, 160
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
SYLLABLES = [a + b for a in "bdfglmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "ol")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_llm(folder: Path) -> None:
    """Write `folder/model`, and a folder with `train.jsonl` and `test.jsonl` for each kind of data."""
    for kind, rows in _rows_by_kind(random.Random(0)).items():
        (folder / kind).mkdir(parents=True)
        _write(folder / kind / "train.jsonl", rows[:ROWS])
        _write(folder / kind / "test.jsonl", rows[ROWS:])
    _tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    tokens: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder / "model")


def _rows_by_kind(chance: random.Random) -> dict[str, list[dict[str, Any]]]:
    questions = [_sentence(chance, 3, 8) for _ in range(ROWS + 16)]
    answers = [_sentence(chance, 4, 14) for _ in questions]
    others = [_sentence(chance, 4, 14) for _ in questions]
    rows = list(zip(questions, answers, others, strict=True))
    return {
        "text": [{"text": f"{question} {answer}"} for question, answer, _ in rows],
        "completion": [{"prompt": question, "completion": f" {answer}"} for question, answer, _ in rows],
        "chat": [{"messages": _messages(question, answer)} for question, answer, _ in rows],
        "pairs": [{"prompt": q, "chosen": f" {answer}", "rejected": f" {other}"} for q, answer, other in rows],
        "swift_pairs": [
            {"messages": _messages(question, answer), "rejected_response": other} for question, answer, other in rows
        ],
        "unpaired": [
            {"prompt": question, "completion": f" {answer}", "label": number % 2 == 0}
            for number, (question, answer, _) in enumerate(rows)
        ],
        "alpaca": [{"instruction": question, "input": "", "output": answer} for question, answer, _ in rows],
        "ranking": [{"instruction": q, "input": "", "chosen": answer, "rejected": other} for q, answer, other in rows],
    }


def _sentence(chance: random.Random, least: int, most: int) -> str:
    return " ".join("".join(chance.choices(SYLLABLES, k=2)) for _ in range(chance.randint(least, most)))


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer() -> Any:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        SYLLABLES, trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    named = {"eos_token": SPECIAL[0], "bos_token": SPECIAL[0], "pad_token": SPECIAL[PAD]}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=256, **named)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = TEMPLATE
    return tokenizer
