"""What all parts of the `rehearsal` section share: frozen, strict, and refused with `ConfigError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rehearsal_plugin.config.problems import BROKEN_RULES, describe
from rehearsal_plugin.errors import ConfigError

__all__ = ["Section", "refusing"]

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """One mapping of keys. Unknown keys are refused, types are not coerced, and instances cannot be changed.

    Attributes:
        KEY_PATH: Where the section stands, as it is written in messages.

    Raises:
        ConfigError: On construction, for every problem found at once. Inside another pydantic model the
            problems are part of that model's `ValidationError`, as usual.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    KEY_PATH: ClassVar[str]

    def __init__(self, /, **values: Any) -> None:
        with refusing(type(self)):
            super().__init__(**values)

    # Without this mark pydantic calls `__init__` for nested sections too, and the key paths get lost.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def broken_rules(self) -> Iterator[str]:
        """Complaints about keys that are fine one by one and do not go together."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self: S) -> S:
        complaints = list(self.broken_rules())
        if complaints:
            raise PydanticCustomError(BROKEN_RULES, "{complaints}", {"complaints": complaints})
        return self


@contextmanager
def refusing(section: type[Section]) -> Iterator[None]:
    """Turn pydantic's `ValidationError` about a section into one `ConfigError` that lists all problems."""
    try:
        yield
    except ValidationError as error:
        lines = describe(error, section, section.KEY_PATH)
        heading = f"the '{section.KEY_PATH}' section has {len(lines)} problems:\n- " if len(lines) > 1 else ""
        raise ConfigError(heading + "\n- ".join(lines)) from None
