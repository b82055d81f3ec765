"""What a worker sends to one shard."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

NewestPushes = Mapping[int, tuple[int, int]]
"""By worker, incarnation and sequence of the newest push of its newest life that has pushed.

All that its earlier lives had settled is settled too.
"""


@dataclass(frozen=True)
class Order:
    """A place in a shard's log of operations, as the primary of an epoch has it."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Push:
    """A gradient (mean over `num_samples`) and BN deltas (after - pulled), flat, for one shard.

    `sequence` counts the pushes of one `incarnation` of a worker and never falls. With an `order`
    a primary sends it to its standby.
    """

    worker: int
    incarnation: int
    sequence: int
    pulled_version: int
    num_samples: int
    gradient: Tensor
    statistics_delta: Tensor
    order: Order | None = None
