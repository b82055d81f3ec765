"""A run's figures as Ray's own metrics, which its nodes export for Prometheus.

All are recorded in the trainer's process, from what workers and shards have told it. Ray puts ray_
before each name and _total after a counter's, and adds tags of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ray.util.metrics import Counter, Gauge, Histogram

from asynception.monitoring.measured import Span
from asynception.plan import RunPlan
from asynception.totals import PHASES
from ps.layout import ShardRanges
from ps.messages import ReplicaStatus, ShardStatus
from ps.schedule import Clocks
from ps.wire import WireSettings

_COUNTERS: Final = {
    "updates": ("Updates of a shard's parameters.", ("shard",)),
    "pushes": ("Gradients that a worker pushed, receipts and all.", ("worker",)),
    "samples": ("Images behind those gradients.", ("worker",)),
    "receipts": ("Shards' answers to pushes; all but applied and accumulated lost.", ("outcome",)),
    "wire_bytes": (
        "Bytes of vectors pulled and pushed, retries not counted.",
        ("shard", "lane", "direction"),
    ),
    "worker_seconds": (
        "Where workers' time goes: data, pull, compute, push.",
        ("worker", "phase"),
    ),
    "apply_seconds": ("Seconds in which a shard applied pushes.", ("shard",)),
    "push_queue_seconds": ("Seconds that pushes waited for others at a shard.", ("shard",)),
    "pull_gate_seconds": ("Seconds that pulls waited for a version, or to go on.", ("shard",)),
    "push_standby_seconds": ("Seconds that pushes waited for a shard's standby.", ("shard",)),
    "samples_lost": ("Images left out because their shard of data couldn't be had.", ()),
    "samples_returned": ("Images that dead workers left, handed out again.", ()),
    "images_corrupt": ("Images that did not decode.", ()),
}
_GAUGES: Final = {
    "progress_ratio": ("Share of the run's samples that is done.", ()),
    "loss": ("Mean training loss of the last seconds.", ()),
    "learning_rate": ("The schedule's, of the last receipt.", ()),
    "gradient_norm": ("Mean norm of gradients, before clipping.", ()),
    "evaluation": ("Measures of the newest evaluation.", ("measure",)),
    "worker_up": ("Whether a worker is at work.", ("worker",)),
    "worker_silent_seconds": ("Since a worker that is at work was heard of.", ("worker",)),
    "push_queue_length": ("Pushes that wait for others, on average.", ("shard",)),
    "version": ("Updates that are in a shard's parameters.", ("shard",)),
    "pins": ("Readers of a shard's parameters, and versions kept.", ("shard",)),
    "buffers": ("Copies of its parameters that a shard holds.", ("shard",)),
    "standby_in_step": ("Whether a standby has all that its shard has answered.", ("shard",)),
    "standby_operations_behind": ("That the standby is known to lack.", ("shard",)),
    "standby_waiting_seconds": (
        "Since the standby was sent what it has yet to answer.",
        ("shard",),
    ),
    "checkpoint_age_seconds": ("Since the last checkpoint, or since the run began.", ()),
    "checkpoint_seconds": ("That the last checkpoint took.", ()),
}
_STALENESS_BOUNDARIES: Final = [0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5, 64.5, 128.5, 256.5, 1024.5]
"""Between whole versions, so that each is in one bucket."""


class RayMetrics:
    """Records one run's figures; see `monitor.Metrics`. Ray must be initialised."""

    def __init__(self, plan: RunPlan) -> None:
        self._tags, self._total_samples = {"run": plan.config.run.name or ""}, plan.total_samples
        self._wire_bytes = _wire_bytes(plan)
        self._seen: set[int] = set()
        self._counters = {name: _made(Counter, name, *each) for name, each in _COUNTERS.items()}
        self._gauges = {name: _made(Gauge, name, *each) for name, each in _GAUGES.items()}
        self._staleness = Histogram(
            "asynception_staleness_versions",
            "By how many versions kept pushes were stale, at each shard.",
            boundaries=_STALENESS_BOUNDARIES,
            tag_keys=("run",),
        )

    def span(self, span: Span) -> None:
        """What came since the span before, which ended where this one begins."""
        self._run(span)
        self._workers(span)
        self._shards(span)
        for value, count in span.totals.staleness.items():
            for _ in range(count):
                self._staleness.observe(value, self._tags)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Of the newest state that was evaluated."""
        for name, value in metrics.items():
            self._set("evaluation", value, measure=name)

    def checkpoint(self, age_s: float, took_s: float | None) -> None:
        """How long ago the last one was written, and how long that took; None if there is none."""
        self._set("checkpoint_age_seconds", age_s)
        if took_s is not None:
            self._set("checkpoint_seconds", took_s)

    def resized(self, plan: RunPlan) -> None:
        """From now on there are other servers; what was said of those that are gone is at rest."""
        before, self._wire_bytes = len(self._wire_bytes), _wire_bytes(plan)
        for shard in range(len(self._wire_bytes), before):
            for name in ("push_queue_length", "pins", "buffers"):
                self._set(name, 0, shard=shard)
            if plan.config.scaling.replicas:
                self._standby(shard, ReplicaStatus(epoch=0, state="in_step"))

    def _count(self, name: str, by: float, **tags: object) -> None:
        if by > 0:
            self._counters[name].inc(by, self._tagged(tags))

    def _set(self, name: str, value: float, **tags: object) -> None:
        self._gauges[name].set(value, self._tagged(tags))

    def _tagged(self, tags: Mapping[str, object]) -> dict[str, str]:
        return {**self._tags, **{key: str(value) for key, value in tags.items()}}

    def _run(self, span: Span) -> None:
        totals = span.totals
        self._set("progress_ratio", span.later.progress.num_consumed / self._total_samples)
        if totals.losses:
            self._set("loss", totals.mean_loss)
            self._set("gradient_norm", totals.mean_norm)
        if totals.outcomes:
            self._set("learning_rate", totals.lr)
        for outcome, count in totals.outcomes.items():
            self._count("receipts", count, outcome=outcome)
        self._count("samples_lost", sum(totals.lost.values()))
        self._count("samples_returned", totals.samples_returned)
        self._count("images_corrupt", len(totals.corrupt))
        for (shard, lane), count in totals.shard_lanes.items():
            # A worker pulls once for each push.
            moved = self._wire_bytes[shard]
            self._count("wire_bytes", count * moved.pull, shard=shard, lane=lane, direction="pull")
            self._count("wire_bytes", count * moved.push, shard=shard, lane=lane, direction="push")

    def _workers(self, span: Span) -> None:
        silent_s = span.later.progress.silent_s
        self._seen |= silent_s.keys()
        for worker in self._seen:
            self._set("worker_up", float(worker in silent_s), worker=worker)
        for worker, seconds in silent_s.items():
            self._set("worker_silent_seconds", seconds, worker=worker)
        for each in span.workers:
            self._count("pushes", each.pushes, worker=each.worker)
            self._count("samples", each.samples, worker=each.worker)
            for phase in PHASES:
                seconds = getattr(each, f"{phase}_s")
                self._count("worker_seconds", seconds, worker=each.worker, phase=phase)

    def _shards(self, span: Span) -> None:
        before = span.earlier.reading.shards
        statuses = span.later.reading.shards
        for time, status in zip(span.shards, statuses, strict=True):
            shard = time.shard
            start = before[shard] if before else ShardStatus(Clocks(status.clocks.updates, 0))
            self._count("updates", status.clocks.updates - start.clocks.updates, shard=shard)
            self._count("apply_seconds", time.apply_s, shard=shard)
            self._count("push_queue_seconds", time.queue_s, shard=shard)
            self._count("pull_gate_seconds", time.gate_s, shard=shard)
            self._count("push_standby_seconds", time.standby_s, shard=shard)
            self._set("push_queue_length", time.mean_queue, shard=shard)
            self._set("version", status.clocks.updates, shard=shard)
            self._set("pins", status.num_pins, shard=shard)
            self._set("buffers", status.num_buffers, shard=shard)
            self._standby(shard, status.replica)

    def _standby(self, shard: int, replica: ReplicaStatus | None) -> None:
        if replica is not None:
            self._set("standby_in_step", float(replica.state == "in_step"), shard=shard)
            self._set("standby_operations_behind", replica.num_behind, shard=shard)
            self._set("standby_waiting_seconds", replica.waiting_s, shard=shard)


class ShardBytes:
    """Bytes of vectors in one pull from, and one push to, a shard."""

    def __init__(self, ranges: ShardRanges, wire: WireSettings) -> None:
        statistics = 4 * ranges.statistics.numel
        self.pull = ranges.parameters.numel * wire.pull_dtype.itemsize + statistics
        self.push = ranges.parameters.numel * wire.push_dtype.itemsize + statistics


def _wire_bytes(plan: RunPlan) -> Sequence[ShardBytes]:
    return [ShardBytes(ranges, plan.config.wire) for ranges in plan.model.layout.shards]


def _made(kind: Any, name: str, description: str, tags: tuple[str, ...]) -> Any:
    return kind(f"asynception_{name}", description, tag_keys=("run", *tags))
