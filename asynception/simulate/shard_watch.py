"""What one shard must hold at every step, worked out beside it from its pushes alone."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from asynception.simulate.pace_watch import PaceWatch
from asynception.simulate.scenario import Scenario
from asynception.simulate.world import Violation
from ps.messages import WorkerSequences
from ps.push import Push
from ps.shard import Outcome, Receipt, ShardState
from ps.snapshot import Snapshot

Counts = npt.NDArray[np.int64]
"""By position of a sample."""

LifeKey = tuple[int, int]
"""Worker, incarnation."""

Key = tuple[int, int, int]
"""Worker, incarnation, sequence."""

Newest = dict[LifeKey, int]
"""By life, the newest push that is known somewhere."""

TOLERANCE = 0.01
"""Of a parameter where means round; a push moves it by a quarter at least."""

_TAKEN = (Outcome.APPLIED, Outcome.ACCUMULATED)


@dataclass
class Life:
    """What one life of a worker was given: positions of its batches, by push."""

    worker: int
    incarnation: int
    groups: dict[int, list[range]] = field(default_factory=dict)


@dataclass
class Sums:
    """What a shard's parameters and statistics, each of them, must be."""

    parameter: float
    statistic: float


@dataclass
class ShardWatch:
    """One shard of one session."""

    scenario: Scenario
    address: str
    base: Counts
    """How often each sample's push had been settled in the state that was loaded."""
    samples_of: Callable[[Key], Counts]
    version: int = 0
    history: dict[int, Sums] = field(default_factory=dict)
    settled: dict[Key, Outcome] = field(default_factory=dict)
    made: dict[Key, int] = field(default_factory=dict)
    """The version that a push was taken into, or that was next when it was dropped."""
    sent: dict[Key, float] = field(default_factory=dict)
    num_expected: int = 0
    """The newest word of who is at work."""
    num_operations: int = 0
    """Of its log, that any of its servers has carried out."""
    checksums: dict[int, int] = field(default_factory=dict)
    """By version, as the first of its servers had it."""
    is_over: bool = False
    """Whether its session is: what is left of that may go on, and nobody notes what is sent."""
    _pending: list[tuple[int, float, float]] = field(default_factory=list)
    _pending_keys: list[Key] = field(default_factory=list)

    def __post_init__(self) -> None:
        policy = self.scenario.config.consistency
        num_workers = self.scenario.config.scaling.max_workers
        self.pace = PaceWatch(policy.max_lead, num_workers)

    @property
    def summed_workers(self) -> set[int]:
        """Whose pushes are in the sum for the next version."""
        return {worker for worker, _, _ in self._pending_keys}

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise Violation(f"{self.address}: {what}")

    def load(self, state: ShardState) -> None:
        """The shard begins with a state."""
        self._check(not self.settled, "a state was loaded over updates")
        parameter, statistic = (state.vectors[n] for n in ("parameters", "statistics"))
        self.version = state.clocks.updates
        self.history = {self.version: Sums(parameter[0].item(), statistic[0].item())}

    def send(self, push: Push) -> None:
        """A worker begins, or begins again, to send a push."""
        key, value = _key(push), push.gradient[0].item()
        self._check(_is_constant(push.gradient), f"push {key} leaves unfinished")
        if not np.isnan(value):
            same = self.sent.setdefault(key, value) == value
            self._check(same, f"push {key} is sent again as another one")

    def settle(self, push: Push, value: float, delta: float, receipt: Receipt) -> None:
        """The shard has given a receipt. value, delta: of each element as it was staged."""
        key, outcome = _key(push), receipt.outcome
        if key in self.settled or outcome is Outcome.FENCED:
            return
        self.settled[key] = outcome
        if not np.isnan(value) and not self.is_over:
            self._check(self.sent.get(key) == value, f"push {key} arrived damaged")
        if outcome in _TAKEN:
            self._pending.append((push.num_samples, value, delta))
            self._pending_keys.append(key)
        else:
            self.made[key] = self.version + 1
        if outcome is Outcome.APPLIED:
            self._apply(receipt.lr, receipt.staleness)
        self.pace.settle(push.worker, push.incarnation)

    def expect(self, workers: Collection[int], version: int) -> None:
        """The shard was told who is at work, and is at a version now."""
        self.pace.expect(workers)
        if version > self.version:
            self._check(bool(self._pending), "a version was made of nothing")
            self._apply(self.scenario.config.schedule.lr, 0)

    def _apply(self, lr: float, staleness: int) -> None:
        now, config = self.history[self.version], self.scenario.config
        total = sum(count for count, _, _ in self._pending)
        gradient = sum(count * value for count, value, _ in self._pending) / total
        delta = sum(count * change for count, _, change in self._pending) / total
        lr = config.consistency.server_lr(lr, config.scaling.max_workers, staleness)
        self.version += 1
        self.made.update(dict.fromkeys(self._pending_keys, self.version))
        self._pending.clear()
        self._pending_keys.clear()
        self.history[self.version] = Sums(now.parameter - lr * gradient, now.statistic + delta)

    def check_newest(self, snapshot: Snapshot) -> None:
        """After each call that may change the shard."""
        self._check(
            snapshot.version == self.version,
            f"version {snapshot.version} after {self.version - min(self.history)} updates",
        )
        self.check_version(self.version, snapshot.parameters, snapshot.statistics)

    def check_version(self, version: int, parameters: Tensor, statistics: Tensor) -> None:
        """These must be what all pushes up to a version make, throughout."""
        self._check(version in self.history, f"there never was a version {version}")
        expected = self.history[version]
        pairs = ((parameters, expected.parameter), (statistics, expected.statistic))
        for vector, value in pairs:
            found = vector[0].item()
            self._check(_is_constant(vector), f"version {version} is torn: {vector.tolist()}")
            near = found == value if self.scenario.exact else abs(found - value) <= TOLERANCE
            self._check(near, f"version {version} holds {found} instead of {value}")
        if not self.scenario.exact:  # rounding doesn't add up
            self.history[version] = Sums(parameters[0].item(), statistics[0].item())

    def check_same(self, version: int, checksum: int) -> None:
        """All servers of the shard are the same at a version, to the last bit."""
        same = self.checksums.setdefault(version, checksum) == checksum
        self._check(same, f"its servers differ at version {version}")

    def acknowledged(self, push: Push, receipt: Receipt) -> None:
        """A worker has a receipt."""
        key = _key(push)
        if receipt.outcome is not Outcome.FENCED:
            found = self.settled.get(key)
            self._check(
                found is receipt.outcome, f"push {key}: receipt {receipt.outcome}, was {found}"
            )

    def counts(self, sequences: WorkerSequences | None = None) -> Counts:
        """How often each sample's push is settled: in all, or in a state with these sequences."""
        counts = self.base.copy()
        for key in self.settled:
            worker, incarnation, sequence = key
            known = sequences is None or sequence <= sequences.get(worker, {}).get(incarnation, -1)
            if known:
                counts += self.samples_of(key)
        return counts

    def counts_at(self, version: int) -> Counts:
        """How often each sample's push is in a version, or was dropped before it."""
        counts = self.base.copy()
        for key, made in self.made.items():
            if made <= version:
                counts += self.samples_of(key)
        return counts

    def newest_at(self, version: int) -> Newest:
        """By life, the newest push that is in a version, or was dropped before it."""
        return _newest(key for key, made in self.made.items() if made <= version)

    def newest(self) -> Newest:
        """By life, the newest push that was settled, but for those in the sum."""
        before = {(worker, life): last - 1 for worker, life, last in self._pending_keys}
        return _newest(self.settled) | before

    def counts_without_sum(self) -> Counts:
        """How often each sample's push is in the present version, or was dropped.

        What was dropped after a push of the same life that is in the sum is done again with it.
        """
        counts, newest = self.base.copy(), self.newest()
        for key, outcome in self.settled.items():
            worker, incarnation, sequence = key
            is_known = outcome in _TAKEN or sequence <= newest[worker, incarnation]
            if key in self.made and is_known:
                counts += self.samples_of(key)
        return counts

    def check_end(self) -> None:
        """Nothing may be left over."""
        self._check(not self._pending, f"{self._pending_keys} were accumulated and never applied")


def _newest(keys: Iterable[Key]) -> Newest:
    newest: Newest = {}
    for worker, incarnation, sequence in keys:
        life = worker, incarnation
        newest[life] = max(newest.get(life, -1), sequence)
    return newest


def _key(push: Push) -> Key:
    return push.worker, push.incarnation, push.sequence


def _is_constant(vector: Tensor) -> bool:
    values = vector.numpy()
    first = values[0]
    return bool(np.isnan(values).all() if np.isnan(first) else (values == first).all())
