"""One shard as a state machine: pull, push -> receipt.

It knows no Ray, gRPC, socket or clock; what it does follows from the order of calls alone. The
caller serialises `push`, `fence`, `capture` and `load`; `pin` and `release` may come from any
thread at any time.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from ps.consistency import Policy
from ps.gathering import Gathered, Gathering
from ps.layout import Range, ShardRanges
from ps.push import Push
from ps.rules import Ema, Rule, apply_rule, plan_blocks
from ps.schedule import Clocks, Horizon, Schedule
from ps.snapshot import Allocate, Snapshot, Snapshots

RECEIPTS_KEPT = 16
"""Receipts remembered for each worker: more than the pushes it can have under way at once."""


class ForgottenReceipt(LookupError):
    """A push repeats a sequence so old that its receipt is no longer kept; nothing was changed."""


class Outcome(Enum):
    """What a shard did with a push. What was dropped is lost work, which is counted."""

    APPLIED = "applied"
    """A new version was made of it, and of what had been accumulated."""
    ACCUMULATED = "accumulated"
    """In the sum of which the next version will be made."""
    STALE = "stale"
    """Dropped: older than the policy's bound, or too late for its version."""
    NOT_FINITE = "not_finite"
    """Dropped: NaN or Inf in the gradient or the BN deltas."""
    FENCED = "fenced"
    """Dropped: from a life of the worker that has been declared dead."""


@dataclass(frozen=True)
class ShardConfig:
    """All that a shard needs besides its first state."""

    ranges: ShardRanges
    rule: Rule
    schedule: Schedule
    horizon: Horizon
    ema: Ema
    policy: Policy

    def vector_numels(self) -> dict[str, int]:
        """Names of a state's vectors, and how many elements each has at this shard."""
        return {n: vector_range(self.ranges, n).numel for n in vector_names(self.rule)}


def vector_range(ranges: ShardRanges, vector: str) -> Range:
    """Which part of the whole flat vector of this name a shard holds."""
    return ranges.statistics if vector.endswith("statistics") else ranges.parameters


def vector_names(rule: Rule) -> tuple[str, ...]:
    """The vectors of a state, in the order in which they travel."""
    slots = (f"slot.{name}" for name in rule.slots)
    return ("parameters", "statistics", "ema", "ema_statistics", *slots)


@dataclass(frozen=True)
class Receipt:
    """What was done with a push: the version and learning rate it met, and its staleness."""

    outcome: Outcome
    version: int
    staleness: int
    lr: float


@dataclass
class WorkerRecord:
    """What a shard remembers of a worker, so that each push is applied at most once."""

    incarnation: int = 0
    last_sequences: dict[int, int] = field(default_factory=dict)
    """Newest sequence of each incarnation that ever pushed here."""
    receipts: OrderedDict[int, Receipt] = field(default_factory=OrderedDict)
    """Of the present incarnation, by sequence; the newest RECEIPTS_KEPT."""

    def enter(self, incarnation: int) -> None:
        if incarnation > self.incarnation:
            self.incarnation = incarnation
            self.receipts.clear()

    def with_fence(self) -> dict[int, int]:
        """`last_sequences`, and -1 for the present life if it has pushed nothing yet."""
        return {self.incarnation: -1, **self.last_sequences}

    def note(self, sequence: int, receipt: Receipt) -> None:
        self.last_sequences[self.incarnation] = sequence
        self.receipts[sequence] = receipt
        while len(self.receipts) > RECEIPTS_KEPT:
            self.receipts.popitem(last=False)


@dataclass(frozen=True)
class ShardState:
    """A copy of a shard at one version.

    `vectors` are flat: "parameters", "statistics", "ema", "ema_statistics" and "slot.NAME".
    `last_sequences` maps worker and incarnation to the newest push that is in the state; -1 stands
    for a life that has pushed nothing yet, but before which all earlier ones are fenced.
    """

    clocks: Clocks
    vectors: Mapping[str, Tensor]
    last_sequences: Mapping[int, Mapping[int, int]] = field(default_factory=dict)


def initial_state(rule: Rule, parameters: Tensor, statistics: Tensor) -> ShardState:
    """The state that training starts from: the EMA at the parameters, slots at their first values.

    `parameters` and `statistics` may be a shard's range or the whole flat vectors.
    """
    slots = {f"slot.{n}": torch.full_like(parameters, v) for n, v in rule.slots.items()}
    averages = {"ema": parameters.clone(), "ema_statistics": statistics.clone()}
    return ShardState(
        Clocks(), {"parameters": parameters, "statistics": statistics, **averages, **slots}
    )


class Shard:
    """A range of the parameters with its optimizer slots, EMA, version and receipts."""

    def __init__(
        self, config: ShardConfig, state: ShardState, allocate: Allocate | None = None
    ) -> None:
        """Takes copies of the vectors of `state`, which must have the lengths of `config`.

        allocate: float32 memory for what is pulled; private memory of the state's dtype unless
        given.
        """
        self.config = config
        self._blocks = plan_blocks(config.ranges.parameters.numel, config.ranges.decayed)
        self._records: dict[int, WorkerRecord] = {}
        self._gathering = Gathering()
        self._at_work: Collection[int] = range(config.horizon.num_workers)
        self._clocks = state.clocks
        self.settled: Counter[Outcome] = Counter()
        """Pushes settled since this object was made, by outcome."""
        for worker, sequences in state.last_sequences.items():
            settled = {life: sequence for life, sequence in sequences.items() if sequence >= 0}
            self._records[worker] = WorkerRecord(max(sequences, default=0), settled)
        vectors = {name: self._own(name, vector) for name, vector in state.vectors.items()}
        pulled = (vectors.pop("parameters"), vectors.pop("statistics"))
        allocate = allocate or partial(torch.empty, dtype=pulled[0].dtype)
        first = Snapshot.copy_of(state.clocks.updates, *pulled, allocate)
        self._snapshots = Snapshots(first, allocate)
        self._ema = vectors.pop("ema")
        self._ema_statistics = vectors.pop("ema_statistics")
        self._slots = [vectors.pop(f"slot.{name}") for name in config.rule.slots]
        assert not vectors, f"unknown vectors {sorted(vectors)}"

    def _own(self, name: str, vector: Tensor) -> Tensor:
        assert vector.shape == (vector_range(self.config.ranges, name).numel,), name
        return vector.clone()

    @property
    def clocks(self) -> Clocks:
        return self._clocks

    @property
    def version(self) -> int:
        """Updates applied; what pulls and receipts speak of."""
        return self._clocks.updates

    @property
    def num_buffers(self) -> int:
        """Parameter buffers in existence (the newest, pinned ones, spares)."""
        return self._snapshots.num_buffers

    def pin(self) -> Snapshot:
        """The newest version, which stays as it is until `release`."""
        return self._snapshots.pin()

    def release(self, snapshot: Snapshot) -> None:
        """Give back what `pin` returned."""
        self._snapshots.release(snapshot)

    def push(self, push: Push) -> Receipt:
        """Apply a push at most once; a retry gets the first receipt. Uses up `push.gradient`.

        Raises ForgottenReceipt.
        """
        record = self._records.setdefault(push.worker, WorkerRecord())
        if push.incarnation < record.incarnation:
            self.settled[Outcome.FENCED] += 1
            return self._receipt(Outcome.FENCED, push)
        record.enter(push.incarnation)
        if push.sequence <= record.last_sequences.get(push.incarnation, -1):
            return self._first_receipt(record, push)
        receipt = self._receipt(self._judge(push), push)
        self._take(push, receipt)
        record.note(push.sequence, receipt)
        self.settled[receipt.outcome] += 1
        return receipt

    def _first_receipt(self, record: WorkerRecord, push: Push) -> Receipt:
        if push.sequence not in record.receipts:
            raise ForgottenReceipt(
                f"push {push.sequence} of worker {push.worker}, incarnation {push.incarnation}"
            )
        return record.receipts[push.sequence]

    def _receipt(self, outcome: Outcome, push: Push) -> Receipt:
        lr = self.config.schedule.rate(self._clocks, self.config.horizon)
        return Receipt(outcome, self.version, self.version - push.pulled_version, lr)

    def _judge(self, push: Push) -> Outcome:
        if not (_is_finite(push.gradient) and _is_finite(push.statistics_delta)):
            return Outcome.NOT_FINITE
        if not self.config.policy.admits(self.version - push.pulled_version):
            return Outcome.STALE
        if push.worker in self._gathering:  # an earlier life of it was quicker
            return Outcome.STALE
        is_last = self._is_enough({*self._gathering.sequences, push.worker})
        return Outcome.APPLIED if is_last else Outcome.ACCUMULATED

    def _is_enough(self, workers: Collection[int]) -> bool:
        """Whether gradients of these workers make a version: N, or all that can still come."""
        wanted = self.config.policy.pushes_per_update(self.config.horizon.num_workers)
        return len(workers) >= wanted or all(worker in workers for worker in self._at_work)

    def _take(self, push: Push, receipt: Receipt) -> None:
        if receipt.outcome is Outcome.ACCUMULATED:
            self._gathering.add(push)
        elif receipt.outcome is Outcome.APPLIED and len(self._gathering):
            self._gathering.add(push)
            self._apply(self._gathering.take(), receipt.lr)
        elif receipt.outcome is Outcome.APPLIED:
            self._apply(push, receipt.lr)

    def expect(self, workers: Collection[int]) -> None:
        """Only these workers are still at work: no version waits for another's gradient.

        If none of them is missing from the sum, what is in it makes the next version at once.
        """
        self._at_work = workers
        if len(self._gathering) and self._is_enough(self._gathering.sequences):
            rate = self.config.schedule.rate(self._clocks, self.config.horizon)
            self._apply(self._gathering.take(), rate)
            # Every version has one push that counts as applied; here no receipt said so.
            self.settled[Outcome.ACCUMULATED] -= 1
            self.settled[Outcome.APPLIED] += 1

    def _apply(self, work: Push | Gathered, lr: float) -> None:
        now, after = self._snapshots.newest, self._snapshots.next_buffer()
        decay = self.config.ema.rate(self.version)
        apply_rule(
            self.config.rule,
            self._blocks,
            now.parameters,
            after.parameters,
            work.gradient,
            self._slots,
            self._ema,
            self.config.policy.server_lr(lr, self.config.horizon.num_workers),
            decay,
            self.version,
        )
        torch.add(now.statistics, work.statistics_delta, out=after.statistics)
        self._ema_statistics.lerp_(after.statistics, 1 - decay)
        clocks = self._clocks
        self._clocks = Clocks(clocks.updates + 1, clocks.samples + work.num_samples)
        self._snapshots.publish(after, self.version)

    def fence(self, worker: int, incarnation: int) -> Mapping[int, int]:
        """Refuse all pushes of the worker's lives before `incarnation` from now on.

        Returns the newest sequence of each of its lives that is settled here; after this call
        those of lives before `incarnation` never change, so that a dead worker's work is counted
        exactly, even if its process still runs somewhere.
        """
        record = self._records.setdefault(worker, WorkerRecord())
        record.enter(incarnation)
        return dict(record.last_sequences)

    def capture(self, names: Sequence[str] | None = None) -> ShardState:
        """A copy of the state at this version; only the named vectors, if given.

        What is accumulated for the next version is not in it, nor counted in its sequences.
        """
        newest = self._snapshots.newest
        averages = (self._ema, self._ema_statistics)
        held = (newest.parameters, newest.statistics, *averages, *self._slots)
        vectors = dict(zip(vector_names(self.config.rule), held, strict=True))
        chosen = vectors if names is None else {name: vectors[name] for name in names}
        copies = {name: vector.clone() for name, vector in chosen.items()}
        lives = {worker: record.with_fence() for worker, record in self._records.items()}
        for worker, (incarnation, sequence) in self._gathering.sequences.items():
            lives[worker][incarnation] = sequence - 1
        return ShardState(self._clocks, copies, lives)

    def last_sequences(self) -> dict[int, dict[int, int]]:
        """The newest settled sequence of each life of each worker."""
        return {worker: dict(record.last_sequences) for worker, record in self._records.items()}


def _is_finite(vector: Tensor) -> bool:
    """Exact, in one pass and without a temporary: aminmax hands on both NaN and Inf."""
    if vector.numel() == 0:
        return True
    low, high = torch.aminmax(vector)
    return bool(torch.isfinite(low) & torch.isfinite(high))
