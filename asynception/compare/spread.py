"""Values over the runs of a group, and what two groups' values allow to say."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

Verdict = Literal["alone", "within", "few", "apart"]
"""alone: a group of one run has no spread; within: the ranges overlap; few: they don't, but with so
few runs that is no rare thing; apart: they don't."""

RARE = 0.1
"""Ranges that are apart this often by mere chance, or less, are called apart."""


@dataclass(frozen=True)
class Spread:
    """The mean and the range of one value per run."""

    mean: float
    low: float
    high: float
    num_runs: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Of those that are known and finite; None if there are none."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        return cls(sum(known) / len(known), min(known), max(known), len(known))


def compare(one: Spread, other: Spread) -> Verdict:
    """What may be said of the difference of two groups."""
    if min(one.num_runs, other.num_runs) < 2:
        return "alone"
    if one.low <= other.high and other.low <= one.high:
        return "within"
    return "apart" if chance_of_apart(one, other) <= RARE else "few"


def chance_of_apart(one: Spread, other: Spread) -> float:
    """How often the ranges of so many runs don't overlap if nothing but chance tells them apart.

    Of all ways to deal n + m different values out to n and m runs, two leave the ranges apart.
    """
    return min(1.0, 2 / math.comb(one.num_runs + other.num_runs, one.num_runs))
