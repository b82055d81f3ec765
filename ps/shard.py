"""One shard as a state machine: pull, push -> receipt.

It knows no Ray, gRPC, socket or clock; what it does follows from the order of calls alone. The
caller serialises all calls but `pin` and `release`, which may come from any thread at any time.
"""

import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ps.backups import Backups
from ps.consistency import PULLS_UNDER_WAY
from ps.gathering import Gathered, Gathering
from ps.image import MARKED_PARAMETERS, MARKED_STATISTICS, Image
from ps.pace import Pace
from ps.push import Push
from ps.receipts import (
    RECEIPTS_KEPT,
    ForgottenReceipt,
    Outcome,
    Receipt,
    WorkerRecord,
    newest_pushes,
)
from ps.rules import Compensation, apply_rule, plan_blocks
from ps.schedule import Clocks
from ps.snapshot import Allocate, Snapshot, Snapshots
from ps.state import ShardConfig, ShardState, initial_state, vector_names, vector_range

__all__ = [
    "RECEIPTS_KEPT",
    "ForgottenReceipt",
    "Outcome",
    "Receipt",
    "Shard",
    "ShardConfig",
    "ShardState",
    "initial_state",
    "vector_names",
    "vector_range",
]


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
        self._at_work: Collection[int] = range(config.horizon.num_workers)
        self._clocks = state.clocks
        self.settled: Counter[Outcome] = Counter()
        """Pushes settled since this object was made, by outcome."""
        self.num_uncompensated = 0
        """Pushes applied as they were, because what they were computed from is not kept."""
        self.num_expected = 0
        """The number of the last word of who is at work that was heeded."""
        for worker, sequences in state.last_sequences.items():
            settled = {life: sequence for life, sequence in sequences.items() if sequence >= 0}
            self._records[worker] = WorkerRecord(max(sequences, default=0), settled)
        self._newest_pushes = newest_pushes(self._records)
        vectors = {name: self._own(name, vector) for name, vector in state.vectors.items()}
        pulled = (vectors.pop("parameters"), vectors.pop("statistics"))
        allocate = allocate or partial(torch.empty, dtype=pulled[0].dtype)
        newest = dict(self._newest_pushes)
        first = Snapshot.copy_of(state.clocks.updates, *pulled, newest, allocate)
        self._snapshots = Snapshots(first, allocate)
        self._set_up_policy(pulled[0].dtype)
        self._ema = vectors.pop("ema")
        self._ema_statistics = vectors.pop("ema_statistics")
        self._slots = [vectors.pop(f"slot.{name}") for name in config.rule.slots]
        assert not vectors, f"unknown vectors {sorted(vectors)}"

    def _set_up_policy(self, dtype: torch.dtype) -> None:
        policy = self.config.policy
        self._gathering = Gathering(dtype, policy.in_rank_order)
        keeps = policy.compensation > 0
        self._backups = Backups(self._snapshots, PULLS_UNDER_WAY) if keeps else None
        lead = policy.max_lead
        self._pace = None if lead is None else Pace(self._at_work, lead)
        self._in_step, self._marked_clock = lead == 0, 0
        if self._in_step:
            self._snapshots.mark()

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

    @property
    def num_pins(self) -> int:
        """Readers of parameter buffers at this moment, and versions kept for the policy."""
        return self._snapshots.num_pins

    def may_pull(self, worker: int | None) -> bool:
        """Whether the policy lets this worker go on now; who isn't one always may."""
        return self._pace is None or worker is None or self._pace.may_begin(worker)

    def pin(self, worker: int | None = None) -> Snapshot:
        """The newest version, which stays as it is until `release`.

        For a worker the one that it is to compute from, where workers go in step: that which all
        earlier clocks made. With delay compensation its push will find it here.
        """
        if worker is None or worker not in self._at_work:
            return self._snapshots.pin()
        snapshot = self._snapshots.pin_marked() if self._in_step else self._snapshots.pin()
        if self._backups is not None:
            self._backups.keep(worker, snapshot)
        return snapshot

    def release(self, snapshot: Snapshot) -> None:
        """Give back what `pin` returned."""
        self._snapshots.release(snapshot)

    def takes(self, push: Push) -> bool:
        """Whether a push is new here: not fenced off, and not settled yet.

        Any thread may ask at any time; one that is not new never becomes so.
        """
        record = self._records.get(push.worker)
        return record is None or record.takes(push.incarnation, push.sequence)

    def push(self, push: Push) -> Receipt:
        """Apply a push at most once; a retry gets the first receipt. Uses up `push.gradient`.

        Raises ForgottenReceipt.
        """
        record = self._records.setdefault(push.worker, WorkerRecord())
        if push.incarnation < record.incarnation:
            self.settled[Outcome.FENCED] += 1
            return self._receipt(Outcome.FENCED, push)
        self._begin_life(push.worker, push.incarnation)
        if push.sequence <= record.last_sequences.get(push.incarnation, -1):
            return record.first_receipt(push.worker, push.sequence)
        receipt = self._receipt(self._judge(push), push)
        self._newest_pushes[push.worker] = (push.incarnation, push.sequence)
        with self._compensation(push, receipt) as compensation:
            self._take(push, receipt, compensation)
        record.note(push.sequence, receipt)
        self.settled[receipt.outcome] += 1
        if self._pace is not None and push.worker in self._at_work:
            self._pace.tick(push.worker)
            self._move_mark()
        return receipt

    def _begin_life(self, worker: int, incarnation: int) -> None:
        """Forget what an earlier life of the worker had under way, if this one is new."""
        if self._records.setdefault(worker, WorkerRecord()).enter(incarnation):
            if self._backups is not None:
                self._backups.drop(worker)
            if self._pace is not None:
                self._pace.leave(worker)
                self._move_mark()

    def _move_mark(self) -> None:
        """All workers at work have ended a clock: those of the next compute from what is now."""
        if self._in_step and self._pace is not None and self._pace.floor > self._marked_clock:
            self._marked_clock = self._pace.floor
            self._snapshots.mark()

    def _receipt(self, outcome: Outcome, push: Push) -> Receipt:
        lr = self.config.schedule.rate(self._clocks, self.config.horizon)
        return Receipt(outcome, self.version, self.version - push.pulled_version, lr)

    def _judge(self, push: Push) -> Outcome:
        squares = self._backups is not None
        if not (_is_finite(push.gradient, squares) and _is_finite(push.statistics_delta)):
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

    @contextmanager
    def _compensation(self, push: Push, receipt: Receipt) -> Iterator[Compensation | None]:
        """What corrects this push for its delay, if anything is to; usable in the block."""
        if self._backups is None:
            yield None
            return
        with self._backups.taken(push.worker, push.pulled_version) as pulled:
            stale = receipt.outcome is Outcome.APPLIED and receipt.staleness > 0
            if stale and pulled is None:
                self.num_uncompensated += 1
            weight = self.config.policy.compensation
            yield Compensation(pulled.parameters, weight) if stale and pulled is not None else None

    def _take(self, push: Push, receipt: Receipt, compensation: Compensation | None) -> None:
        if receipt.outcome is Outcome.ACCUMULATED:
            self._gathering.add(push)
        elif receipt.outcome is Outcome.APPLIED and len(self._gathering):
            self._gathering.add(push)
            self._apply(self._gathering.take(), receipt.lr)
        elif receipt.outcome is Outcome.APPLIED:
            self._apply(push, receipt.lr, receipt.staleness, compensation)

    def expect(self, workers: Collection[int]) -> None:
        """Only these workers are still at work: no version and no clock waits for another.

        If none of them is missing from the sum, what is in it makes the next version at once.
        """
        self._at_work = workers
        if self._backups is not None:
            self._backups.keep_only(workers)
        if self._pace is not None:
            self._pace.keep_only(workers)
            self._move_mark()
        if len(self._gathering) and self._is_enough(self._gathering.sequences):
            rate = self.config.schedule.rate(self._clocks, self.config.horizon)
            self._apply(self._gathering.take(), rate)
            # Every version has one push that counts as applied; here no receipt said so.
            self.settled[Outcome.ACCUMULATED] -= 1
            self.settled[Outcome.APPLIED] += 1

    def enter(self, worker: int, incarnation: int, clock: int | None = None) -> int:
        """This life of the worker is at work from now on; returns its clock.

        It begins at `clock`, which must be the same at all shards: the largest that they return
        without one, which is that of the slowest worker at work. Until then it holds nobody up; a
        life that doesn't enter does so with its first push. For one that is over nothing changes.
        """
        record = self._records.setdefault(worker, WorkerRecord())
        if incarnation >= record.incarnation:
            self._begin_life(worker, incarnation)
            self._at_work = {*self._at_work, worker}
            if self._pace is not None:
                clock = self._pace.enter(worker, clock)
                self._move_mark()
                return clock
        return self._pace.floor if self._pace is not None else 0

    def _apply(
        self,
        work: Push | Gathered,
        lr: float,
        staleness: int = 0,
        compensation: Compensation | None = None,
    ) -> None:
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
            self.config.policy.server_lr(lr, self.config.horizon.num_workers, staleness),
            decay,
            self.version,
            None,
            compensation,
        )
        torch.add(now.statistics, work.statistics_delta, out=after.statistics)
        self._ema_statistics.lerp_(after.statistics, 1 - decay)
        clocks = self._clocks
        self._clocks = Clocks(clocks.updates + 1, clocks.samples + work.num_samples)
        after.newest_pushes = dict(self._newest_pushes)
        self._snapshots.publish(after, self.version)

    def fence(self, worker: int, incarnation: int) -> Mapping[int, int]:
        """Refuse all pushes of the worker's lives before `incarnation` from now on.

        Returns the newest sequence of each of its lives that is settled here; after this call
        those of lives before `incarnation` never change, so that a dead worker's work is counted
        exactly, even if its process still runs somewhere. Nobody waits for the worker until its
        new life begins.
        """
        self._begin_life(worker, incarnation)
        return dict(self._records[worker].last_sequences)

    def capture(self, names: Sequence[str] | None = None) -> ShardState:
        """A copy of the state at this version; only the named vectors, if given.

        What is accumulated for the next version is not in it, nor counted in its sequences.
        """
        vectors = self._vectors()
        chosen = vectors if names is None else {name: vectors[name] for name in names}
        copies = {name: vector.clone() for name, vector in chosen.items()}
        lives = {worker: record.with_fence() for worker, record in self._records.items()}
        for worker, (incarnation, sequence) in self._gathering.sequences.items():
            lives[worker][incarnation] = sequence - 1
        return ShardState(self._clocks, copies, lives)

    def _vectors(self) -> dict[str, Tensor]:
        newest = self._snapshots.newest
        averages = (self._ema, self._ema_statistics)
        held = (newest.parameters, newest.statistics, *averages, *self._slots)
        return dict(zip(vector_names(self.config.rule), held, strict=True))

    def checksum(self) -> int:
        """CRC-32 of the vectors of the present version; never 0."""
        checksum = self.version
        for vector in self._vectors().values():
            checksum = zlib.crc32(vector.numpy().data, checksum)
        return checksum or 1

    def image(self) -> Image:
        """A copy of all that this shard's next answers depend on. Not with delay compensation."""
        assert self._backups is None, "what workers pulled is not in an image"
        vectors, gathering = self._vectors(), self._gathering.image()
        marked = self._snapshots.marked
        if marked is not None:
            vectors |= {MARKED_PARAMETERS: marked.parameters, MARKED_STATISTICS: marked.statistics}
        copies = {name: vector.clone() for name, vector in vectors.items()}
        pace = self._pace
        return Image(
            self._clocks,
            {worker: record.copy() for worker, record in self._records.items()},
            frozenset(self._at_work),
            dict(self.settled),
            gathering,
            {**copies, **gathering.vectors},
            pace.clocks() if pace else {},
            pace.floor if pace else 0,
            self._marked_clock,
            marked.version if marked else 0,
            self.num_expected,
            self._snapshots.newest.newest_pushes,
            marked.newest_pushes if marked else {},
        )

    @classmethod
    def of_image(
        cls, config: ShardConfig, image: Image, allocate: Allocate | None = None
    ) -> "Shard":
        """One that goes on exactly as the one that the image is of; takes the image over."""
        vectors = {name: image.vectors[name] for name in vector_names(config.rule)}
        shard = cls(config, ShardState(image.clocks, vectors), allocate)
        shard._records = {worker: record.copy() for worker, record in image.records.items()}
        shard._newest_pushes = newest_pushes(shard._records)
        shard._snapshots.newest.newest_pushes = image.newest_pushes
        shard._at_work = image.at_work
        shard.settled.update(image.settled)
        shard._gathering.restore(image.gathering)
        shard.num_expected, shard._marked_clock = image.num_expected, image.marked_clock
        if shard._pace is not None:
            shard._pace.restore(image.worker_clocks, image.floor)
        if shard._in_step:
            snapshots = shard._snapshots
            marked = Snapshot.copy_of(
                image.marked_version,
                image.vectors[MARKED_PARAMETERS],
                image.vectors[MARKED_STATISTICS],
                image.marked_pushes,
                snapshots.allocate,
            )
            snapshots.restore_mark(marked)
        return shard

    def last_sequences(self) -> dict[int, dict[int, int]]:
        """The newest settled sequence of each life of each worker."""
        return {worker: dict(record.last_sequences) for worker, record in self._records.items()}


def _is_finite(vector: Tensor, squares: bool = False) -> bool:
    """Whether all elements are, and, if asked for, their squares.

    Exact, in one pass and without a temporary: aminmax hands on both NaN and Inf.
    """
    if vector.numel() == 0:
        return True
    low, high = torch.aminmax(vector)
    if squares:
        low, high = low.square(), high.square()
    return bool(torch.isfinite(low) & torch.isfinite(high))
