"""A copy of all that a shard's next answers depend on, for another to go on from there."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ps.gathering import GatheringImage
from ps.push import NewestPushes
from ps.receipts import Outcome, WorkerRecord
from ps.schedule import Clocks

MARKED_PARAMETERS, MARKED_STATISTICS = "marked.parameters", "marked.statistics"
"""Of the version that workers who go in step compute from."""


@dataclass(frozen=True)
class Image:
    """Unlike a state, which is what a run begins from, it has receipts, and half-made versions."""

    clocks: Clocks
    records: Mapping[int, WorkerRecord]
    at_work: frozenset[int]
    settled: Mapping[Outcome, int]
    gathering: GatheringImage
    vectors: Mapping[str, Tensor]
    """Those of a state, of the marked version if there is one, and of what is gathered."""
    worker_clocks: Mapping[int, int] = field(default_factory=dict)
    floor: int = 0
    marked_clock: int = 0
    marked_version: int = 0
    num_expected: int = 0
    newest_pushes: NewestPushes = field(default_factory=dict)
    marked_pushes: NewestPushes = field(default_factory=dict)
