"""What changes a shard's state, as values: the entries of its log.

A shard's state follows from the one it was loaded with and these, in their order; so two shards
that carry out the same ones are the same, to the last bit.
"""

from dataclasses import dataclass
from typing import Any

from ps.push import Push
from ps.shard import Shard


@dataclass(frozen=True)
class Fence:
    """See `Shard.fence`."""

    worker: int
    incarnation: int


@dataclass(frozen=True)
class Expect:
    """See `Shard.expect`. `number` rises; one that doesn't comes late, and has no effect."""

    workers: frozenset[int]
    number: int


@dataclass(frozen=True)
class Enter:
    """See `Shard.enter`."""

    worker: int
    incarnation: int
    clock: int | None = None


Operation = Push | Fence | Expect | Enter


def has_effect(shard: Shard, operation: Operation) -> bool:
    """Whether it would change the shard. Once it would not, it never will."""
    if isinstance(operation, Push):
        return shard.takes(operation)
    if isinstance(operation, Expect):
        return operation.number > shard.num_expected
    return True


def perform(shard: Shard, operation: Operation) -> Any:
    """Carry it out; returns what the shard says: a Receipt, sequences, a clock, or nothing.

    Raises ForgottenReceipt.
    """
    match operation:
        case Push():
            return shard.push(operation)
        case Fence():
            return shard.fence(operation.worker, operation.incarnation)
        case Enter():
            return shard.enter(operation.worker, operation.incarnation, operation.clock)
        case Expect():
            if has_effect(shard, operation):
                shard.num_expected = operation.number
                shard.expect(operation.workers)
            return None
