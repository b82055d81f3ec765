"""A run's curves as TensorBoard files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """TensorBoard, with samples as steps."""

    def __init__(self, folder: Path, start_samples: int) -> None:
        self._folder = folder
        self._writer = self._open(start_samples)

    def _open(self, start_samples: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # two seconds that only runs need

        # What was drawn at the start itself belongs to the state that the run goes on from.
        return SummaryWriter(str(self._folder), purge_step=start_samples + 1, flush_secs=10)

    def rewind(self, samples: int) -> None:
        """Drop what was drawn beyond `samples`."""
        self._writer.close()
        self._writer = self._open(samples)

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        for tag, value in values.items():
            if not math.isnan(value):
                self._writer.add_scalar(tag, value, samples)

    def histogram(self, tag: str, counts: Mapping[int, int], samples: int) -> None:
        """A histogram of whole numbers, exactly: each value has a bucket of width 1 around it."""
        if not counts:
            return
        buckets: dict[float, int] = {}
        for value in sorted(counts):
            buckets.setdefault(value - 0.5, 0)
            buckets[value + 0.5] = counts[value]
        self._writer.add_histogram_raw(
            tag,
            min=min(counts),
            max=max(counts),
            num=sum(counts.values()),
            sum=sum(value * count for value, count in counts.items()),
            sum_squares=sum(value**2 * count for value, count in counts.items()),
            bucket_limits=list(buckets),
            bucket_counts=list(buckets.values()),
            global_step=samples,
        )

    def close(self) -> None:
        self._writer.close()
