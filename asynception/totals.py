"""Running totals of what workers report, and staleness as a distribution."""

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from ps.receipts import Outcome
from worker.step_report import StepReport

K = TypeVar("K", int, str)
V = TypeVar("V")

PHASES = ("data", "pull", "compute", "push")
"""Where a worker's time goes."""


@dataclass
class Totals:
    """Sums since the run began. Receipts count each shard's answer to each push."""

    pushes: int = 0
    losses: int = 0
    """Pushes whose loss was finite, which `loss_sum` adds up."""
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    corrupt: set[str] = field(default_factory=set)
    """Keys of images that did not decode, each once however many epochs met it."""
    lost: Counter[str] = field(default_factory=Counter)
    """Samples left out because their shard couldn't be had, by shard, in all epochs."""
    leases: int = 0
    samples_returned: int = 0
    """Samples that workers which died left, to be handed out again."""
    samples_twice: int = 0
    """Of those, and of what is done again after a server was lost or from a checkpoint, the samples
    whose push some shards, but not all, had taken already."""
    updates_lost: Counter[int] = field(default_factory=Counter)
    """By shard, updates that were lost with its server, while the other shards kept theirs."""
    rollbacks: int = 0
    """How often the run went back to a good checkpoint after it had diverged."""
    lr: float = 0.0
    """Of the last receipt."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Receipts by outcome."""
    staleness: Counter[int] = field(default_factory=Counter)
    """Receipts by staleness, in versions; of work that was kept alone."""
    worker_staleness: Counter[tuple[int, int]] = field(default_factory=Counter)
    """The same by worker and `bucket` of the staleness."""
    shard_staleness: Counter[tuple[int, int]] = field(default_factory=Counter)
    """The same by shard and bucket."""
    lanes: Counter[str] = field(default_factory=Counter)
    """Receipts by the lane that the shard was reached by."""
    phases_s: Counter[str] = field(default_factory=Counter)
    """Seconds of all workers by phase."""
    worker_phases_s: Counter[tuple[int, str]] = field(default_factory=Counter)
    """The same by worker and phase."""
    worker_pushes: Counter[int] = field(default_factory=Counter)
    """Pushes by worker."""
    worker_samples: Counter[int] = field(default_factory=Counter)
    """Samples in those pushes, by worker."""
    shard_lanes: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Receipts by shard and the lane that it was reached by."""

    def add(self, step: StepReport, worker: int) -> None:
        """Count what a worker reports of one push."""
        self.corrupt.update(step.corrupt_keys)
        self.lost.update(step.lost)
        durations = (step.data_s, step.pull_s, step.compute_s, step.push_s)
        seconds = dict(zip(PHASES, durations, strict=True))
        self.phases_s.update(seconds)
        self.worker_phases_s.update({(worker, name): s for name, s in seconds.items()})
        if step.gradient is None:
            return
        self.pushes += 1
        self.worker_pushes[worker] += 1
        self.worker_samples[worker] += step.num_samples
        self.lanes.update(step.lanes)
        self.shard_lanes.update(enumerate(step.lanes))
        if math.isfinite(step.gradient.loss) and math.isfinite(step.gradient.norm):
            self.losses += 1
            self.loss_sum += step.gradient.loss
            self.norm_sum += step.gradient.norm
        for shard, receipt in enumerate(step.receipts):
            self.lr = receipt.lr
            self.outcomes[receipt.outcome.value] += 1
            if receipt.outcome in (Outcome.APPLIED, Outcome.ACCUMULATED):
                self.staleness[receipt.staleness] += 1
                self.worker_staleness[worker, bucket(receipt.staleness)] += 1
                self.shard_staleness[shard, bucket(receipt.staleness)] += 1

    def copy(self) -> Self:
        """These totals as they are now."""
        kept = {name: copy.copy(value) for name, value in vars(self).items()}
        return type(self)(**kept)

    def since(self, earlier: Self) -> "Totals":
        """What came after `earlier`, a copy of these totals taken before."""
        return Totals(
            self.pushes - earlier.pushes,
            self.losses - earlier.losses,
            self.loss_sum - earlier.loss_sum,
            self.norm_sum - earlier.norm_sum,
            self.corrupt - earlier.corrupt,
            self.lost - earlier.lost,
            self.leases - earlier.leases,
            self.samples_returned - earlier.samples_returned,
            self.samples_twice - earlier.samples_twice,
            self.updates_lost - earlier.updates_lost,
            self.rollbacks - earlier.rollbacks,
            self.lr,
            self.outcomes - earlier.outcomes,
            self.staleness - earlier.staleness,
            self.worker_staleness - earlier.worker_staleness,
            self.shard_staleness - earlier.shard_staleness,
            self.lanes - earlier.lanes,
            self.phases_s - earlier.phases_s,
            self.worker_phases_s - earlier.worker_phases_s,
            self.worker_pushes - earlier.worker_pushes,
            self.worker_samples - earlier.worker_samples,
            self.shard_lanes - earlier.shard_lanes,
        )

    @property
    def mean_loss(self) -> float:
        """NaN if no push had a finite loss."""
        return self.loss_sum / self.losses if self.losses else math.nan

    @property
    def mean_norm(self) -> float:
        """Of the gradients before clipping; NaN if none was finite."""
        return self.norm_sum / self.losses if self.losses else math.nan

    @property
    def dropped(self) -> int:
        """Receipts that said that the work is lost."""
        kept = (Outcome.APPLIED, Outcome.ACCUMULATED)
        return sum(self.outcomes.values()) - sum(self.outcomes[each.value] for each in kept)

    def to_json(self) -> dict[str, Any]:
        staleness = {str(value): count for value, count in sorted(self.staleness.items())}
        return vars(self) | {
            "corrupt": sorted(self.corrupt),
            "lost": dict(self.lost),
            "updates_lost": {str(shard): count for shard, count in self.updates_lost.items()},
            "outcomes": dict(self.outcomes),
            "staleness": staleness,
            "worker_staleness": _nested(self.worker_staleness),
            "shard_staleness": _nested(self.shard_staleness),
            "lanes": dict(self.lanes),
            "phases_s": dict(self.phases_s),
            "worker_phases_s": _nested(self.worker_phases_s),
            "worker_pushes": dict(self.worker_pushes),
            "worker_samples": dict(self.worker_samples),
            "shard_lanes": _nested(self.shard_lanes),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        staleness = Counter({int(key): count for key, count in values["staleness"].items()})
        counters = {
            "corrupt": set(values["corrupt"]),
            "lost": Counter(values["lost"]),
            "updates_lost": Counter(
                {int(shard): count for shard, count in values.get("updates_lost", {}).items()}
            ),
            "outcomes": Counter(values["outcomes"]),
            "staleness": staleness,
            "worker_staleness": _flat(values.get("worker_staleness", {}), int),
            "shard_staleness": _flat(values.get("shard_staleness", {}), int),
            "lanes": Counter(values.get("lanes", {})),
            "phases_s": Counter(values["phases_s"]),
            "worker_phases_s": _flat(values.get("worker_phases_s", {}), str),
            "worker_pushes": _by_number(values.get("worker_pushes", {})),
            "worker_samples": _by_number(values.get("worker_samples", {})),
            "shard_lanes": _flat(values.get("shard_lanes", {}), str),
        }
        return cls(**{**values, **counters})


def bucket(staleness: int) -> int:
    """The least value that is counted together with this one: from 16 on, up to twice as much.

    So a histogram of each of a thousand workers is short.
    """
    return staleness if staleness < 16 else 1 << (staleness.bit_length() - 1)


def histograms(counts: Mapping[tuple[int, K], V]) -> dict[int, dict[K, V]]:
    """Counts by (who, value) as a histogram for each, in order."""
    found: dict[int, dict[K, V]] = {}
    for who, value in sorted(counts):
        found.setdefault(who, {})[value] = counts[who, value]
    return found


def _nested(counts: Mapping[tuple[int, K], V]) -> dict[str, dict[str, V]]:
    return {
        str(who): {str(value): count for value, count in histogram.items()}
        for who, histogram in histograms(counts).items()
    }


def _flat(nested: Mapping[str, Mapping[str, Any]], kind: type[K]) -> Counter[tuple[int, K]]:
    return Counter(
        {
            (int(who), kind(value)): count
            for who, histogram in nested.items()
            for value, count in histogram.items()
        }
    )


def _by_number(counts: Mapping[str, int]) -> Counter[int]:
    return Counter({int(who): count for who, count in counts.items()})


@dataclass(frozen=True)
class Progress:
    """How far a run is, as the coordinator knows it."""

    num_consumed: int
    """Samples whose pushes are settled, since the run began."""
    totals: Totals
    silent_s: Mapping[int, float] = field(default_factory=dict)
    """By living worker, seconds since it was last heard of."""
    finished: bool = False
    num_published: int = 0
    """Samples of the state that workers sent to the servers, where these take no pushes."""
    coordinator_deaths: int = 0
    """How often the coordinator of this session died, and another went on from its journal."""
    num_wanted: int | None = None
    """Workers that the run is to have now, if it is known."""


def staleness_summary(histogram: Mapping[int, int]) -> dict[str, float]:
    """Mean, p50, p99 (nearest rank) and max of a histogram, in versions; zeros if empty."""
    count = sum(histogram.values())
    if count == 0:
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0, "max": 0.0}
    mean = sum(value * n for value, n in histogram.items()) / count
    ranks = {"p50": math.ceil(0.5 * count), "p99": math.ceil(0.99 * count), "max": count}
    return {"mean": mean} | {name: float(_at(histogram, rank)) for name, rank in ranks.items()}


def _at(histogram: Mapping[int, int], rank: int) -> int:
    """The value at a rank, counted from 1."""
    seen = 0
    for value, count in sorted(histogram.items()):
        seen += count
        if seen >= rank:
            return value
    raise AssertionError("rank beyond the histogram")
