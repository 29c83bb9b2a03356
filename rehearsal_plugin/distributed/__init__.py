"""How ranks share their rows: transports, counts, the draw, the exchange."""

from __future__ import annotations
