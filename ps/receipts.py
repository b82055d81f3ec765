"""What a shard says of a push, and what it remembers of a worker to say it once."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

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
class Receipt:
    """What was done with a push: the version and the schedule's lr it met, and its staleness."""

    outcome: Outcome
    version: int
    staleness: int
    lr: float
    checksum: int = 0
    """Of a standby's state after the push, at intervals; else 0."""


@dataclass(frozen=True)
class Settled:
    """The newest push of a life that was settled; -1 for none."""

    everywhere: int
    """At every shard."""
    somewhere: int
    """At one shard at least."""


NOTHING_SETTLED = Settled(-1, -1)


@dataclass
class WorkerRecord:
    """What a shard remembers of a worker, so that each push is applied at most once."""

    incarnation: int = 0
    last_sequences: dict[int, int] = field(default_factory=dict)
    """Newest sequence of each incarnation that ever pushed here."""
    receipts: OrderedDict[int, Receipt] = field(default_factory=OrderedDict)
    """Of the present incarnation, by sequence; the newest RECEIPTS_KEPT."""

    def copy(self) -> "WorkerRecord":
        """One of its own."""
        return WorkerRecord(self.incarnation, dict(self.last_sequences), self.receipts.copy())

    def takes(self, incarnation: int, sequence: int) -> bool:
        """Whether a push is new: of no earlier life, and not settled yet."""
        if incarnation < self.incarnation:
            return False
        return sequence > self.last_sequences.get(incarnation, -1)

    def enter(self, incarnation: int) -> bool:
        """Whether a new life begins with this."""
        begins = incarnation > self.incarnation
        if begins:
            self.incarnation = incarnation
            self.receipts.clear()
        return begins

    def with_fence(self) -> dict[int, int]:
        """`last_sequences`, and -1 for the present life if it has pushed nothing yet."""
        return {self.incarnation: -1, **self.last_sequences}

    def note(self, sequence: int, receipt: Receipt) -> None:
        """Keep the receipt of the present life's newest push."""
        self.last_sequences[self.incarnation] = sequence
        self.receipts[sequence] = receipt
        while len(self.receipts) > RECEIPTS_KEPT:
            self.receipts.popitem(last=False)

    def first_receipt(self, worker: int, sequence: int) -> Receipt:
        """Of a push that comes again. Raises ForgottenReceipt."""
        if sequence not in self.receipts:
            raise ForgottenReceipt(
                f"push {sequence} of worker {worker}, incarnation {self.incarnation}"
            )
        return self.receipts[sequence]


def newest_pushes(records: Mapping[int, WorkerRecord]) -> dict[int, tuple[int, int]]:
    """By worker, incarnation and sequence of the newest push of its newest life that has pushed."""
    return {
        worker: max(record.last_sequences.items())
        for worker, record in records.items()
        if record.last_sequences
    }
