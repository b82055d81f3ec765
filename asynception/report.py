"""What a run shows and writes while it goes on: lines, metrics.jsonl and TensorBoard curves.

metrics.jsonl has one strict JSON object a line, its `kind` being train, eval or event; what isn't
known or not finite is null. It is only ever appended to: a resumed run goes on where its
checkpoint was, so `samples` may fall from one line to the next. A line that a kill cut short stays
behind as a line that is no JSON, and readers are to skip it.
"""

import errno
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from asynception.console import Display, number
from asynception.diagnosis import Diagnosis
from asynception.monitoring.loggers import Logger
from asynception.monitoring.monitor import Monitor
from asynception.monitoring.shard_watch import Shards
from asynception.monitoring.tensorboard import TensorBoard
from asynception.plan import RunPlan
from asynception.totals import PHASES, Progress, Totals, histograms, staleness_summary

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"

MAX_HISTOGRAMS = 32
"""Workers, and shards, whose staleness is drawn; result.json has all."""

_CURVES = (
    "loss",
    "grad_norm",
    "lr",
    "samples_per_s",
    "staleness_mean",
    "staleness_max",
    "dropped",
    "corrupt",
    "workers",
)
"""What of a point is drawn as train/NAME."""


@dataclass(frozen=True)
class _Mark:
    """How far the run was, `time_s` seconds of training after it first began."""

    time_s: float
    progress: Progress


class Reporter:
    """Shows and records one session of a run; a context manager. Not thread-safe.

    A run that falls back to an earlier state goes on with the same reporter: what it writes then
    starts again at that state, and TensorBoard drops the curves beyond it.
    """

    def __init__(
        self,
        folder: Path,
        run_name: str,
        total_samples: int,
        log_every_s: float,
        start_samples: int = 0,
        started_s: float = 0.0,
        terminal: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        monitor: Monitor | None = None,
        open_loggers: Callable[[Callable[[str], None]], Sequence[Logger]] = lambda tell: (),
        display: Callable[[str, int, Console], Display] = Display,
    ) -> None:
        """A resumed run has consumed `start_samples` in `started_s` seconds of earlier sessions.

        `terminal` defaults to stdout; `display` makes what shows the run there. `open_loggers`
        makes what draws curves besides TensorBoard, and is given what tells people of its troubles.
        Raises OSError if `folder` can't be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._total_samples, self._log_every_s = total_samples, log_every_s
        self._clock, self._offset_s = clock, started_s - clock()
        self._closing = ExitStack()
        self._lines = self._closing.enter_context(_JsonLines(folder / METRICS_FILE))
        self._display = display(run_name, total_samples, terminal or Console())
        self._closing.callback(self._display.close)
        self._monitor = monitor
        self._newest: _Mark | None = None
        curves = TensorBoard(folder / TENSORBOARD_FOLDER, start_samples)
        self._loggers: list[Logger] = [curves, *open_loggers(self.event)]
        for logger in self._loggers:
            self._closing.callback(logger.close)
        # The last two points. A run from the start has counted nothing yet; what a resumed one
        # had counted before is what the first call of `progress` says.
        self._points: deque[_Mark] = deque(maxlen=2)
        if start_samples == 0:
            self._points.append(_Mark(started_s, Progress(0, Totals())))
        self._newest = self._points[-1] if self._points else None
        self._lanes: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def time_s(self) -> float:
        """Seconds of training, earlier sessions included."""
        return self._clock() + self._offset_s

    def progress(self, progress: Progress) -> None:
        """Show how far the run is; a point is written every `log_every_s`."""
        now = _Mark(self.time_s, progress)
        if self._newest is None:
            self._points.append(now)
        elif _is_behind(progress, self._newest.progress):
            self._points = deque([now], maxlen=2)
            for logger in self._loggers:
                logger.rewind(progress.num_consumed)
        self._newest = now
        if self._monitor is not None:
            self._monitor.progress(now.time_s, progress)
        if now.time_s - self._points[-1].time_s >= self._log_every_s:
            self._write_point(now)
        # Since the point before the last, so that a new point doesn't make the values jump.
        recent = _point(self._points[0], now)
        self._display.bar(progress.num_consumed, self._left_s(recent), _described(recent))

    def _write_point(self, now: _Mark) -> None:
        last = self._points[-1]
        point = _point(last, now)
        self._points.append(now)
        self._record({"kind": "train", **point})
        samples = now.progress.num_consumed
        drawn = {f"train/{name}": point[name] for name in _CURVES}
        self._draw(drawn | _phase_shares(point), samples)
        totals = now.progress.totals.since(last.progress.totals)
        for logger in self._loggers:
            _draw_staleness(logger, totals, samples)
        self._note_lanes(totals.lanes)
        self._display.point(samples, self._left_s(point), _described(point))

    def _draw(self, values: Mapping[str, float], samples: int) -> None:
        for logger in self._loggers:
            logger.scalars(values, samples)

    def _note_lanes(self, lanes: Collection[str]) -> None:
        """Say by which lanes vectors travel, at first and when that has changed."""
        if lanes and set(lanes) != self._lanes:
            self._lanes = set(lanes)
            self.event(f"lanes in use: {', '.join(sorted(lanes))}")

    def _left_s(self, point: Mapping[str, float]) -> float:
        """Seconds to the end at the rate of `point`; infinite if it stands still."""
        left, rate = self._total_samples - point["samples"], point["samples_per_s"]
        if left <= 0:
            return 0.0
        return left / rate if rate > 0 else math.inf

    def evaluation(
        self,
        samples: int,
        updates: int,
        metrics: Mapping[str, float],
        baseline: Mapping[str, float],
    ) -> None:
        """Record an evaluation of the state at `samples` and `updates`.

        `baseline` has what the metrics would be without learning from the images.
        """
        at = {"time_s": self.time_s, "samples": samples, "updates": updates}
        self._record({"kind": "eval", **at, "metrics": metrics, "baseline": baseline})
        self._draw({f"eval/{name}": value for name, value in metrics.items()}, samples)
        if self._monitor is not None:
            self._monitor.evaluation(samples, metrics, baseline)
        shown = (
            f"{name} {number(value)}"
            + (f" (baseline {number(baseline[name])})" if name in baseline else "")
            for name, value in metrics.items()
        )
        self._display.line(f"evaluation at {samples:,} samples: {', '.join(shown)}")

    def event(self, text: str) -> None:
        """Tell people of something that happened."""
        samples = self._newest.progress.num_consumed if self._newest else None
        at = {"time_s": self.time_s, "samples": samples}
        self._record({"kind": "event", **at, "text": text})
        self._display.line(text)
        if self._monitor is not None:
            self._monitor.event(text)

    def checkpoint(self, name: str, took_s: float) -> None:
        """Tell people of a checkpoint."""
        if self._monitor is not None:
            self._monitor.checkpoint(name, took_s)
        self.event(f"checkpoint {name}")

    def attend(self, shards: Shards | None) -> None:
        """Watch a session's shards from now on, or none any more."""
        if self._monitor is not None:
            self._monitor.attend(shards)

    def resized(self, plan: RunPlan) -> None:
        """From now on the run has other servers."""
        if self._monitor is not None:
            self._monitor.resized(plan)

    def conclude(self, status: str, error: str | None = None) -> Diagnosis | None:
        """Say what held the run up; None if nobody watched it."""
        if self._monitor is None:
            return None
        found = self._monitor.conclude(status, error)
        for text in (found.text, *found.notes):
            self.event(f"diagnosis: {text}")
        return found

    def _record(self, values: Mapping[str, Any]) -> None:
        said = self._lines.write(values)
        if said:
            self._display.line(said)

    def close(self) -> None:
        """Write what came after the last point, and let go of files and terminal."""
        with self._closing:
            newest = self._newest
            if newest and newest.progress.num_consumed > self._points[-1].progress.num_consumed:
                self._write_point(newest)


def _draw_staleness(logger: Logger, totals: Totals, samples: int) -> None:
    logger.histogram("train/staleness", totals.staleness, samples)
    for kind in ("worker", "shard"):
        parts = histograms(getattr(totals, f"{kind}_staleness"))
        for name in list(parts)[:MAX_HISTOGRAMS]:
            logger.histogram(f"staleness/{kind}_{name}", parts[name], samples)


def _is_behind(progress: Progress, earlier: Progress) -> bool:
    """Both only grow, unless the run fell back to a checkpoint."""
    return (
        progress.num_consumed < earlier.num_consumed
        or progress.totals.pushes < earlier.totals.pushes
    )


def _point(earlier: _Mark, now: _Mark) -> dict[str, Any]:
    """Where the run stands (time_s, samples, pushes, workers, lr), and what came since `earlier`.

    workers_wanted: how many there are to be, if it is known.

    loss and grad_norm are means over pushes; dropped counts receipts, corrupt images not met
    before; lanes receipts by lane; a phase's NAME_s is seconds per push. NaN stands for what isn't
    known.
    """
    progress = now.progress
    totals = progress.totals.since(earlier.progress.totals)
    seconds = now.time_s - earlier.time_s
    samples = progress.num_consumed - earlier.progress.num_consumed
    return {
        "time_s": now.time_s,
        "samples": progress.num_consumed,
        "pushes": progress.totals.pushes,
        "workers": len(progress.silent_s),
        **({} if progress.num_wanted is None else {"workers_wanted": progress.num_wanted}),
        "loss": totals.mean_loss,
        "grad_norm": totals.mean_norm,
        "lr": totals.lr if progress.totals.outcomes else math.nan,
        "samples_per_s": samples / seconds if seconds > 0 else math.nan,
        **_staleness(totals),
        "dropped": totals.dropped,
        "corrupt": len(totals.corrupt),
        "lanes": dict(totals.lanes),
        **{f"{name}_s": _ratio(totals.phases_s[name], totals.pushes) for name in PHASES},
    }


def _staleness(totals: Totals) -> dict[str, float]:
    summary = staleness_summary(totals.staleness)
    return {f"staleness_{k}": v if totals.staleness else math.nan for k, v in summary.items()}


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole else math.nan


def _phase_shares(point: Mapping[str, float]) -> dict[str, float]:
    whole = sum(point[f"{name}_s"] for name in PHASES)
    return {f"time/{name}_share": _ratio(point[f"{name}_s"], whole) for name in PHASES}


def _described(point: Mapping[str, float]) -> str:
    mean, most = number(point["staleness_mean"]), number(point["staleness_max"])
    values = [
        f"{number(point['samples_per_s'])} samples/s",
        f"loss {number(point['loss'])}",
        f"lr {number(point['lr'])}",
        f"staleness {mean} (max {most})",
        f"workers {point['workers']}{_of_wanted(point)}",
    ]
    lost = [f"{name} {point[name]}" for name in ("dropped", "corrupt") if point[name]]
    return "  ".join(values + lost)


def _of_wanted(point: Mapping[str, Any]) -> str:
    return f"/{point['workers_wanted']}" if "workers_wanted" in point else ""


class _JsonLines:
    """A file that grows by whole lines: each is one write, so a kill cuts at most the last.

    What a full disk has no room for is left out.
    """

    def __init__(self, path: Path) -> None:
        self._failing = False
        self._file = path.open("ab+", buffering=0)
        if not self._at_line_start():
            self._file.write(b"\n")

    def _at_line_start(self) -> bool:
        if self._file.seek(0, os.SEEK_END) == 0:
            return True
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: Mapping[str, Any]) -> str | None:
        """Append a line; what is to be said if it can't be, the first time."""
        line = f"{json.dumps(_strict(values), allow_nan=False)}\n".encode()
        before, self._failing = self._failing, False
        try:
            if before and not self._at_line_start():
                self._file.write(b"\n")
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._failing = True
            if not before:
                return f"{METRICS_FILE} can't be written, and has a gap from here on: {error}"
        return None


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
