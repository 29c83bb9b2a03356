"""TRL: `SFTTrainer` with one callback; how rows are padded is known from its collator.

    python -m scripts.examples.trl_sft

prints, among the trainer's own lines,

    the model saw 160 new rows and 45 replayed ones
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rehearsal_plugin import RehearsalCallback

TEXTS = [f"the {colour} {animal} sleeps" for colour in ("red", "blue", "grey") for animal in ("cat", "dog", "owl")] * 20


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    tokenizer = make_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    rehearsal = RehearsalCallback({"buffer": {"capacity": 500}, "ratio": 0.25})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(folder, max_steps=20, max_length=32, report_to=[], use_cpu=True, disable_tqdm=True)
        data = Dataset.from_dict({"text": TEXTS})
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[rehearsal])
        trainer.train()
    assert rehearsal.rehearsal is not None
    metrics = rehearsal.rehearsal.metrics()
    print(f"the model saw {metrics['rows_offered']} new rows and {metrics['rows_replayed']} replayed ones")


if __name__ == "__main__":
    main()
