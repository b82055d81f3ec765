"""Which shard holds which elements: segments to byte-balanced ranges, from shapes alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.errors import InputError
from model.flat import ALIGNMENT, Segment, flat_numel


@dataclass(frozen=True)
class Range:
    """A half-open range of elements of a flat vector."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def slice(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ShardRanges:
    """What one shard holds of the two flat vectors, and which of its parameters decay.

    `decayed` counts from the shard's own first parameter; its ranges are disjoint and sorted.
    """

    parameters: Range
    statistics: Range
    decayed: tuple[Range, ...]

    @property
    def numel(self) -> int:
        return self.parameters.numel + self.statistics.numel


@dataclass(frozen=True)
class Layout:
    """The map from the flat vectors to the shards, in order."""

    shards: tuple[ShardRanges, ...]

    @property
    def num_parameters(self) -> int:
        return self.shards[-1].parameters.stop

    @property
    def num_statistics(self) -> int:
        return self.shards[-1].statistics.stop


def plan_layout(
    parameters: Sequence[Segment], statistics: Sequence[Segment], num_shards: int
) -> Layout:
    """Cut both flat vectors into `num_shards` ranges of whole alignment quanta.

    Tensors are sliced where a boundary falls: with 17,000 classes the last layer alone is 60 %
    of all bytes, so whole tensors can't balance. All shards are within one quantum
    (`ALIGNMENT` elements) of each other in parameters, in statistics, and in their sum.

    Raises InputError if a shard would hold no parameter.
    """
    quanta = flat_numel(parameters) // ALIGNMENT
    if not 1 <= num_shards <= quanta:
        raise InputError(
            f"scaling.num_servers = {num_shards}: this model can be cut into 1 to {quanta} shards; "
            f"choose a number in that range"
        )
    sizes = _shares(quanta, num_shards, first_extra=0)
    # Statistics' odd quanta go to the shards that got no odd quantum of parameters.
    rest = _shares(flat_numel(statistics) // ALIGNMENT, num_shards, first_extra=quanta % num_shards)
    ranges = zip(_ranges(sizes), _ranges(rest), strict=True)
    return Layout(tuple(ShardRanges(p, s, tuple(_decayed(parameters, p))) for p, s in ranges))


def _shares(quanta: int, num_shards: int, first_extra: int) -> list[int]:
    base, extra = divmod(quanta, num_shards)
    return [base + ((i - first_extra) % num_shards < extra) for i in range(num_shards)]


def _ranges(sizes: Sequence[int]) -> Iterator[Range]:
    start = 0
    for size in sizes:
        stop = start + size * ALIGNMENT
        yield Range(start, stop)
        start = stop


def _decayed(segments: Sequence[Segment], within: Range) -> Iterator[Range]:
    for segment in segments:
        start, stop = max(segment.offset, within.start), min(segment.stop, within.stop)
        if segment.decayed and start < stop:
            yield Range(start - within.start, stop - within.start)
