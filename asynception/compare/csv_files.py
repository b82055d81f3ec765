"""The comparison as tables for other programs."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from asynception.compare.groups import Group
from asynception.compare.reading import RunRecord
from asynception.compare.spread import Spread
from asynception.compare.summary import GroupSummary, lost_share, rate_of

_SPREADS = (
    "final",
    "best",
    "samples",
    "updates",
    "wall_s",
    "rate",
    "staleness",
    "lost_share",
    "bytes_moved",
)

Row = Mapping[str, Any]


def write_csv(out: Path, summaries: Sequence[GroupSummary]) -> list[str]:
    """points.csv, runs.csv, summary.csv and staleness.csv; returns their names.

    What isn't known is an empty field.
    """
    groups = [summary.group for summary in summaries]
    tables = {
        "points.csv": list(_points(groups)),
        "runs.csv": list(_runs(groups)),
        "summary.csv": list(map(_summary, summaries)),
        "staleness.csv": list(_staleness(summaries)),
    }
    for name, rows in tables.items():
        _write(out / name, rows)
    return list(tables)


def _write(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _of(group: Group, run: RunRecord) -> dict[str, Any]:
    return {"group": group.label, "mode": group.mode, "run": run.name, "seed": run.seed}


def _points(groups: Sequence[Group]) -> Iterator[Row]:
    """Every evaluation of every run."""
    for group in groups:
        for run in group.runs:
            for each in run.evaluations:
                at = {"time_s": each.time_s, "samples": each.samples, "updates": each.updates}
                yield {**_of(group, run), **at, **each.metrics}


def _runs(groups: Sequence[Group]) -> Iterator[Row]:
    for group in groups:
        for run in group.runs:
            result = run.result
            yield {
                **_of(group, run),
                "status": run.status,
                "error": run.error,
                "workers": group.num_workers,
                **{key: result.get(key) for key in ("samples", "updates", "wall_s")},
                "samples_per_s": rate_of(run),
                "lost_share": lost_share(run),
                **{f"staleness_{k}": v for k, v in result.get("staleness", {}).items()},
                **{f"receipts_{k}": v for k, v in result.get("receipts", {}).items()},
                **{f"eval_{k}": v for k, v in result.get("eval", {}).items()},
            }


def _summary(summary: GroupSummary) -> Row:
    row: dict[str, Any] = {"group": summary.label, "mode": summary.group.mode}
    row |= {"runs": len(summary.group.runs), "finished": len(summary.group.finished)}
    for name in _SPREADS:
        row |= _spread(name, getattr(summary, name))
    target = summary.target
    if target is not None:
        row |= {"target": target.level, "reached": target.num_reached}
        row |= _spread("time_to_target_s", target.spread)
    return row


def _spread(name: str, spread: Spread | None) -> Row:
    return {
        f"{name}_{part}": getattr(spread, part) if spread else None
        for part in ("mean", "low", "high")
    }


def _staleness(summaries: Sequence[GroupSummary]) -> Iterator[Row]:
    for summary in summaries:
        for value, count in summary.histogram.items():
            yield {"group": summary.label, "staleness": value, "receipts": count}
