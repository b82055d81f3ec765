"""What a worker sends to one shard."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Push:
    """A gradient (mean over `num_samples`) and BN deltas (after - pulled), flat, for one shard.

    `sequence` counts the pushes of one `incarnation` of a worker and never falls.
    """

    worker: int
    incarnation: int
    sequence: int
    pulled_version: int
    num_samples: int
    gradient: Tensor
    statistics_delta: Tensor
