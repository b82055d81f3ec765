"""What must hold at every step and at the end, worked out beside the run from its pushes alone."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from asynception.ledger import Position
from asynception.salvage import Remains
from asynception.simulate.pace_watch import PaceWatch
from asynception.simulate.scenario import Scenario
from asynception.simulate.wait_watch import WaitWatch
from asynception.simulate.world import Violation
from asynception.totals import Totals
from ps.messages import WorkerSequences
from ps.push import Push
from ps.shard import Outcome, Receipt, ShardState
from ps.snapshot import Snapshot

Counts = npt.NDArray[np.int64]
"""By position of a sample."""

Key = tuple[int, int, int]
"""Worker, incarnation, sequence."""

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
    """The version that a push was taken into."""
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
        """How often each sample's push is in a version, or was dropped before now."""
        counts = self.base.copy()
        for key, outcome in self.settled.items():
            if outcome not in _TAKEN or self.made.get(key, self.version + 1) <= version:
                counts += self.samples_of(key)
        return counts

    def accumulated(self) -> Counts:
        """How often each sample's push is in the sum for the next version."""
        counts = np.zeros_like(self.base)
        for key in self._pending_keys:
            counts += self.samples_of(key)
        return counts

    def check_end(self) -> None:
        """Nothing may be left over."""
        self._check(not self._pending, f"{self._pending_keys} were accumulated and never applied")


@dataclass
class Saved:
    """What was known when a checkpoint was written."""

    counts: Sequence[Counts]
    """By shard."""
    declared: Counts
    samples_twice: int
    updates_lost: Counter[int]
    """By shard."""


class Watch:
    """The whole run."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.session = -1
        self.shards: dict[str, ShardWatch] = {}
        """By the address where each is served first, in order."""
        self._servers: dict[str, ShardWatch] = {}
        """By the address of each server that has the shard, or is a standby."""
        self.waits = WaitWatch()
        self.lives: dict[tuple[int, int], Life] = {}
        self._zeros = np.zeros(scenario.total_samples, np.int64)
        self._begin = Saved(
            [self._zeros] * scenario.config.scaling.num_servers, self._zeros.copy(), 0, Counter()
        )
        self.declared = self._zeros.copy()
        """How many times each sample may have been trained on too often."""
        self.samples_twice = 0
        self.updates_lost = Counter[int]()
        self.num_checkpoints = self.num_settled = self.num_salvages = 0

    def begin_session(self, origin: Saved | None, position: Position) -> None:
        """Shards start anew from a checkpoint's state, or from nothing."""
        self.session += 1
        self._begin = origin or Saved(
            [self._zeros] * self.scenario.config.scaling.num_servers,
            self._zeros.copy(),
            0,
            Counter(),
        )
        self.num_settled += sum(len(shard.settled) for shard in self.shards.values())
        for shard in self.shards.values():
            shard.is_over = True
        self.shards, self._servers, self.lives = {}, {}, {}
        most = np.max(np.stack(list(self._begin.counts)), axis=0)
        # What only some shards had at the cut is handed out again.
        self.declared = np.where(
            self._open(position), np.maximum(self._begin.declared, most), self._begin.declared
        )
        self.samples_twice = self._begin.samples_twice
        self.updates_lost = self._begin.updates_lost.copy()

    def add_server(self, address: str, shard: int) -> ShardWatch:
        """A server starts; the first one of a shard has it, later ones are its standbys."""
        if shard < len(self.shards):
            watch = list(self.shards.values())[shard]
        else:
            watch = ShardWatch(self.scenario, address, self._begin.counts[shard], self._samples_of)
            self.shards[address] = watch
        self._servers[address] = watch
        return watch

    def at(self, address: str) -> ShardWatch | None:
        """The shard that a server has; None for one of a session that is over."""
        return self._servers.get(address)

    def _samples_of(self, key: Key) -> Counts:
        worker, incarnation, sequence = key
        counts = self._zeros.copy()
        for positions in self.lives[worker, incarnation].groups.get(sequence, []):
            counts[positions.start : positions.stop] += 1
        return counts

    def bury(self, worker: int, incarnation: int, sequences: range) -> int:
        """Pushes of a dead life that some shards have, and not all. Returns their samples."""
        life = self.lives.get((worker, incarnation))
        groups = [life.groups.get(sequence, []) for sequence in sequences] if life else []
        num_samples = 0
        for positions in (each for group in groups for each in group):
            self.declared[positions.start : positions.stop] += 1
            num_samples += len(positions)
        self.samples_twice += num_samples
        return num_samples

    def _open(self, position: Position) -> npt.NDArray[np.bool_]:
        """What a position says is yet to be trained on."""
        is_open = np.arange(self.scenario.total_samples) >= position.frontier
        for lease in position.open:
            is_open[lease.start : lease.stop] = True
        return is_open

    def save(self, position: Position, states: Sequence[ShardState], samples_twice: int) -> Saved:
        """A checkpoint is written of these states. `samples_twice`: as of when it was asked for."""
        self.num_checkpoints += 1
        shards = list(self.shards.values())
        counts = [
            shard.counts(state.last_sequences) for shard, state in zip(shards, states, strict=True)
        ]
        for shard, state in zip(shards, states, strict=True):
            vectors = state.vectors
            shard.check_version(state.clocks.updates, vectors["parameters"], vectors["statistics"])
        self._check_position(position, counts)
        return Saved(counts, self.declared.copy(), samples_twice, self.updates_lost.copy())

    def salvage(self, remains: Remains) -> Saved:
        """A session begins with what is left of this one. Live shards must have lost nothing."""
        self.num_salvages += 1
        shards, copy, counts = list(self.shards.values()), remains.copy, []
        for number, shard in enumerate(shards):
            if number in remains.states:
                state = remains.states[number]
                if state.clocks.updates != shard.version:
                    raise Violation(f"{shard.address} was salvaged without its newest updates")
                vectors = [state.vectors[name] for name in ("parameters", "statistics")]
                shard.check_version(shard.version, *vectors)
                counts.append(shard.counts() - shard.accumulated())
            else:
                shard.check_version(copy.version, copy.parameters, copy.statistics)
                counts.append(shard.counts_at(copy.version))
        others = np.min(np.stack([counts[number] for number in remains.states]), axis=0)
        self._check_position(remains.position, [others])
        lacking = ~self._open(remains.position) & (counts[remains.shard] < 1)
        counts[remains.shard] += lacking  # what is lost is not trained on again
        self._check_lost(remains, [shards[number].version for number in remains.states])
        return Saved(counts, self.declared.copy(), self.samples_twice, self.updates_lost.copy())

    def _check_lost(self, remains: Remains, versions: Sequence[int]) -> None:
        """Said to be lost are the updates by which the copy is behind all others' versions."""
        lost = max(0, min(versions) - remains.copy.version)
        if remains.updates_lost != lost:
            raise Violation(f"{remains.updates_lost} updates are said to be lost, not {lost}")
        if lost:
            self.updates_lost[remains.shard] += lost

    def _check_position(self, position: Position, counts: Sequence[Counts]) -> None:
        is_open, least = self._open(position), np.min(np.stack(list(counts)), axis=0)
        lost = np.flatnonzero(~is_open & (least < 1) & ~self._corrupt())
        if lost.size:
            raise Violation(f"a checkpoint's position counts {lost.tolist()}, its state doesn't")
        again = np.flatnonzero(is_open & (least > self.declared))
        if again.size:
            raise Violation(f"a checkpoint's state holds {again.tolist()}, to be done again")

    def _corrupt(self) -> npt.NDArray[np.bool_]:
        corrupt = np.zeros(self.scenario.total_samples, bool)
        corrupt[list(self.scenario.corrupt)] = True
        return corrupt

    def check_twice(self, totals: Totals) -> None:
        """The coordinator counts these at this moment."""
        if totals.samples_twice != self.samples_twice:
            raise Violation(f"samples_twice = {totals.samples_twice}, not {self.samples_twice}")

    def check_end(self, totals: Totals) -> None:
        """The run has come to its end, with these totals."""
        for shard in self.shards.values():
            shard.check_end()
            counts = shard.counts()
            lost = np.flatnonzero((counts < 1) & ~self._corrupt())
            if lost.size:
                raise Violation(f"{shard.address}: {lost.tolist()} were never settled")
            doubled = np.flatnonzero(counts > 1 + self.declared)
            if doubled.size:
                raise Violation(f"{shard.address}: {doubled.tolist()} were counted too often")
        self.check_twice(totals)
        if totals.updates_lost != self.updates_lost:
            raise Violation(f"updates_lost = {totals.updates_lost}, not {self.updates_lost}")
        if self.session == 0:
            self._check_outcomes(totals.outcomes)

    def _check_outcomes(self, outcomes: Mapping[str, int]) -> None:
        for outcome in (Outcome.STALE, Outcome.NOT_FINITE):
            settled = [each for shard in self.shards.values() for each in shard.settled.values()]
            found, said = settled.count(outcome), outcomes.get(outcome.value, 0)
            if found != said:
                raise Violation(f"{found} pushes were {outcome.value}, and {said} are counted")


def _key(push: Push) -> Key:
    return push.worker, push.incarnation, push.sequence


def _is_constant(vector: Tensor) -> bool:
    values = vector.numpy()
    first = values[0]
    return bool(np.isnan(values).all() if np.isnan(first) else (values == first).all())
