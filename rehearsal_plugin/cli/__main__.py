"""`python -m rehearsal_plugin.cli`, where the command is not on the path."""

from __future__ import annotations

from rehearsal_plugin.cli import main

if __name__ == "__main__":
    main()
