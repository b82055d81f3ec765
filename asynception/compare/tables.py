"""The tables of the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asynception.compare import figures
from asynception.compare.groups import differing, shown_value
from asynception.compare.machine import describe_in_words
from asynception.compare.reading import RunRecord
from asynception.compare.scaling import Efficiency
from asynception.compare.spread import Spread
from asynception.compare.summary import GroupSummary, rate_of


@dataclass(frozen=True)
class Table:
    """Text by row; the first cell of a row names it."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def results(summaries: Sequence[GroupSummary], metric: str) -> Table:
    """One row a group."""
    header = [
        "",
        "finished runs",
        f"{metric} at the end",
        f"best {metric}",
        "samples/s",
        "samples",
        "updates",
        "wall time",
    ]
    rows = [
        [
            each.label,
            f"{len(each.group.finished)} of {len(each.group.runs)}",
            figures.spread(each.final, figures.measure),
            figures.spread(each.best, figures.measure),
            figures.spread(each.rate),
            figures.spread(each.samples),
            figures.spread(each.updates),
            figures.spread(each.wall_s, figures.seconds),
        ]
        for each in summaries
    ]
    note = (
        "Mean over the finished runs, and their range in brackets. Measured on the EMA. Samples/s"
        " leave starting out; wall time has it in."
    )
    return Table("results", "Results", header, rows, note)


def targets(summaries: Sequence[GroupSummary], metric: str) -> Iterator[Table]:
    """When each group came to the target, if there is one."""
    rows = []
    level = 0.0
    for each in summaries:
        target = each.target
        if target is not None:
            level = target.level
            reached = Spread.of(reach.x for reach in target.reaches if reach)
            of_runs = f"{target.num_reached} of {len(target.reaches)}"
            shown = figures.spread(reached, figures.seconds)
            rows.append([each.label, figures.reach(target.of_mean), shown, of_runs])
    if rows:
        yield Table(
            "target",
            f"Time to {metric} {level:g}",
            ["", "mean curve", "runs that reached it", "reached it"],
            rows,
            "Starting left out; between evaluations by interpolation; “at most” where the first"
            " evaluation was above already.",
        )


def scaling(efficiencies: Sequence[Efficiency]) -> Iterator[Table]:
    """Speed by number of workers, if runs with several are there."""
    rows = [
        [
            each.summary.label,
            str(each.summary.group.num_workers),
            str(each.base.group.num_workers),
            f"{each.speedup:.2f}",
            f"{each.efficiency:.2f}",
        ]
        for each in efficiencies
    ]
    if rows:
        header = ["", "workers", "held against", "speed-up", "efficiency"]
        note = "Of mean samples/s. An efficiency of 1 is a speed in proportion to workers."
        yield Table("scaling", "Scaling", header, rows, note)


def work(summaries: Sequence[GroupSummary]) -> Table:
    """Staleness, lost work and bytes, one row a group."""
    header = [
        "",
        "mean staleness",
        "greatest",
        "lost gradients",
        "samples handed out again",
        "bytes moved",
    ]
    rows = [
        [
            each.label,
            figures.spread(each.staleness),
            figures.DASH if each.staleness_most is None else figures.number(each.staleness_most),
            figures.spread(each.lost_share, figures.percent),
            figures.number(_returned(each)),
            figures.spread(each.bytes_moved, figures.num_bytes),
        ]
        for each in summaries
    ]
    note = (
        "Staleness in versions, over receipts. Lost: receipts that are neither applied nor"
        " accumulated, of all. Handed out again: what dead workers left, in all runs together."
        " Bytes moved: parameters and BN statistics, once down and once up for each push that the"
        " servers answered, or around a ring of workers; retries, evaluations and checkpoints"
        " aren't counted."
    )
    return Table("work", "Staleness, lost work, bytes", header, rows, note)


def _returned(summary: GroupSummary) -> int:
    return sum(
        int(run.result.get("data", {}).get("samples_returned", 0)) for run in summary.group.runs
    )


def phases(summaries: Sequence[GroupSummary]) -> Iterator[Table]:
    """Where the workers' time went."""
    known = [each for each in summaries if each.phases_ms]
    if not known:
        return
    names = list(dict.fromkeys(name for each in known for name in each.phases_ms))
    rows = [
        [
            each.label,
            *(
                figures.number(each.phases_ms[name]) if name in each.phases_ms else figures.DASH
                for name in names
            ),
        ]
        for each in known
    ]
    note = (
        "Mean over all pushes of the finished runs. Waiting for others, where a mode has it, is"
        " part of pull."
    )
    yield Table("phases", "A worker's time, ms per push", ["", *names], rows, note)


def all_runs(summaries: Sequence[GroupSummary], metric: str) -> Table:
    """One row a run, those that failed included."""
    header = ["", "group", "seed", "status", metric, "samples/s", "wall time", "load before"]
    rows = [
        [
            run.name,
            each.label,
            str(run.seed),
            run.status if run.error is None else f"{run.status}: {run.error}",
            _final(run),
            figures.number(rate) if (rate := rate_of(run)) else figures.DASH,
            figures.seconds(run.result["wall_s"]) if run.result else figures.DASH,
            f"{run.attempt.load_before:g}" if run.attempt else figures.DASH,
        ]
        for each in summaries
        for run in each.group.runs
    ]
    note = "Load before: processes that ran or waited to, in the minute before the run's start."
    return Table("runs", "All runs", header, rows, note)


def _final(run: RunRecord) -> str:
    value = run.result.get("eval", {}).get(run.metric)
    return figures.DASH if value is None else figures.measure(value)


def settings(summaries: Sequence[GroupSummary]) -> tuple[Table, Table]:
    """Those in which groups differ, and those in common."""
    flats = [each.group.settings for each in summaries]
    keys = differing(flats)
    different = [[key, *(_shown(flat, key) for flat in flats)] for key in keys]
    common = [[key, _shown(flats[0], key)] for key in flats[0] if key not in keys]
    labels = [each.label for each in summaries]
    note = "A dash: the mode has no such setting."
    return (
        Table("different", "Settings that differ", ["", *labels], different, note),
        Table("common", "Settings in common", ["", "value"], common),
    )


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return shown_value(flat[key]) if key in flat else figures.DASH


def machines(summaries: Sequence[GroupSummary]) -> list[str]:
    """What the runs ran on, as far as it was noted."""
    runs = [run for each in summaries for run in each.group.runs]
    by_machine: dict[str, int] = {}
    for run in runs:
        if run.attempt is not None:
            words = describe_in_words(run.attempt.machine)
            by_machine[words] = by_machine.get(words, 0) + 1
    lines = [
        words if count == len(runs) else f"{count} of {len(runs)} runs: {words}"
        for words, count in by_machine.items()
    ]
    unknown = len(runs) - sum(by_machine.values())
    if unknown:
        lines.append(
            f"{unknown} of {len(runs)} runs were not started by a comparison, so that what they"
            " ran on isn't known."
        )
    return lines
