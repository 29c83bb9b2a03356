"""Check that wheels serve all Pythons from 3.10 on, and hold the compiled copies and nothing of the tests:

python -m scripts.common.check_wheel FOLDER
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

__all__ = ["check_wheel"]

COPIES = "rehearsal_plugin/buffer/rows/_copies.abi3.so"


def check_wheel(path: Path) -> None:
    """End with a message where a wheel is not one to publish."""
    names = zipfile.ZipFile(path).namelist()
    others = {name.partition("/")[0] for name in names} - {"rehearsal_plugin"}
    if "-cp310-abi3-" not in path.name:
        sys.exit(f"{path.name} is not for all Pythons from 3.10 on: its tag is not cp310-abi3")
    if COPIES not in names:
        sys.exit(f"{path.name} lacks {COPIES}: it was built without a compiler")
    if not all(name.endswith((".dist-info", ".libs")) for name in others):
        sys.exit(f"{path.name} holds more than the package: {sorted(others)}")


def main() -> None:
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    if not wheels:
        sys.exit(f"{sys.argv[1]} has no wheel")
    for wheel in wheels:
        check_wheel(wheel)
        print(f"{wheel.name}: fine")


if __name__ == "__main__":
    main()
