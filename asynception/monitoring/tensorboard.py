"""A run's curves as TensorBoard files."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RETRY_S = 60.0
"""Between tries on a disk that was full."""


class TensorBoard:
    """TensorBoard, with samples as steps. A full disk costs curves, which go on in a new file."""

    def __init__(self, folder: Path, start_samples: int) -> None:
        self._folder = folder
        self._failed_s: float | None = None
        self._writer = self._open(start_samples)

    def _open(self, start_samples: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # two seconds that only runs need

        # What was drawn at the start itself belongs to the state that the run goes on from.
        return SummaryWriter(str(self._folder), purge_step=start_samples + 1, flush_secs=10)

    def rewind(self, samples: int) -> None:
        """Drop what was drawn beyond `samples`."""
        self.close()
        self._open_again(samples)

    def _open_again(self, samples: int) -> None:
        self._failed_s = time.monotonic()
        with suppress(OSError):
            self._writer, self._failed_s = self._open(samples), None

    @contextmanager
    def _drawing(self, samples: int) -> Iterator[None]:
        if self._failed_s is not None and time.monotonic() - self._failed_s > RETRY_S:
            self._open_again(samples)
        try:
            yield
        except OSError:
            if self._failed_s is None:
                self._failed_s = time.monotonic()

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        with self._drawing(samples):
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
        with self._drawing(samples):
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
        if self._failed_s is None:
            with suppress(OSError):
                self._writer.close()
