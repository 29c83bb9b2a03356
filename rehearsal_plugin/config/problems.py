"""Pydantic's complaints in the words of a config file: the key path, what is wrong, and the cure."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

__all__ = ["BROKEN_RULES", "describe", "section_type"]

BROKEN_RULES = "broken_rules"  # the error type whose context carries finished sentences

AUTO = "'auto' is filled in only for the keys of the framework itself, so write the value here."


def describe(error: ValidationError, model: type[BaseModel], path: str) -> list[str]:
    """One sentence for each problem.

    Args:
        error: What pydantic raised.
        model: The model that it was raised for.
        path: Key path of that model, such as `"rehearsal.buffer"`.
    """
    return [line for problem in error.errors(include_url=False) for line in _lines(problem, model, path)]


def _lines(problem: ErrorDetails, model: type[BaseModel], root: str) -> list[str]:
    unknown_key = problem["loc"][-1:] if problem["type"] in {"extra_forbidden", "invalid_key"} else ()
    parents = problem["loc"][:-1] if unknown_key else problem["loc"]
    location = (*(part for part in parents if not _is_tag(part)), *unknown_key)  # a key of the user's may look like one
    value = reprlib.repr(problem["input"])
    path = ".".join((root, *map(_shown_key, location)))
    if problem["type"] == BROKEN_RULES:
        return list(problem["ctx"]["complaints"])
    if unknown_key:
        nearest = _nearest_key(str(location[-1]), model, location[:-1], root)
        return [f"{path} is not a key of the section; {nearest}"]
    if problem["type"] == "model_type":
        keys = ", ".join(_section_at(model, location).model_fields)
        return [f"{path} must be a mapping with keys out of {keys}, not {value}"]
    if problem["type"] == "missing":
        return [f"{path} is missing. {_cure(problem, model, location)}"]
    return [f"{path} must {_demand(problem)}, not {value}. {_cure(problem, model, location)}"]


def _demand(problem: ErrorDetails) -> str:
    """Pydantic's "Input should be less than 1" as "be less than 1"."""
    message = problem["msg"].partition(" after validation")[0]
    return message.partition(" should ")[2] or f"be accepted ({message})"


def _cure(problem: ErrorDetails, model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """What the key means, which is what the user needs to write it right."""
    if problem["input"] == "auto":
        return AUTO
    meaning = ""
    for part in location:  # below the last key there may be places in a list, and keys of the user's own
        field = model.model_fields.get(str(part))
        if field is None:
            break
        meaning, model = field.description or meaning, _section_among(field) or model
    return meaning


def _nearest_key(key: str, model: type[BaseModel], location: tuple[int | str, ...], root: str) -> str:
    """The right key of the same section, else the same name in another section, else all that there are."""
    siblings = _section_at(model, location).model_fields
    here = get_close_matches(key.lower(), siblings, n=1)
    if here:
        return f"did you mean '{'.'.join((root, *map(str, location), here[0]))}'?"
    elsewhere = {path.rpartition(".")[2]: path for path in _key_paths(model, root)}
    there = get_close_matches(key.lower(), elsewhere, n=1)
    if there:
        return f"did you mean '{elsewhere[there[0]]}'?"
    return f"it has the keys {', '.join(siblings)}"


def _section_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model at a location of the key tree; every step is the name of a section."""
    for part in location:
        model = _section_among(model.model_fields[str(part)]) or model
    return model


def _key_paths(model: type[BaseModel], path: str) -> Iterator[str]:
    """Paths of all keys below a section."""
    for name, field in model.model_fields.items():
        yield f"{path}.{name}"
        inner = _section_among(field)
        if inner:
            yield from _key_paths(inner, f"{path}.{name}")


def section_type(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds, if it does; some may be left out."""
    kinds = (field.annotation, *get_args(field.annotation))
    # On Python 3.10 `list[int]` is an instance of `type`, and no class.
    classes = (kind for kind in kinds if isinstance(kind, type) and get_origin(kind) is None)
    return next((kind for kind in classes if issubclass(kind, BaseModel)), None)


def _section_among(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key may hold, also where it may hold a number in its place."""
    return section_type(field) or next(filter(None, map(_section_within, get_args(field.annotation))), None)


def _section_within(kind: Any) -> type[BaseModel] | None:
    """The section among the alternatives of a type."""
    if isinstance(kind, type) and get_origin(kind) is None:
        return kind if issubclass(kind, BaseModel) else None
    return next(filter(None, map(_section_within, get_args(kind))), None)


def _is_tag(part: int | str) -> bool:
    """Whether this is pydantic's name for one of several types that a key may have."""
    return isinstance(part, str) and part.startswith("<")


def _shown_key(key: int | str) -> str:
    """A key as it is written, unless it is too long to be shown whole."""
    text = str(key)
    return text if len(text) <= 40 else f"{text[:40]}..."
