"""Write the JSON Schema of the `rehearsal` section: `python -m rehearsal_plugin.config [path]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rehearsal_plugin.config import json_schema

DEFAULT_PATH = "docs/rehearsal.schema.json"


def main(arguments: Sequence[str]) -> None:
    """Write the schema to the path given, or to `docs/rehearsal.schema.json` of the working directory."""
    path = Path(arguments[0] if arguments else DEFAULT_PATH)
    path.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
