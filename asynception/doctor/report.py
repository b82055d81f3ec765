"""The doctor's report: for people, on a terminal or in a log, and for programs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asynception.doctor.finding import Finding

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def as_json(findings: Sequence[Finding]) -> str:
    """All findings, of every node, and how many failed."""
    levels = [each.level for each in findings]
    counts = {level: levels.count(level) for level in ("ok", "warn", "fail")}
    return json.dumps({**counts, "findings": [asdict(each) for each in findings]}, indent=1)


def num_failed(findings: Iterable[Finding]) -> int:
    return sum(each.level == "fail" for each in findings)


def gathered(findings: Sequence[Finding]) -> list[Finding]:
    """One line for all nodes of which a check says the same; where it is ok, what the first said.

    The first is named, and how many more there are.
    """
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for each in findings:
        said = () if each.level == "ok" else (each.found, each.mend)
        alike.setdefault((each.check, each.level, *said), []).append(each)
    return [
        replace(first, where=f"{first.where} and {len(more)} more") if more else first
        for first, *more in alike.values()
    ]


def print_report(findings: Sequence[Finding], console: Console) -> None:
    """A table on a terminal; elsewhere a line each, neither wrapped nor cut."""
    lines = gathered(findings)
    if console.is_terminal:
        console.print(_table(lines))
    else:
        for each in lines:
            console.print(_line(each), soft_wrap=True, highlight=False)
    console.print(summary(findings), soft_wrap=True, highlight=False)


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    warned = sum(each.level == "warn" for each in findings)
    failed = num_failed(findings)
    counts = f"{len(findings)} checks: {failed} failed, {warned} with a warning"
    if failed:
        return f"{counts}. A run would stop at what failed, or crawl."
    return f"{counts}."


def _line(finding: Finding) -> Text:
    mend = f" -> {finding.mend}" if finding.mend else ""
    return Text.assemble(
        (f"{finding.level:<5}", _STYLES[finding.level]),
        f"{finding.check:<19}{finding.where}: {finding.found}{mend}",
    )


def _table(lines: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("", "check", "where", "found"):
        table.add_column(title, no_wrap=title in ("", "check"), overflow="fold")
    for each in lines:
        found = Text(each.found)
        if each.mend:
            found.append(f"\n-> {each.mend}", "dim")
        level = Text(each.level, _STYLES[each.level])
        table.add_row(level, Text(each.check), Text(each.where), found)
    return table
