"""What interleaved rounds measured, as rows: medians, quartiles, and ratios within a round."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, float]
"""Figures of one cell in one round, by name."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One thing that is measured in every round."""

    what: str
    """A lane, a limit or a peer."""
    work: str = ""
    """A rule where pushes are applied; "bytes" where they are only moved."""
    workers: int = 1
    shards: int = 1


Round = Mapping[Cell, Measured]
"""All cells of one round; one that failed is missing."""

Ratio = Callable[[Round], float]
"""Of figures of one round. Raises KeyError if one is missing."""


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def with_spread(name: str, values: Sequence[float]) -> Row:
    """A row's entries for one figure."""
    median, low, high = (_rounded(value) for value in spread(values))
    return {name: median, f"{name}_quartiles": [low, high]}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def row_of(cell: Cell, rounds: Sequence[Round], ratios: Mapping[str, Ratio]) -> Row:
    """A cell's figures, and its ratios, over the rounds in which there are any."""
    found = [each[cell] for each in rounds if cell in each]
    row: Row = {"what": cell.what, "work": cell.work}
    row |= {"workers": cell.workers, "shards": cell.shards, "rounds": len(found)}
    for name in found[0] if found else ():
        row |= with_spread(name, [measured[name] for measured in found])
    for name, ratio in ratios.items():
        values = list(_in_rounds(ratio, rounds))
        row |= with_spread(name, values) if values else {}
    return row


def _in_rounds(ratio: Ratio, rounds: Iterable[Round]) -> Iterable[float]:
    for each in rounds:
        try:
            yield ratio(each)
        except KeyError:
            continue


def over(cell: Cell, other: Cell, figure: str) -> Ratio:
    """A cell's figure over another cell's in the same round."""
    return lambda round_: round_[cell][figure] / round_[other][figure]


def over_limits(cell: Cell, figure: str, limits: Sequence[Cell]) -> Ratio:
    """A cell's figure over the sum of the limits' in the same round."""
    return lambda round_: round_[cell][figure] / sum(round_[limit][figure] for limit in limits)


def measure(
    jobs: Mapping[Cell, Callable[[], Measured | None]], num_rounds: int
) -> list[dict[Cell, Measured]]:
    """Run every job in every round, each round beginning with another; None for a failure."""
    order, rounds = list(jobs), []
    for _ in range(num_rounds):
        done = {cell: measured for cell in order if (measured := jobs[cell]()) is not None}
        rounds.append(done)
        order = [*order[1:], *order[:1]]
    return rounds
