"""Scripts of tests: training loops that call the plugin themselves."""

from __future__ import annotations
