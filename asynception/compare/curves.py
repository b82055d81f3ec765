"""Curves of single runs, and their mean over the runs of a group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from asynception.compare.reading import RunRecord

Axis = Literal["samples", "updates", "time_s"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """y over rising x; both float64 (N,)."""

    x: Floats
    y: Floats


@dataclass(frozen=True)
class Reach:
    """Where a curve first reaches a level."""

    x: float
    at_most: bool
    """It was there at the first measurement already, so it may have been earlier."""


def curve_of(run: RunRecord, axis: Axis) -> Curve:
    """The main metric of a run's evaluations; x rises strictly."""
    points: dict[float, float] = {}
    for each in run.evaluations:
        value = each.metrics.get(run.metric)
        if value is not None and np.isfinite(value):
            points[float(getattr(each, axis))] = value
    x = sorted(points)
    return Curve(np.array(x, np.float64), np.array([points[each] for each in x], np.float64))


def mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """The mean from where all curves have begun, between their points by interpolation.

    A curve that has ended keeps its last value. None if there is no curve, or one without points.
    """
    if not curves or any(curve.x.size == 0 for curve in curves):
        return None
    grid = np.unique(np.concatenate([c.x for c in curves]))
    grid = grid[grid >= max(c.x[0] for c in curves)]
    return Curve(grid, np.mean([np.interp(grid, c.x, c.y) for c in curves], axis=0))


def first_reach(curve: Curve, level: float) -> Reach | None:
    """Between two points by interpolation; None if the curve stays below."""
    above = np.flatnonzero(curve.y >= level)
    if above.size == 0:
        return None
    index = int(above[0])
    if index == 0:
        return Reach(float(curve.x[0]), at_most=True)
    (x0, x1), (y0, y1) = curve.x[index - 1 : index + 1], curve.y[index - 1 : index + 1]
    return Reach(float(x0 + (level - y0) / (y1 - y0) * (x1 - x0)), at_most=False)
