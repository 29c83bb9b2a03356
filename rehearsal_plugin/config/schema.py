"""The section as a JSON Schema, for editors and validators."""

from __future__ import annotations

from typing import Any

from rehearsal_plugin.config.models import RehearsalConfig

__all__ = ["json_schema"]


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the section; rules between keys are not part of it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RehearsalConfig.model_json_schema()}
