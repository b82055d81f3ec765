"""What holds a run up, in words, from where its workers' and servers' seconds went.

A pure function of what was measured. A worker's seconds are disjoint: it waits for images (data),
for parameters (pull) and for receipts (push), or it computes; what runs beside the computation
doesn't count. A shard's are of its one lock: what it applies, and what pushes queue for that.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, Literal

Bottleneck = Literal[
    "unknown", "compute", "data", "others", "servers", "standbys", "network", "memory"
]

MIN_PUSHES_PER_WORKER: Final = 5
"""Fewer, on average, say nothing: the first wait for what is still starting."""

NOTABLE_SHARE: Final = 0.15
"""Of workers' time; what waits for less than that isn't called a bottleneck."""

STRAGGLER_RATIO: Final = 1.5
"""How many times the median's seconds per sample a straggler takes at least."""

SERVER_PART: Final = 0.5
"""Of what workers wait for pulls and pushes: from there on, it is the servers' own work."""

SKEWED_RATIO: Final = 1.5
MIN_SKEWED_BUSY: Final = 0.1
"""A shard is called skewed if it is busy for so much of the time, and so many times the median."""


@dataclass(frozen=True)
class WorkerTime:
    """What one worker did in the time looked at, over all its lives."""

    worker: int
    pushes: int
    samples: int
    data_s: float = 0.0
    pull_s: float = 0.0
    compute_s: float = 0.0
    push_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.data_s + self.pull_s + self.compute_s + self.push_s

    @property
    def own_s_per_sample(self) -> float:
        """Of what only this worker can be slow at; NaN if it has pushed nothing."""
        return (self.data_s + self.compute_s) / self.samples if self.samples else math.nan


@dataclass(frozen=True)
class ShardTime:
    """What one shard did in `wall_s` seconds.

    queue_s, gate_s, standby_s: seconds that pushes waited for others, pulls for a version or to be
    let go on, and pushes for the standby to carry out them and those before them, added up over
    workers.
    """

    shard: int
    wall_s: float
    apply_s: float
    queue_s: float = 0.0
    gate_s: float = 0.0
    standby_s: float = 0.0

    @property
    def busy(self) -> float:
        """Share of the time in which it applied a push."""
        return self.apply_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def mean_queue(self) -> float:
        """Pushes that waited for others, on average over time (Little's law)."""
        return self.queue_s / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True)
class Setup:
    """What of a run's settings decides how it could be mended."""

    mode: str = "async"
    num_servers: int = 1
    pull: str = "float32"
    push: str = "float32"
    lanes: tuple[str, ...] = ("grpc",)
    """By which shards are reached."""
    overlap: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What workers spend their time on, and what to do about it.

    `shares` add up to 1: data, others (waiting for other workers), pull (of parameters that are
    there), compute, push; empty if too little was measured.
    """

    bottleneck: Bottleneck
    text: str
    shares: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    """What else is out of the ordinary: stragglers, skewed shards."""
    stragglers: Sequence[int] = ()
    """Workers, slowest first."""

    def to_json(self) -> dict[str, Any]:
        shares = {name: round(share, 4) for name, share in self.shares.items()}
        return {**vars(self), "shares": shares, "notes": [*self.notes]} | {
            "stragglers": [*self.stragglers]
        }


def diagnose(workers: Sequence[WorkerTime], shards: Sequence[ShardTime], setup: Setup) -> Diagnosis:
    """Where the time of all workers went, and what that means with these settings."""
    total_s = sum(each.total_s for each in workers)
    pushes = sum(each.pushes for each in workers)
    if total_s <= 0 or pushes < MIN_PUSHES_PER_WORKER * len(workers):
        return Diagnosis("unknown", f"too little was measured to say: {pushes} pushes")
    seconds = _seconds(workers, shards, setup)
    shares = {name: value / total_s for name, value in seconds.items()}
    slow = _stragglers(workers)
    waits = {
        "data": shares["data"],
        "others": shares["others"],
        "exchange": shares["pull"] + shares["push"],
    }
    longest = max(waits, key=lambda name: waits[name])
    notes = (*_slow_notes(slow, setup), *_skewed(shards))
    stragglers = tuple(slow)
    if waits[longest] < NOTABLE_SHARE:
        return Diagnosis("compute", _compute_bound(shares), shares, notes, stragglers)
    if longest == "data":
        return Diagnosis("data", _data_bound(shares), shares, notes, stragglers)
    if longest == "others":
        return Diagnosis("others", _waiting(shares, stragglers, setup), shares, notes, stragglers)
    cause, text = _exchange_bound(seconds, shares, shards, setup)
    return Diagnosis(cause, text, shares, notes, stragglers)


def _seconds(
    workers: Sequence[WorkerTime], shards: Sequence[ShardTime], setup: Setup
) -> dict[str, float]:
    """Of all workers, by what they were spent on.

    A pull goes to all shards at once, so the shard that held pulls up longest held the workers up.
    In allreduce mode what counts as a pull is the meeting before each step, of a few bytes.
    """
    pull_s = sum(each.pull_s for each in workers)
    gate_s = max((each.gate_s for each in shards), default=0.0)
    others_s = pull_s if setup.mode == "allreduce" else min(pull_s, gate_s)
    return {
        "data": sum(each.data_s for each in workers),
        "others": others_s,
        "pull": pull_s - others_s,
        "compute": sum(each.compute_s for each in workers),
        "push": sum(each.push_s for each in workers),
    }


def _stragglers(workers: Sequence[WorkerTime]) -> dict[int, float]:
    """How many times the median of the others each straggler takes for a sample, slowest first."""
    pace = {each.worker: each.own_s_per_sample for each in workers if each.samples}
    found = {}
    for worker, seconds in pace.items():
        others = [value for other, value in pace.items() if other != worker]
        if others and median(others) > 0 and seconds >= STRAGGLER_RATIO * median(others):
            found[worker] = seconds / median(others)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _slow_notes(stragglers: Mapping[int, float], setup: Setup) -> Iterator[str]:
    consequence = {
        "sync": "the others wait for it unless there are consistency.backup_workers",
        "allreduce": "the others wait for it at every step",
        "bounded": "the others are held up at consistency.slack steps ahead of it",
        "averaging": "it contributes less to each average, or holds it up",
    }.get(setup.mode, "the others don't wait for it, but its gradients are stale")
    for worker, ratio in stragglers.items():
        yield (
            f"worker {worker} is a straggler: it takes {ratio:.1f} times as long for a sample as "
            f"the median of the others; {consequence}"
        )


def _skewed(shards: Sequence[ShardTime]) -> Iterator[str]:
    for each in shards:
        others = [other.busy for other in shards if other is not each]
        usual = median(others) if others else math.inf
        if each.busy >= max(MIN_SKEWED_BUSY, SKEWED_RATIO * usual):
            yield (
                f"shard {each.shard} is skewed: busy for {each.busy:.0%} of the time, the median "
                f"of the others for {usual:.0%}; its node may be slower or serve others too"
            )


def _compute_bound(shares: Mapping[str, float]) -> str:
    return (
        f"workers compute for {shares['compute']:.0%} of their time: compute-bound; more or faster "
        "workers are what would speed it up"
    )


def _data_bound(shares: Mapping[str, float]) -> str:
    return (
        f"workers wait {shares['data']:.0%} for images: decoding-bound; give them more CPUs and "
        "data.num_threads, a larger data.prefetch_batches, or data.cache_images_mb for a small set"
    )


def _waiting(shares: Mapping[str, float], stragglers: Sequence[int], setup: Setup) -> str:
    slowest = f", worker {stragglers[0]} the longest" if stragglers else ""
    mend = {
        "sync": "raise consistency.backup_workers, or let them not wait (consistency.mode async)",
        "bounded": "raise consistency.slack, or let them not wait (consistency.mode async)",
        "averaging": "equal workers, or consistency.asynchronous, which doesn't wait",
    }.get(setup.mode, "equal workers, or consistency.mode async, which doesn't wait")
    return f"workers wait {shares['others']:.0%} for one another{slowest}: {mend}"


def _exchange_bound(
    seconds: Mapping[str, float],
    shares: Mapping[str, float],
    shards: Sequence[ShardTime],
    setup: Setup,
) -> tuple[Bottleneck, str]:
    """Whether it is the servers' own work, or what carries the bytes."""
    waits = f"workers wait {shares['pull']:.0%} for pulls and {shares['push']:.0%} for pushes"
    if setup.mode == "allreduce":
        return "network", (
            f"workers wait {shares['push']:.0%} for gradients to be reduced: network-bound; a "
            "larger data.batch_size, or workers on fewer nodes"
        )
    server_s = max((each.apply_s + each.queue_s for each in shards), default=0.0)
    busiest = max((each.busy for each in shards), default=0.0)
    they_are = "the server is" if setup.num_servers == 1 else "servers are"
    standby_s = max((each.standby_s for each in shards), default=0.0)
    notable_s = SERVER_PART * (seconds["pull"] + seconds["push"])
    if standby_s >= max(server_s, notable_s) > 0:
        return "standbys", (
            f"{waits}, most of it until standbys have carried out the pushes: bound by "
            f"replication; {_quicker_standbys(setup)}{_overlapping(setup)}"
        )
    if server_s >= notable_s:
        return "servers", (
            f"{waits}, and {they_are} busy for up to {busiest:.0%} of the time: server-bound; add "
            f"{setup.num_servers} (scaling.num_servers), or give each more CPUs "
            "(scaling.resources_per_server)"
        )
    if set(setup.lanes) == {"shm"}:
        return "memory", (
            f"{waits} in this host's memory, and {they_are} busy for at most {busiest:.0%}: bound "
            "by copying; push less often (a larger data.batch_size, "
            f"training.accumulate_grad_batches){_overlapping(setup)}"
        )
    return "network", (
        f"{waits}, and {they_are} busy for at most {busiest:.0%}: network-bound; "
        f"{_narrower(setup)}{_overlapping(setup)}"
    )


def _more_servers(setup: Setup) -> str:
    servers = "server" if setup.num_servers == 1 else "servers"
    return f"add {setup.num_servers} {servers} on other nodes (scaling.num_servers)"


def _quicker_standbys(setup: Setup) -> str:
    mends = [_more_servers(setup)]
    if setup.push == "float32":
        mends.append("push bf16 (wire.push)")
    return ", ".join([*mends, "or train without standbys (scaling.replicas = 0)"])


def _narrower(setup: Setup) -> str:
    mends = [_more_servers(setup)]
    if setup.pull == "float32":
        mends.append("pull bf16 (wire.pull)")
    if setup.push == "float32":
        mends.append("push bf16 (wire.push)")
    return ", ".join(mends)


def _overlapping(setup: Setup) -> str:
    may = setup.mode == "async" and not setup.overlap
    return ", or let it run beside the computation (pipeline.overlap)" if may else ""
