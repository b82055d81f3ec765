"""What a detached run shows, kept for those who are attached to it."""

import secrets
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console

from asynception.console import Display

MAX_LINES = 1000
"""Newest lines that are kept; metrics.jsonl has all."""

FIRST_LINES = 20
"""What somebody sees who has just come."""


@dataclass(frozen=True)
class Position:
    """How far a run is: samples, seconds that are left, and what goes with them."""

    num_samples: int
    left_s: float
    values: str


@dataclass(frozen=True)
class Line:
    """A line of text, or one about progress, which a bar makes superfluous."""

    at: datetime
    what: str | Position


@dataclass(frozen=True)
class Mark:
    """A place among the lines of one relay; a driver that was started again has another."""

    relay: str
    line: int


@dataclass(frozen=True)
class News:
    """What there is to show since somebody last asked."""

    run_name: str
    total_samples: int
    bar: Position | None
    lines: Sequence[Line]
    following: Mark
    """The first line that isn't among these."""
    ended: bool


class Relay:
    """Lines of a run, numbered from 0, and where it stands. Threads may share it."""

    def __init__(self, run_name: str) -> None:
        self._run_name, self._total_samples = run_name, 0
        self._name = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._lines: deque[Line] = deque(maxlen=MAX_LINES)
        self._num_lines = 0
        self._bar: Position | None = None

    def display(self, run_name: str, total_samples: int, console: Console) -> Display:
        """What the run's reporter is to show itself on."""
        self._run_name, self._total_samples = run_name, total_samples
        return _Relayed(self, run_name, total_samples)

    def move(self, position: Position) -> None:
        """The run stands here."""
        self._bar = position

    def add(self, what: str | Position) -> None:
        """A line that begins now."""
        with self._lock:
            self._lines.append(Line(datetime.now(), what))
            self._num_lines += 1

    def news(self, since: Mark | None, ended: bool) -> News:
        """All lines from a mark on that are kept; None for the last few, which come first."""
        with self._lock:
            lines, following = list(self._lines), self._num_lines
        if since is None:
            lines = lines[-FIRST_LINES:]
        elif since.relay == self._name:
            lines = lines[len(lines) - min(len(lines), following - since.line) :]
        mark = Mark(self._name, following)
        return News(self._run_name, self._total_samples, self._bar, lines, mark, ended)


class _Relayed(Display):
    """A display without a console."""

    def __init__(self, relay: Relay, run_name: str, total_samples: int) -> None:
        super().__init__(run_name, total_samples, Console(quiet=True))
        self._relay = relay

    def bar(self, num_samples: int, left_s: float, values: str) -> None:
        self._relay.move(Position(num_samples, left_s, values))

    def point(
        self, num_samples: int, left_s: float, values: str, at: datetime | None = None
    ) -> None:
        self._relay.add(Position(num_samples, left_s, values))

    def line(self, text: str, at: datetime | None = None) -> None:
        self._relay.add(text)

    def close(self) -> None:
        """What was said can still be asked for."""


def show(news: News, display: Display) -> None:
    """Show on a terminal or in a log what a run said elsewhere."""
    for line in news.lines:
        if isinstance(line.what, str):
            display.line(line.what, line.at)
        else:
            display.point(line.what.num_samples, line.what.left_s, line.what.values, line.at)
    if news.bar is not None:
        display.bar(news.bar.num_samples, news.bar.left_s, news.bar.values)
