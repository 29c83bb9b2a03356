"""Where the `rehearsal` section is found: on its own or inside a DeepSpeed config, in any form of either."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from rehearsal_plugin.errors import ConfigError

__all__ = ["find_block", "read"]

BLOCK = "rehearsal"

# Any of these makes a mapping a DeepSpeed config; DeepSpeed itself asks for a batch size or for elasticity.
DEEPSPEED_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "elasticity",
    "zero_optimization", "optimizer", "scheduler", "fp16", "bf16", "gradient_clipping", "steps_per_print",
})  # fmt: skip


def find_block(source: BaseModel | Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any] | None:
    """The `rehearsal` section as it was written, not validated.

    Args:
        source: A mapping, the path of a JSON or YAML file, base64 of JSON as DeepSpeed takes it, or a model of
            the section. Each may be the bare section or a config with a key `rehearsal`.

    Returns:
        The section, or None when the source is a DeepSpeed config without one.

    Raises:
        ConfigError: The source cannot be read, or its `rehearsal` key is misspelt or is no mapping.
    """
    config = read(source)
    if BLOCK not in config:
        _refuse_misspelt(config)
        return None if DEEPSPEED_KEYS & config.keys() else config
    block = config[BLOCK]
    if not isinstance(block, Mapping):
        raise ConfigError(
            f"{BLOCK} must be a mapping of keys, not {block!r:.80}; write {{}} for the defaults "
            'or {"enabled": false} to switch it off'
        )
    return dict(block)


def read(source: object) -> dict[str, Any]:
    """Any form of a config, the bare section or a whole DeepSpeed config, as a dict.

    Raises:
        ConfigError: It cannot be read.
    """
    if isinstance(source, BaseModel):
        return source.model_dump()
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, (str, os.PathLike)):
        return _read_text(os.fspath(source))
    raise ConfigError(
        f"the rehearsal config is of type {type(source).__name__}; give a mapping, the path of a JSON or YAML "
        "file, base64 of JSON, or a RehearsalConfig"
    )


def _read_text(source: str | bytes) -> dict[str, Any]:
    """A path, or else base64: the order in which DeepSpeed tries them."""
    is_file = os.path.exists(source)  # noqa: PTH110 - base64 is too long for a path, where Path.exists raises
    cure = "correct the file" if is_file else "there is no such file, and it is no base64 of JSON"
    try:
        config = _read_file(Path(os.fsdecode(source))) if is_file else _parse_json(_decode(source))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the rehearsal config {source!r:.80} cannot be read: {cure} ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"the rehearsal config {source!r:.80} must hold a mapping, not {config!r:.80}")
    return config


def _read_file(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text) if path.suffix.lower() in {".yaml", ".yml"} else _parse_json(text)


def _decode(source: str | bytes) -> str:
    return base64.urlsafe_b64decode(source).decode("utf-8")


def _parse_json(text: str) -> Any:
    """JSON, with the comments that DeepSpeed allows where its parser for them is installed."""
    try:
        return json.loads(text)
    except ValueError:
        if not text.strip():  # hjson reads nothing as an empty mapping, and so would switch everything on
            raise
        try:
            import hjson
        except ImportError:
            hjson = None
        if hjson is None:
            raise
    return hjson.loads(text)


def _refuse_misspelt(config: Mapping[Any, Any]) -> None:
    """DeepSpeed ignores keys that it does not know, so a misspelt section would be off without a word."""
    for key in config:
        if get_close_matches(str(key).lower(), [BLOCK], cutoff=0.8):
            raise ConfigError(f"the config has a key '{key}'; did you mean '{BLOCK}'?")
