"""The page of the config: every key of the JSON Schema, its default, what it takes and an example."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rehearsal_plugin.config import RehearsalConfig, json_schema
from scripts.reference.examples import EXAMPLES, NEEDED

__all__ = ["Key", "config_page", "keys"]

HEAD = """\
# Config

Write the section as JSON or YAML, in a file of its own or under `"rehearsal"` in your DeepSpeed config. Every key has
a default, so `{}` is a whole section. A wrong key or value is refused with the right one.

Your editor can check the section while you type: give it
[the JSON Schema](../rehearsal.schema.json). Not sure what to set? Read [Choosing](../guides/choosing.md) first.

An example value is never the default. Where it needs other keys beside it, they follow it.
"""

GUIDES = {
    "": "[Choosing](../guides/choosing.md)",
    "buffer": "[Choosing](../guides/choosing.md), [Preloading](../guides/preloading.md) and "
    "[scores](../guides/strategies.md#rows-judged-by-a-score)",
    "sampling": "[Mixtures](../guides/monitoring.md#mixtures), [Many ranks](../guides/parallelism.md#many-ranks) and "
    "[Retrieval](../guides/retrieval.md#rows-replayed-because-they-are-near)",
    "strategy": "[Strategies](../guides/strategies.md)",
    "exchange": "[Many nodes](../guides/multi_node.md) and [Reliability](../results/reliability.md)",
    "checkpoint": "[Checkpoints](../guides/checkpoints.md)",
    "metrics": "[Watching a job](../guides/monitoring.md#watching-a-job)",
    "guard": "[The guard](../guides/monitoring.md#the-guard)",
    "padding": "[Hugging Face Trainer](../guides/trainers/hf_trainer.md)",
    "ratio": "[A forgetting budget](../guides/monitoring.md#a-forgetting-budget)",
    "ratio_schedule": "[Changing the ratio](../guides/monitoring.md#changing-the-ratio)",
    "retrieval": "[Retrieval](../guides/retrieval.md)",
}
"""Sections, in the order of the page, and the guides that tell more."""


class Key(NamedTuple):
    """One key: its dotted name, its schema, and whether its section has no default for it."""

    name: str
    schema: Mapping[str, Any]
    required: bool


def config_page() -> str:
    """The whole page."""
    schema = json_schema()
    sections: dict[str, list[Key]] = {}
    for key in keys(schema):
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    order = [*(section for section in GUIDES if section in sections), *(sorted(set(sections) - set(GUIDES)))]
    return "\n".join([HEAD, *(part for section in order for part in written(section, sections[section], schema))])


def keys(schema: Mapping[str, Any]) -> Iterator[Key]:
    """Every key that takes a value, sections before their keys left out."""
    yield from _keys_of(schema, schema, "")


def _keys_of(section: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    for name, entry in section["properties"].items():
        inner = section_of(entry, schema)
        if inner is None or takes_values(entry):
            yield Key(prefix + name, entry, name in section.get("required", ()))
        if inner is not None:
            yield from _keys_of(inner, schema, f"{prefix}{name}.")


def takes_values(entry: Mapping[str, Any]) -> bool:
    """Whether a key takes values in place of a section."""
    options = (*entry.get("anyOf", ()), *entry.get("oneOf", ()))
    return any("$ref" not in option and option.get("type") != "null" for option in options)


def section_of(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a key holds; None where it holds a value."""
    found: Mapping[str, Any] = schema["$defs"].get(entry.get("$ref", "").rpartition("/")[2], {})
    if "properties" in found:
        return found
    options = (*entry.get("anyOf", ()), *entry.get("oneOf", ()), *entry.get("allOf", ()))
    return next(filter(None, (section_of(option, schema) for option in options)), None)


def written(section: str, its_keys: list[Key], schema: Mapping[str, Any]) -> list[str]:
    """One section of the page."""
    about = description(schema["properties"][section], schema) if section else "Keys of the section itself."
    title, guides = f"`{section}`" if section else "Top level", GUIDES.get(section, GUIDES[""])
    return [f"## {title}\n", f"{about} Read more: {guides}.\n", *(entry(key) for key in its_keys)]


def description(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a section is for: beside its key, or where it is defined."""
    inner = section_of(entry, schema) or {}
    text: str = entry.get("description") or inner["description"]
    return text


def entry(key: Key) -> str:
    """One key: what it means, then its default, what it takes, and an example."""
    lines = [
        f"### `{key.name}`\n",
        f"{key.schema['description']}\n",
        f"Default: {default(key)} · Takes: {taken(key.schema)} · Example: {example(key.name)}\n",
    ]
    return "\n".join(lines)


def default(key: Key) -> str:
    """The default of a key; that of the ratio depends on another key."""
    if key.name == "ratio":
        return f"`{RehearsalConfig().ratio}` without `representatives`"
    value = key.schema.get("default")
    return "you have to give it" if key.required else "none" if value is None else f"`{json.dumps(value)}`"


def example(name: str) -> str:
    """The example value, and the keys that it needs beside it.

    Raises:
        KeyError: There is none yet.
    """
    if name not in EXAMPLES:
        raise KeyError(f"rehearsal.{name} has no example; add one to scripts/reference/examples.py")
    needed = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in NEEDED.get(name, {}).items())
    return f"`{json.dumps(EXAMPLES[name])}`" + (f", with {needed}" if needed else "")


def taken(schema: Mapping[str, Any]) -> str:
    """The values that a key takes, in words."""
    if "anyOf" in schema or "oneOf" in schema:
        options = schema.get("anyOf") or schema["oneOf"]
        return " or ".join(dict.fromkeys(taken(option) for option in options if option.get("type") != "null"))
    if "$ref" in schema:
        return "a section, whose keys are below"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    return KINDS[schema.get("type", "any")] + bounds(schema)


KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "`true` or `false`",
    "array": "a list",
    "object": "a mapping",
    "any": "a value",
}
"""Types of JSON Schema in words."""

NO_BOUND = 1 << 62
"""Bounds from here on are those of the number's type, of no use to a reader."""


def bounds(schema: Mapping[str, Any]) -> str:
    """The range of a number, such as ` from 0 to below 1`."""
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "to below"}
    given = [
        f"{word} {schema[key]:,}".removesuffix(".0")
        for key, word in words.items()
        if abs(schema.get(key, NO_BOUND)) < NO_BOUND
    ]
    return f" {' '.join(given)}" if given else ""
