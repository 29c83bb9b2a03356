"""Range checks of whole numbers in loaded state, and of the ratio and its account; see `validation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["LARGEST", "MOST", "check_account", "check_int", "check_ints", "check_schedule"]

MOST = 1 << 50
"""Number of offered rows: sums over many files still fit an int64."""

LARGEST = (1 << 63) - 1

MOST_RANKS = 1 << 20
"""A group asks for as many times its part at most."""

LARGEST_TERM = 1 << 128
"""Of a fraction: a ratio of 17 digits carries fractions with terms of twice as many."""


def check_int(value: Any, least: int = 0, most: int = MOST) -> int:
    """Check a whole number; returns it."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


def check_ints(values: Any, most: int) -> int:
    """Check a list of whole numbers; returns their sum."""
    if not isinstance(values, list):
        raise ValueError(f"{values!r} is no list")
    return sum(check_int(value, 0, most) for value in values)


def check_schedule(schedule: Mapping[str, Any]) -> None:
    """Check the state of a `ReplayRatio`."""
    check_int(schedule["numerator"], -LARGEST_TERM, LARGEST_TERM)
    check_int(schedule["denominator"], 0, LARGEST_TERM)
    for name in ("rows", "tokens"):
        check_int(schedule[name])
    if not isinstance(schedule["known"], bool):
        raise ValueError("rows that are neither known nor unknown")
    numbers = {"group_share": 1.0, **schedule}  # left out where nothing sets it
    bounds = (("boost", 1.0, 1e6), ("most", 0.0, 1.0), ("group_share", 0.0, MOST_RANKS))
    for name, least, most in bounds:
        if type(numbers[name]) is not float or not least <= numbers[name] <= most:
            raise ValueError(f"{numbers[name]!r} is no number from {least} to {most}")


def check_account(account: Mapping[str, Any], micro_batches: int, requests: int) -> None:
    """Check the state of a `ReplayAccount`, with that of so many micro-batches and requests."""
    for pair in (account["owed"], account["catch_up"]):
        if pair is not None:
            _check_fraction(pair)
    if account["catch_up"] is None or len(account["rows"]) != micro_batches or len(account["requested"]) != requests:
        raise ValueError("an account of other micro-batches or requests")
    _check_sizes(account.get("sizes", []), account.get("steps", [0] * 4))
    check_ints([rows + 1 for rows in account["rows"]], LARGEST)  # -1 where they were not noted
    for plan in (*account["requested"], account["ready"]):
        check_int(plan.get("spare", 0), 0, check_int(plan["owed"], 0, LARGEST))
        if plan["rate"] is not None:
            _check_fraction(plan["rate"])
        for rows, share in plan["shares"]:
            check_int(rows, -1, LARGEST)
            check_int(share, 0, LARGEST)
        if not isinstance(plan["untouched"], bool):
            raise ValueError("a plan that is neither touched nor untouched")


def _check_sizes(sizes: Any, steps: Any) -> None:
    if not isinstance(sizes, list) or len({size for size, *_ in sizes}) != len(sizes) or len(steps) != 4:
        raise ValueError("a size that stands twice")
    for size, numerator, denominator, since in sizes:
        check_int(size, -1, LARGEST)
        _check_fraction((numerator, denominator))
        check_int(since, 0, LARGEST)
    check_ints(steps, LARGEST)


def _check_fraction(pair: Any) -> None:
    numerator, denominator = pair
    check_int(numerator, -LARGEST_TERM, LARGEST_TERM)
    check_int(denominator, 1, LARGEST_TERM)
