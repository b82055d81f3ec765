"""The comparison drawn: every run thin, the mean over a group's finished runs thick."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from asynception.compare.curves import Axis, curve_of
from asynception.compare.scaling import Efficiency
from asynception.compare.spread import Spread
from asynception.compare.summary import GroupSummary, mean_of, rate_of

INK = "#0a0b0c"
"""Text and axes; nothing else has this colour, so that a page can put its own in its place."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by the colour-blind as well (Okabe and Ito), on white and on black."""
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vP"

_AXES: Mapping[Axis, str] = {
    "samples": "samples",
    "updates": "updates",
    "time_s": "seconds of training",
}
_SHORT = 12
"""Characters of labels of which three have room beside each other."""
_LABEL_WIDTH = 18
"""Characters of a line of a group's label beside an axis."""


@dataclass(frozen=True)
class Plot:
    """A figure and what is said of it."""

    name: str
    title: str
    caption: str
    figure: Figure


def plot_style() -> AbstractContextManager[None]:
    """How figures look; to be drawn and saved within."""
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        **dict.fromkeys(ink, INK),
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": INK,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "figure.figsize": (4.6, 3.2),
        "figure.constrained_layout.use": True,
        "svg.fonttype": "path",
    }
    return matplotlib.rc_context(style)


def draw_plots(
    summaries: Sequence[GroupSummary], metric: str, scaling: Sequence[Efficiency]
) -> Iterator[Plot]:
    """Those for which there is something to draw."""
    for axis, name in _AXES.items():
        yield from _metric(summaries, metric, axis, name)
    yield from _target(summaries, metric)
    yield from _speed(summaries)
    yield from _scaling(scaling)
    yield from _staleness(summaries)
    yield from _lost(summaries)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def _metric(
    summaries: Sequence[GroupSummary], metric: str, axis: Axis, name: str
) -> Iterator[Plot]:
    figure = Figure()
    axes = figure.subplots()
    drawn = [_metric_of(axes, summary, axis, index) for index, summary in enumerate(summaries)]
    if not any(drawn):
        return
    _draw_levels(axes, summaries, metric)
    axes.set(xlabel=name, ylabel=metric)
    axes.set_xlim(left=0)
    _legend(figure, summaries)
    title = f"{metric} against {'wall time' if axis == 'time_s' else name}"
    yield Plot(
        f"metric-{axis.removesuffix('_s')}",
        title,
        "Thick: mean over the finished runs; a run that has ended keeps its last value. Thin: each "
        "run. Dotted: what predicting each label's frequency comes to."
        + (" Lost gradients' samples don't count." if axis == "samples" else ""),
        figure,
    )


def _legend(figure: Figure, summaries: Sequence[GroupSummary]) -> None:
    longest = max(len(summary.label) for summary in summaries)
    figure.legend(loc="outside upper left", ncols=3 if longest <= _SHORT else 2)


def _metric_of(axes: Axes, summary: GroupSummary, axis: Axis, index: int) -> bool:
    style = _style(index)
    for run in summary.group.runs:
        curve = curve_of(run, axis)
        axes.plot(curve.x, curve.y, color=style["color"], linewidth=0.8, alpha=0.5)
    mean = mean_of(summary.group, axis)
    if mean is None:
        return False
    axes.plot(mean.x, mean.y, **style, linewidth=2, markersize=4, label=summary.label)
    return True


def _draw_levels(axes: Axes, summaries: Sequence[GroupSummary], metric: str) -> None:
    """What no model is needed for."""
    levels = {
        run.result.get("baseline", {}).get(metric)
        for summary in summaries
        for run in summary.group.finished
    }
    for level in levels - {None}:
        axes.axhline(level, color=INK, linestyle=":", linewidth=1)


def _target(summaries: Sequence[GroupSummary], metric: str) -> Iterator[Plot]:
    rows = {}
    level = 0.0
    for each in summaries:
        if each.target is not None:
            level = each.target.level
            rows[each.label] = [reach.x for reach in each.target.reaches if reach is not None]
    if any(rows.values()):
        figure = _dots(rows, f"seconds to {metric} {level:g}")
        yield Plot(
            "time-to-target",
            f"Time to {metric} {level:g}",
            "A dot for each finished run that reached it, a bar at their mean.",
            figure,
        )


def _speed(summaries: Sequence[GroupSummary]) -> Iterator[Plot]:
    rows = {
        each.label: [rate for run in each.group.finished if (rate := rate_of(run)) is not None]
        for each in summaries
    }
    if any(rows.values()):
        figure = _dots(rows, "samples/s")
        caption = "Starting left out. A dot for each run, a bar at the mean."
        yield Plot("speed", "Speed", caption, figure)


def _dots(rows: Mapping[str, Sequence[float]], name: str) -> Figure:
    """A dot for each run, a bar at the mean, a row for each group."""
    figure = Figure(figsize=(4.6, 1.0 + 0.5 * len(rows)))
    axes = figure.subplots()
    for index, values in enumerate(rows.values()):
        style = _style(index)
        axes.plot(values, [index] * len(values), style["marker"], color=style["color"], alpha=0.7)
        mean = Spread.of(values)
        if mean is not None:
            axes.plot([mean.mean], [index], "|", color=style["color"], markersize=24, mew=2)
    labels = [textwrap.fill(label, _LABEL_WIDTH) for label in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    most = max(value for values in rows.values() for value in values)
    axes.set_xlim(0, 1.08 * most or 1)
    axes.set_xlabel(name)
    return figure


def _scaling(scaling: Sequence[Efficiency]) -> Iterator[Plot]:
    if not scaling:
        return
    rows = {
        f"{each.summary.label} / {each.base.group.num_workers} workers": [each.efficiency]
        for each in scaling
    }
    yield Plot(
        "scaling",
        "Scaling efficiency",
        "Samples/s per worker, of that with the fewest workers; 1 is speed in proportion.",
        _dots(rows, "efficiency"),
    )


def _staleness(summaries: Sequence[GroupSummary]) -> Iterator[Plot]:
    if not any(value > 0 for each in summaries for value in each.histogram):
        return
    figure = Figure()
    axes = figure.subplots()
    for index, each in enumerate(summaries):
        total = sum(each.histogram.values())
        if total:
            shares = [100 * count / total for count in each.histogram.values()]
            axes.plot(list(each.histogram), shares, **_style(index), markersize=4, label=each.label)
    axes.set(xlabel="staleness in versions", ylabel="% of kept gradients")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    _legend(figure, summaries)
    yield Plot(
        "staleness",
        "Staleness",
        "Of gradients that were applied or summed, at all servers, all finished runs together.",
        figure,
    )


def _lost(summaries: Sequence[GroupSummary]) -> Iterator[Plot]:
    known = [each for each in summaries if each.lost_share is not None]
    if any(each.lost_share and each.lost_share.high > 0 for each in known):
        rows = {each.label: [100 * each.lost_share.mean] for each in known if each.lost_share}
        yield Plot(
            "lost",
            "Lost work",
            "Gradients that were too late or not finite, of all: the mean over runs.",
            _dots(rows, "% of receipts"),
        )
