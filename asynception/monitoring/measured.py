"""What was measured between two moments of a run, by worker and by shard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from asynception.config import TrainConfig
from asynception.diagnosis import Diagnosis, Setup, ShardTime, WorkerTime, diagnose
from asynception.totals import PHASES, Progress, Totals
from ps.messages import ShardStatus
from ps.schedule import Clocks


@dataclass(frozen=True)
class Reading:
    """The shards' counters, as they were `time_s` seconds into the run."""

    time_s: float
    shards: Sequence[ShardStatus]


@dataclass(frozen=True)
class Mark:
    """A run at one moment, and what its shards said last."""

    time_s: float
    progress: Progress
    reading: Reading = field(default_factory=lambda: Reading(0.0, ()))


class Span:
    """From one mark to a later one of the same session."""

    def __init__(self, earlier: Mark, later: Mark) -> None:
        self.earlier, self.later = earlier, later
        self.seconds = later.time_s - earlier.time_s
        self.totals: Totals = later.progress.totals.since(earlier.progress.totals)
        self.num_samples = max(0, later.progress.num_consumed - earlier.progress.num_consumed)

    @property
    def workers(self) -> list[WorkerTime]:
        """Those that live, and those that reported something."""
        totals = self.totals
        reported = {worker for worker, _ in totals.worker_phases_s}
        return [self._worker(each) for each in sorted({*reported, *self.later.progress.silent_s})]

    def _worker(self, worker: int) -> WorkerTime:
        totals = self.totals
        spent_s = [float(totals.worker_phases_s[worker, name]) for name in PHASES]
        pushes, samples = totals.worker_pushes[worker], totals.worker_samples[worker]
        return WorkerTime(worker, pushes, samples, *spent_s)

    @property
    def shards(self) -> list[ShardTime]:
        """Empty until they have been asked."""
        before, after = self.earlier.reading, self.later.reading
        # New servers count from nothing, and so does what was never read before.
        starts = before.shards or [ShardStatus(Clocks(0, 0))] * len(after.shards)
        wall_s = after.time_s - (before.time_s if before.shards else self.earlier.time_s)
        return [
            ShardTime(shard, wall_s, *_spent(start, later))
            for shard, (start, later) in enumerate(zip(starts, after.shards, strict=True))
        ]

    def diagnosis(self, config: TrainConfig) -> Diagnosis:
        """What held the run up."""
        return diagnose(self.workers, self.shards, setup_of(config, tuple(self.totals.lanes)))


def _spent(start: ShardStatus, later: ShardStatus) -> Iterator[float]:
    """Seconds by what a shard counts, in the order of `ShardTime`.

    One that counts less than before is another server, a standby that was promoted meanwhile.
    """
    for before, now in zip(_counted(start), _counted(later), strict=True):
        yield now - before if now >= before else now


def _counted(status: ShardStatus) -> tuple[float, ...]:
    standby_s = status.replica.waited_s if status.replica else 0.0
    return status.apply_s, status.queue_s, status.gate_s, standby_s


def setup_of(config: TrainConfig, lanes: tuple[str, ...]) -> Setup:
    """What the diagnosis is to know of a run's settings."""
    return Setup(
        config.consistency.mode,
        config.scaling.num_servers,
        config.wire.pull,
        config.wire.push,
        lanes,
        config.pipeline.overlap,
    )
