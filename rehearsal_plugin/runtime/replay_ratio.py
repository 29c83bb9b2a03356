"""How many rows to replay, so that a ratio is met exactly over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.exact_sum import ExactSum, Ratio
from rehearsal_plugin.distributed.request import LARGEST_TOLD

__all__ = ["ReplayRatio"]

UNIT = 1 << 40
"""Ratios that change are rounded to multiples of its reciprocal, so that the sum of fractions stays a small one."""

FURTHEST = 1 << 62
HIGHEST_BOOST = 1e6

ROUGH_UNIT = 1 << 20
"""Rates with larger terms are told in units of its reciprocal. What that is off is owed, and asked for later."""


class ReplayRatio:
    """Whole numbers of rows whose running sum never strays from the ratio by a whole row a draw.

    `ratio` is the share of replayed rows in what the model sees: with b new rows and `mode: append` that is
    r / (b + r), with `mode: replace` it is r / b. The fraction that a batch cannot take is carried to the
    next. The arithmetic is exact: nothing drifts, and all ranks agree.

    With `ratio_in: tokens` amounts are tokens. How many a row has is known when it is there, so rows are asked for
    by the mean of those that came, and what they had too many or too few is carried on as well.

    Args:
        config: Gives `ratio` or `representatives`, `mode`, and how the ratio changes.
        draws: Independent draws that share the ratio; `representatives` are those of each.
    """

    def __init__(self, config: RehearsalConfig, draws: int = 1) -> None:
        self._config, self._draws = config, draws
        self._representatives = config.representatives
        self._in_tokens = config.ratio_in == "tokens"
        self._set: float | None = None if config.ratio_budget is None else config.ratio_budget.middle
        self._boost = 1.0
        self._most = 0.0
        self._group_factor, self._group_share = 1.0, Fraction(1)
        self._rows = self._tokens = 0  # what a row has: of new rows until the first one is replayed
        self._known = False
        self._carry = ExactSum()
        self._ratio = math.nan
        self.go_by(0)

    @property
    def ratio(self) -> float:
        """The share that is asked for now."""
        return self._ratio

    @property
    def rate(self) -> Ratio:
        """Rows or tokens that each draw owes for each row or token that the model sees."""
        return self._per_unit

    @property
    def in_tokens(self) -> bool:
        """Whether amounts are tokens."""
        return self._in_tokens

    @property
    def row_cost(self) -> int:
        """The tokens of a row in the mean of those that came; 1 where rows are counted."""
        return max(1, round(self._tokens / self._rows)) if self._rows else 1

    def due(self, amount: int, rate: Ratio | None = None) -> Ratio:
        """Rows or tokens due from each draw for a batch of `amount` of them, at a `rate`, or the present one."""
        if self._representatives is not None:
            return self._each
        numerator, denominator = self._per_unit if rate is None else rate
        return numerator * amount, denominator

    def size_of(self, rows: int) -> int:
        """By which number of rows a micro-batch of `rows` is owed its part: the same where all get as many."""
        return rows if self._representatives is None else 1

    def go_by(self, step: int) -> None:
        """Take the ratio of an optimizer step."""
        ratio = self._ratio_at(step)
        if ratio != self._ratio:
            self._ratio = ratio
            self._take_rate()

    def share_among_groups(self, factor: float) -> None:
        """From now on ask for `factor` times as much; see `GroupShares`."""
        if factor != self._group_factor:  # as at hardly any step
            self._group_factor, self._group_share = factor, Fraction(round(factor * UNIT), UNIT)
            self._take_rate()

    def _take_rate(self) -> None:
        """Rows or tokens that are due for each one seen, by the present ratio."""
        unchanged = self._ratio == self._config.given_ratio
        share = Fraction(str(self._ratio)) if unchanged else Fraction(round(self._ratio * UNIT), UNIT)
        per_unit = share if self._config.mode == "replace" else share / (1 - share)
        unchanged = unchanged and self._group_share == 1
        per_unit *= self._group_share
        rate = (per_unit if unchanged else Fraction(round(per_unit * UNIT), UNIT)) / self._draws
        self._per_unit = rate.numerator, rate.denominator
        each = (self._representatives or 0) * self._group_share
        self._each = each.numerator, each.denominator

    def set(self, ratio: float) -> None:
        """From the next step on ask for this ratio, whatever the config says; a checkpoint does not keep it."""
        self._set = ratio

    def boost(self, factor: float, most: float) -> None:
        """From the next step on ask for `factor` times as much, but for no higher ratio than `most`."""
        self._boost, self._most = min(self._boost * factor, HIGHEST_BOOST), most

    def rows_for(self, amount: int) -> int:
        """Rows to replay from each draw for another batch of `amount` rows or tokens."""
        if self._representatives is not None and self._group_share == 1:
            return self._representatives
        self._carry.add(self.due(amount))
        rows = max(0, self._carry.floor(self.row_cost))
        self._carry.add((-rows * self.row_cost, 1))
        return rows

    def rate_of_step(self, amounts: Sequence[int]) -> tuple[int, int, int]:
        """Rows a step if all that follow are like one with micro-batches of `amounts`, which was just asked for.

        Returns:
            Numerator, denominator, and what is carried over with that denominator; zeros where that is not known.
        """
        if self._in_tokens or not amounts:
            return 0, 0, 0
        due = [self.due(amount) for amount in amounts]
        numerator, denominator = sum(numerator for numerator, _ in due), due[0][1]
        carried, unit = self._carry.reduced
        if denominator % unit or max(numerator, denominator) >= LARGEST_TOLD:
            numerator, carried = numerator * ROUGH_UNIT // denominator, carried * ROUGH_UNIT // unit
            denominator = unit = ROUGH_UNIT
        if numerator >= LARGEST_TOLD:
            return 0, 0, 0
        return numerator, denominator, carried * (denominator // unit)

    def learn_tokens(self, rows: int, tokens: int, *, replayed: bool) -> None:
        """Learn how many tokens rows have, with `ratio_in: tokens`; those of all draws together."""
        if not self._in_tokens or not rows or (self._known and not replayed):
            return
        if replayed:
            self._carry.add((rows * self.row_cost - tokens, self._draws))
            if not self._known:
                self._known, self._rows, self._tokens = True, 0, 0
        self._rows += rows
        self._tokens += tokens

    def state_dict(self) -> dict[str, Any]:
        """The fraction that is carried to the next batch, and what was learnt."""
        learnt = {"rows": self._rows, "tokens": self._tokens, "known": self._known}
        boost = {"boost": self._boost, "most": self._most}
        numerator, denominator = self._carry.reduced
        group = {} if self._group_share == 1 else {"group_share": float(self._group_share)}
        return {"numerator": numerator, "denominator": denominator, **learnt, **boost, **group}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: No fraction from 0 to below 1, where rows are counted.
        """
        numerator, denominator = state["numerator"], max(1, state["denominator"])
        if not (abs(numerator) < FURTHEST * denominator if self._in_tokens else 0 <= numerator < denominator):
            raise ValueError(f"{numerator} / {denominator} are carried to the next batch")
        self._carry = ExactSum((numerator, denominator))
        self._rows, self._tokens, self._known = state["rows"], state["tokens"], state["known"]
        self._boost, self._most = state["boost"], state["most"]
        self.share_among_groups(state.get("group_share", 1.0))

    def _ratio_at(self, step: int) -> float:
        if self._set is not None:
            return self._set
        first, change = self._config.given_ratio or 0.0, self._config.ratio_schedule
        if change is not None:
            done = min(1.0, max(0, step - self._config.start_step) / change.steps)
            first += (change.to - first) * done
        return max(first, min(first * self._boost, self._most))
