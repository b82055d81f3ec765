"""The unit in which work is handed out: a range of positions in the order of samples."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lease:
    """The global positions start <= p < stop; a range may span epochs."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, (self.start, self.stop)

    @property
    def num_samples(self) -> int:
        return self.stop - self.start
