"""What a worker tells the coordinator of each push.

In a module without tensors: the process that only counts these starts without torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ps.receipts import Receipt

if TYPE_CHECKING:
    from ps.lanes.lane import LaneName


@dataclass(frozen=True)
class GradientSummary:
    """The mean loss of what was trained on, and the gradient's global norm before clipping."""

    loss: float
    norm: float


@dataclass
class StepReport:
    """What became of the batches of one push; durations in seconds, during which nothing else ran.

    Without images there was no push, and no gradient. `gradient` is the mean over the batches.
    """

    sequence: int
    num_samples: int = 0
    corrupt_keys: Sequence[str] = ()
    gradient: GradientSummary | None = None
    receipts: Sequence[Receipt] = ()
    data_s: float = 0.0
    pull_s: float = 0.0
    compute_s: float = 0.0
    push_s: float = 0.0
    lost: Mapping[str, int] = field(default_factory=dict)
    """Samples left out with their shard, by its name."""
    lanes: "Sequence[LaneName]" = ()
    """By which each shard was reached."""
