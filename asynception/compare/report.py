"""From runs to the files of a comparison: page, plots and tables."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from asynception.compare import tables, words
from asynception.compare.csv_files import write_csv
from asynception.compare.groups import group_runs
from asynception.compare.page import PAGE, Drawing, Page, render
from asynception.compare.plots import Plot, draw_plots, plot_style
from asynception.compare.reading import RunRecord
from asynception.compare.scaling import Efficiency, efficiencies
from asynception.compare.summary import GroupSummary, main_metric, summarize
from asynception.compare.svg import inline_svg, save_figure
from model.errors import InputError

PLOTS = "plots"


def write_report(
    runs: Sequence[RunRecord], out: Path, target: float | None, title: str
) -> list[str]:
    """Write report.html, plots/ and .csv files into `out`; returns the summary's sentences.

    `target`: a level of the main metric. Raises InputError if the runs can't be compared, or
    `out` can't be written.
    """
    groups = group_runs(runs)
    metric = main_metric(groups)
    summaries = summarize(groups, target)
    scaling = efficiencies(summaries)
    sentences = words.describe(summaries, metric)
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = write_csv(out, summaries)
        drawings = _draw(summaries, metric, scaling, out / PLOTS)
        page = _page(summaries, metric, scaling, title, sentences, drawings, files)
        (out / PAGE).write_text(render(page), "utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; choose another folder") from None
    return sentences


def _page(
    summaries: Sequence[GroupSummary],
    metric: str,
    scaling: Sequence[Efficiency],
    title: str,
    sentences: Sequence[str],
    drawings: Sequence[Drawing],
    files: Sequence[str],
) -> Page:
    different, common = tables.settings(summaries)
    return Page(
        title,
        f"Made {datetime.now():%Y-%m-%d %H:%M}",
        sentences,
        [
            tables.results(summaries, metric),
            *tables.targets(summaries, metric),
            *tables.scaling(scaling),
            tables.work(summaries),
            *tables.phases(summaries),
            tables.all_runs(summaries, metric),
            *([different] if different.rows else []),
        ],
        drawings,
        _remarks(scaling),
        words.reservations(summaries),
        tables.machines(summaries),
        [common],
        [f"{PLOTS}/ (PNG and SVG)", *files],
    )


def _remarks(scaling: Sequence[Efficiency]) -> list[str]:
    if scaling:
        return []
    return [
        "Scaling efficiency is left out: no two groups differ in the number of workers and in "
        "nothing else."
    ]


def _draw(
    summaries: Sequence[GroupSummary],
    metric: str,
    scaling: Sequence[Efficiency],
    folder: Path,
) -> list[Drawing]:
    folder.mkdir(exist_ok=True)
    with plot_style():
        return [_saved(plot, folder) for plot in draw_plots(summaries, metric, scaling)]


def _saved(plot: Plot, folder: Path) -> Drawing:
    save_figure(plot.figure, folder, plot.name)
    svg = inline_svg(plot.figure, plot.name, f"{plot.title}. {plot.caption}")
    return Drawing(plot.name, plot.title, plot.caption, svg)
