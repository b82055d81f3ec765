"""What commands show: a bar while they work, tables and lines afterwards."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from asynception.data.pack_plan import Report

_REFRESH_S = 0.1


@contextmanager
def shown_progress() -> Iterator["Report"]:
    """A bar on a terminal, and nothing elsewhere."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        shown_s = 0.0

        def report(stage: str, done: int, total: int | None) -> None:
            nonlocal shown_s
            now_s = time.monotonic()
            if now_s - shown_s >= _REFRESH_S or done == total:
                shown_s = now_s
                progress.update(task, description=stage, completed=done, total=total)

        yield report


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values."""
    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(name, value)
    Console(width=max(Console().width, 100)).print(table)


def print_lines(lines: Sequence[str], num_lines: int) -> None:
    """The first of `num_lines`, and how many there are besides."""
    for line in lines:
        click.echo(line)
    if num_lines > len(lines):
        click.echo(f"... and {num_lines - len(lines):,} more")
