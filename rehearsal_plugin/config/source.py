"""Where the `rehearsal` section is found: on its own or inside a DeepSpeed config, in any form of either."""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from rehearsal_plugin.config.names import expand_path
from rehearsal_plugin.errors import ConfigError

__all__ = ["find_block", "parse_yaml", "read"]

BLOCK = "rehearsal"
LONGEST_PATH = 1024
PATH = re.compile(r"[^A-Za-z0-9+/=_-]|/.*[^=]$")  # with what base64 has not, or with folders

# Any of these makes a mapping a DeepSpeed config; DeepSpeed itself asks for a batch size or for elasticity.
DEEPSPEED_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "elasticity",
    "zero_optimization", "optimizer", "scheduler", "fp16", "bf16", "gradient_clipping", "steps_per_print",
})  # fmt: skip


class RepeatedKeyError(ValueError):
    """A key that stands twice in one mapping."""


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
    if isinstance(source, str) and not os.path.exists(source):  # noqa: PTH110 - see below
        with suppress(ValueError):  # a variable that is not set
            source = expand_path(source)
    is_file = os.path.exists(source)  # noqa: PTH110 - base64 is too long for a path, where Path.exists raises
    cure = "correct the file" if is_file else "there is no such file, and it is no base64 of JSON"
    try:
        config = _read_file(Path(os.fsdecode(source))) if is_file else _parse_json(_decode(source))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if not is_file and _looks_like_path(source):
            raise ConfigError(
                f"the rehearsal config {source!r:.80} is no file; correct the path, {_nearest_file(source)}"
            ) from None
        raise ConfigError(f"the rehearsal config {source!r:.80} cannot be read: {cure} ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"the rehearsal config {source!r:.80} must hold a mapping, not {config!r:.80}")
    return config


def _looks_like_path(source: str | bytes) -> bool:
    """Whether a text that names no file and is no base64 of JSON was meant to name a file."""
    name = os.fsdecode(source)
    return len(name) < LONGEST_PATH and PATH.search(name) is not None and "\0" not in name


def _nearest_file(source: str | bytes) -> str:
    """What there is in place of the file."""
    path = Path(os.fsdecode(source))
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except (OSError, ValueError):
        return f"as there is no folder {str(path.parent)!r:.80} either"
    nearest = get_close_matches(path.name, names, n=1)
    return f"or did you mean {str(path.parent / nearest[0])!r}?" if nearest else f"seen from {str(Path.cwd())!r}"


def _read_file(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return parse_yaml(text) if path.suffix.lower() in {".yaml", ".yml"} else _parse_json(text)


def parse_yaml(text: str) -> Any:
    """YAML whose mappings name each key once; yaml.safe_load would take the last value without a word.

    Raises:
        ValueError: A key stands twice.
        yaml.YAMLError: It is no YAML.
    """
    loader = _UniqueKeysLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _UniqueKeysLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            own = [key for key, _ in node.value if not key.tag.endswith(":merge")]
            _refuse_repeated([self.construct_object(key, deep=True) for key in own])
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dict."""
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[Any]) -> None:
    counts = Counter(map(repr, keys))
    repeated = [str(key) for key in keys if counts[repr(key)] > 1]
    if repeated:
        raise RepeatedKeyError(f"the key '{repeated[0]}' stands twice in one mapping; keep one of them")


def _decode(source: str | bytes) -> str:
    return base64.urlsafe_b64decode(source).decode("utf-8")


def _parse_json(text: str) -> Any:
    """JSON, with the comments that DeepSpeed allows where its parser for them is installed."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RepeatedKeyError:
        raise
    except ValueError:
        if not text.strip():  # hjson reads nothing as an empty mapping, and so would switch everything on
            raise
        try:
            import hjson
        except ImportError:
            hjson = None
        if hjson is None:
            raise
    return hjson.loads(text, object_pairs_hook=_unique)


def _refuse_misspelt(config: Mapping[Any, Any]) -> None:
    """DeepSpeed ignores keys that it does not know, so a misspelt section would be off without a word."""
    for key in config:
        if get_close_matches(str(key).lower(), [BLOCK], cutoff=0.8):
            raise ConfigError(f"the config has a key '{key}'; did you mean '{BLOCK}'?")
