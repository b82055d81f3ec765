"""The unit in which work is handed out: a range of positions in the order of samples."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """The global positions start <= p < stop; a range may span epochs."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, (self.start, self.stop)

    @property
    def num_samples(self) -> int:
        return self.stop - self.start

    def num_batches(self, batch_size: int) -> int:
        return -(-self.num_samples // batch_size)

    def after(self, num_batches: int, batch_size: int) -> int:
        """The position at which batch number `num_batches`, counted from 0, begins.

        As few batches as can be, of sizes that differ by one at most: a rest of one image would
        make a gradient, and batch norm statistics, of its own.
        """
        whole = self.num_batches(batch_size)
        if num_batches >= whole:
            return self.stop
        return self.start + num_batches * self.num_samples // whole

    def batches(self, batch_size: int) -> Iterator["Lease"]:
        """The positions of each batch, in order."""
        start = self.start
        for number in range(1, self.num_batches(batch_size) + 1):
            stop = self.after(number, batch_size)
            yield Lease(start, stop)
            start = stop
