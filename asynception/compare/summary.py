"""What each group of runs came to."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from asynception.compare.curves import Axis, Curve, Reach, curve_of, first_reach, mean_curve
from asynception.compare.groups import Group
from asynception.compare.reading import RunRecord
from asynception.compare.spread import Spread
from asynception.compare.traffic import num_bytes_moved, num_exchange_bytes, staleness_histogram
from asynception.totals import PHASES
from model.errors import InputError

KEPT = ("applied", "accumulated")
"""Receipts of work that was not lost."""


@dataclass(frozen=True)
class Target:
    """A level of the main metric, and when a group's finished runs reached it."""

    level: float
    reaches: Sequence[Reach | None]
    """In seconds, by run."""
    of_mean: Reach | None
    """Of the mean curve over the runs."""

    @property
    def num_reached(self) -> int:
        return sum(reach is not None for reach in self.reaches)

    @property
    def spread(self) -> Spread | None:
        """Seconds, if all runs reached it."""
        if self.num_reached < len(self.reaches):
            return None
        return Spread.of(reach.x for reach in self.reaches if reach)


@dataclass(frozen=True)
class GroupSummary:
    """The figures of one group, over its finished runs."""

    group: Group
    final: Spread | None
    """The main metric at the end."""
    best: Spread | None
    """The main metric at each run's best evaluation."""
    samples: Spread | None
    updates: Spread | None
    wall_s: Spread | None
    rate: Spread | None
    """Samples per second of training, starting left out."""
    staleness: Spread | None
    """The runs' mean staleness."""
    staleness_most: float | None
    lost_share: Spread | None
    """Receipts that are neither applied nor accumulated, of all."""
    bytes_moved: Spread | None
    phases_ms: Mapping[str, float]
    """Milliseconds of a worker per push, by phase."""
    histogram: Mapping[int, int]
    """Receipts of kept work by staleness; empty where it isn't known."""
    target: Target | None

    @property
    def label(self) -> str:
        return self.group.label


def main_metric(groups: Sequence[Group]) -> str:
    """The measure that all runs have. Raises InputError if they haven't the same."""
    names = {run.metric: run for group in groups for run in group.runs}
    if len(names) > 1:
        (one, first), (other, second) = list(names.items())[:2]
        raise InputError(
            f"{first.path} is measured by {one} and {second.path} by {other}, which can't be "
            "compared: name runs of one measure"
        )
    return next(iter(names))


def summarize(groups: Sequence[Group], target: float | None) -> list[GroupSummary]:
    """The figures of all groups; `target` defaults to what all groups reached in their mean."""
    level = default_target(groups) if target is None else target
    return [_summarized(group, level) for group in groups]


def default_target(groups: Sequence[Group]) -> float | None:
    """The highest level, in hundredths, that every group's mean curve reached.

    Groups without a finished run are left out; None if there are no others.
    """
    curves = [mean_of(group, "time_s") for group in groups if group.finished]
    tops = [float(curve.y.max()) for curve in curves if curve is not None]
    return math.floor(min(tops) * 100) / 100 if tops else None


def mean_of(group: Group, axis: Axis) -> Curve | None:
    """The mean curve of a group's finished runs."""
    return mean_curve([curve_of(run, axis) for run in group.finished])


def _summarized(group: Group, level: float | None) -> GroupSummary:
    runs = group.finished
    over = partial(_over, runs)
    exchange = num_exchange_bytes(runs[0]) if runs else None
    return GroupSummary(
        group,
        final=over(lambda run: run.result["eval"].get(run.metric)),
        best=over(_best),
        samples=over(lambda run: run.result["samples"]),
        updates=over(lambda run: run.result["updates"]),
        wall_s=over(lambda run: run.result["wall_s"]),
        rate=over(rate_of),
        staleness=over(lambda run: run.result["staleness"]["mean"]),
        staleness_most=max((run.result["staleness"]["max"] for run in runs), default=None),
        lost_share=over(lost_share),
        bytes_moved=over(lambda run: num_bytes_moved(run, exchange) if exchange else None),
        phases_ms=dict(_phases_ms(runs)),
        histogram=_histogram(runs),
        target=_target(group, level) if level is not None and runs else None,
    )


def _over(runs: Sequence[RunRecord], value: Callable[[RunRecord], float | None]) -> Spread | None:
    return Spread.of(value(run) for run in runs)


def _best(run: RunRecord) -> float | None:
    curve = curve_of(run, "samples")
    return float(curve.y.max()) if curve.y.size else None


def rate_of(run: RunRecord) -> float | None:
    """Samples per second of training; None if the run has no training point."""
    if not run.points:
        return None
    last = run.points[-1]
    seconds = last["time_s"] - run.began_s
    return float(last["samples"] / seconds) if seconds > 0 else None


def lost_share(run: RunRecord) -> float | None:
    """Of all receipts, those that said that a gradient was lost."""
    receipts = run.result.get("receipts", {})
    total = sum(receipts.values())
    kept = sum(receipts.get(outcome, 0) for outcome in KEPT)
    return (total - kept) / total if total else None


def _phases_ms(runs: Sequence[RunRecord]) -> Iterator[tuple[str, float]]:
    """Means over all pushes of all runs."""
    for phase in PHASES:
        seconds, pushes = 0.0, 0
        for run in runs:
            before = 0
            for point in run.points:
                value = point.get(f"{phase}_s")
                if value is not None:
                    seconds += value * (point["pushes"] - before)
                    pushes += point["pushes"] - before
                before = point["pushes"]
        if pushes:
            yield phase, 1000 * seconds / pushes


def _histogram(runs: Sequence[RunRecord]) -> Mapping[int, int]:
    counts: dict[int, int] = {}
    for run in runs:
        for value, count in staleness_histogram(run).items():
            counts[value] = counts.get(value, 0) + count
    return dict(sorted(counts.items()))


def _target(group: Group, level: float) -> Target:
    reaches = [first_reach(curve_of(run, "time_s"), level) for run in group.finished]
    mean = mean_of(group, "time_s")
    return Target(level, reaches, first_reach(mean, level) if mean else None)
