"""Watches one run: keeps status.json and Ray's metrics up to date, and says what holds it up."""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from asynception.config import TrainConfig
from asynception.diagnosis import Diagnosis, diagnose
from asynception.monitoring.measured import Mark, Span, setup_of
from asynception.monitoring.shard_watch import Shards, ShardWatch
from asynception.monitoring.status import progress_json
from asynception.monitoring.status_file import write_status
from asynception.plan import RunPlan
from asynception.totals import Progress

EVERY_S: Final = 2.0
"""Seconds between two states that are published."""

WINDOW_S: Final = 60.0
"""Over which speeds and shares are taken while the run goes on; at its end, all of the session."""

NUM_EVENTS: Final = 8
"""Of the last ones that are kept."""

_log = logging.getLogger(__name__)


class Metrics(Protocol):
    """Where figures go that others collect."""

    def span(self, span: Span) -> None:
        """What came since the span before."""

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Of the newest state that was evaluated."""

    def checkpoint(self, age_s: float, took_s: float | None) -> None:
        """How long ago the last one was written, and how long that took; None if there is none."""

    def resized(self, plan: RunPlan) -> None:
        """From now on there are other servers."""


class Monitor:
    """Follows a run from its beginning, over all sessions of this process. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        total_samples: int,
        metrics: Metrics | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """now_s: the time of day."""
        self._folder, self._config, self._total_samples = folder, config, total_samples
        self._metrics, self._now_s = metrics, now_s
        self._watch = ShardWatch()
        self._marks: deque[Mark] = deque()
        self._first: Mark | None = None
        self._told_of_disk = False
        self._values: dict[str, Any] = {
            "run": config.run.name,
            "status": "running",
            "mode": config.consistency.mode,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": now_s(),
            "events": [],
        }

    def attend(self, shards: Shards | None) -> None:
        """Watch these shards from now on, which have counted nothing yet; None for none."""
        self._watch.attend(shards)
        if shards is not None:
            self._marks.clear()
            self._first = None

    def resized(self, plan: RunPlan) -> None:
        """The shards that are attended from now on are those of this plan."""
        self._config = plan.config
        if self._metrics is not None:
            self._metrics.resized(plan)

    def progress(self, time_s: float, progress: Progress) -> None:
        """How far the run is after `time_s` seconds; published now and then, and at its end."""
        newest = self._marks[-1] if self._marks else None
        if newest and time_s - newest.time_s < EVERY_S and not progress.finished:
            return
        self._watch.ask(time_s, wait=progress.finished)
        mark = Mark(time_s, progress, self._watch.reading)
        if newest and self._metrics is not None:
            self._metrics.span(Span(newest, mark))
        self._first = self._first or mark
        self._marks.append(mark)
        while len(self._marks) > 2 and time_s - self._marks[1].time_s >= WINDOW_S:
            self._marks.popleft()
        self._publish(Span(self._marks[0], mark))

    def _publish(self, span: Span) -> None:
        self._values |= progress_json(span, self._config, self._total_samples)
        found = span.diagnosis(self._config)
        if found.bottleneck == "unknown" and self._first is not None:
            # Steps that take long are few in a minute.
            found = Span(self._first, span.later).diagnosis(self._config)
        self._values["diagnosis"] = found.to_json()
        if self._metrics is not None:
            last = self._values.get("checkpoint", {"at": self._values["started_at"]})
            self._metrics.checkpoint(self._now_s() - last["at"], last.get("took_s"))
        self._write()

    def evaluation(
        self, samples: int, metrics: Mapping[str, float], baseline: Mapping[str, float]
    ) -> None:
        """Of the state at `samples`."""
        self._values["evaluation"] = {
            "at": self._now_s(),
            "samples": samples,
            "metrics": dict(metrics),
            "baseline": dict(baseline),
        }
        if self._metrics is not None:
            self._metrics.evaluation(metrics)

    def checkpoint(self, name: str, took_s: float) -> None:
        """One was written."""
        self._values["checkpoint"] = {"name": name, "at": self._now_s(), "took_s": took_s}

    def event(self, text: str) -> None:
        """What people were told."""
        events = [*self._values["events"], {"at": self._now_s(), "text": text}]
        self._values["events"] = events[-NUM_EVENTS:]

    def conclude(self, status: str, error: str | None = None) -> Diagnosis:
        """The run's end, and what held it up; what is measured by then stays in the file."""
        self._watch.attend(None)
        if self._first is None:
            found = diagnose([], [], setup_of(self._config, ()))
        else:
            whole = Span(self._first, self._marks[-1])
            found = whole.diagnosis(self._config)
            self._values |= progress_json(whole, self._config, self._total_samples)
        self._values |= {"status": status, "error": error, "diagnosis": found.to_json()}
        self._write()
        return found

    def _write(self) -> None:
        """A disk that is full must not end the run: it is said once, and tried again."""
        self._values["updated_at"] = self._now_s()
        try:
            write_status(self._folder, self._values)
        except OSError as error:
            if not self._told_of_disk:
                _log.warning("status.json can't be written: %s", error)
            self._told_of_disk = True
