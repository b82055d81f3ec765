"""What people see of a run: a live bar on a terminal, plain lines everywhere else."""

import math
from datetime import datetime, timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Display:
    """Shows one run on a console, which decides what it can do: pipes get neither bar nor colour.

    On a terminal, what else is printed while the bar is there appears above it.
    """

    def __init__(self, run_name: str, total_samples: int, console: Console) -> None:
        self._run_name, self._total_samples = run_name, total_samples
        self._console = console
        capable = console.is_terminal and not console.is_dumb_terminal
        # Refreshed by hand, so that no thread draws while the run ends or fails.
        self._live = Live(console=console, auto_refresh=False) if capable else None

    def bar(self, num_samples: int, left_s: float, values: str) -> None:
        """Redraw the bar, where there is one; `values` go below it."""
        if self._live is None:
            return
        self._live.start()
        self._live.update(self._drawn(num_samples, left_s, values), refresh=True)

    def _drawn(self, num_samples: int, left_s: float, values: str) -> Group:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True, max_width=24, overflow="ellipsis")
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            Text(self._run_name),
            ProgressBar(total=self._total_samples, completed=num_samples),
            Text(self.position(num_samples, left_s)),
        )
        return Group(row, Text(values, style="dim"))

    def position(self, num_samples: int, left_s: float) -> str:
        """How far the run is, in words."""
        share = num_samples / self._total_samples if self._total_samples else 1.0
        done = f"{num_samples:,}/{self._total_samples:,} samples ({share:.1%})"
        return f"{done}  {duration(left_s)} left"

    def point(
        self, num_samples: int, left_s: float, values: str, at: datetime | None = None
    ) -> None:
        """A line about progress, unless there is a bar, which it would only repeat."""
        if self._live is None:
            self.line(f"{self.position(num_samples, left_s)}  {values}", at)

    def line(self, text: str, at: datetime | None = None) -> None:
        """A line of its own, with the time of day: now, or another."""
        stamped = Text.assemble((f"{at or datetime.now():%H:%M:%S}", "dim"), "  ", text)
        # Neither wrapped nor cut: a log is searched by line.
        self._console.print(stamped, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands, and the terminal as it was."""
        if self._live is not None:
            self._live.stop()


def duration(seconds: float) -> str:
    """As 0:03:21; a question mark if it isn't known."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"


def number(value: float) -> str:
    """With four digits; a dash if there is none."""
    return f"{value:.4g}" if math.isfinite(value) else "-"
