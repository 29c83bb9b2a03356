"""The model that the recipe of skills begins with: SmolLM2-135M, or a tiny one that knows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.llm.data import END, train_tokenizer
from scripts.llm.skills_data import TRAINED, orders
from scripts.llm.smollm2 import pretrained

__all__ = ["save_base"]


def save_base(folder: Path, *, small: bool) -> Any:
    """Write model and tokenizer to `folder` unless they are there; returns the tokenizer."""
    if not (folder / "model.safetensors").is_file():
        model, tokenizer = tiny() if small else pretrained()
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # its weights are float32
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def tiny() -> tuple[Any, Any]:
    """A random model and a tokenizer of the orders."""
    trained = train_tokenizer(f"{order.prompt}\n{order.answer}\n" for order in orders()[:TRAINED])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=END, bos_token=END, pad_token=END)  # type: ignore[no-untyped-call]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer
