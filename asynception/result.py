"""What a run came to."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RESULT_FILE = "result.json"

Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Result:
    """Written to `result.json` in the run's folder, without `path`.

    `updates` and `samples` are what the last checkpoint holds. `eval` and `baseline` have the same
    measures, of the EMA on held-out images and of predicting each label's training frequency.
    """

    status: Status
    mode: str
    updates: int
    samples: int
    wall_s: float
    samples_per_s: float
    staleness: Mapping[str, float]
    """Versions: mean, p50, p99 and max over all applied pushes at all shards."""
    staleness_histograms: Mapping[str, Any]
    """Receipts of kept work by staleness: in `all`, and in `workers` and `shards` by their numbers.
    There, values from 16 on are counted together with those up to twice as large."""
    receipts: Mapping[str, int]
    """Shards' answers to pushes, by outcome; all but "applied" are lost work."""
    eval: Mapping[str, float]
    baseline: Mapping[str, float]
    checkpoint: str | None
    """Path of the last checkpoint."""
    worker_failures: int = 0
    restarts: int = 0
    """How often the run began again after losing a server, or, detached, its
    driver."""
    updates_lost: Mapping[int, int] = field(default_factory=dict)
    """By server, updates that were lost with it while the others kept theirs."""
    rollbacks: int = 0
    """How often the run went back to a good checkpoint after it had diverged."""
    corrupt_images: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    """Of the ledger: leases, samples_returned by workers that died, samples_twice (of those, and of
    what was done again after a server was lost or from a checkpoint, in a push that some shards but
    not all had taken), and lost: samples left out, by shard."""
    error: str | None = None
    diagnosis: Mapping[str, Any] = field(default_factory=dict)
    """What held the last session up: bottleneck, text, shares of workers' time, notes, stragglers
    (docs/monitoring.md)."""
    server_moves: int = 0
    """How often a server moved to another node while training went on, as its own was drained."""
    path: Path = field(default=Path(), compare=False)
    """The run's folder."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """`eval`, by Ray Train's name."""
        return self.eval

    def to_json(self) -> str:
        """Strict JSON (NaN becomes null), which ends with a line break."""
        values = {name: value for name, value in vars(self).items() if name != "path"}
        return json.dumps(_strict(values), indent=1, allow_nan=False) + "\n"

    def write(self) -> None:
        """Write `result.json`, atomically."""
        incomplete = self.path / f".incomplete-{RESULT_FILE}"
        incomplete.write_text(self.to_json())
        os.replace(incomplete, self.path / RESULT_FILE)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
