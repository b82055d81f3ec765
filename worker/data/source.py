"""What a data set is to the rest of the worker: encoded samples, read at random."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
)


class Sample(NamedTuple):
    """One image as it is stored, and its labels."""

    key: str
    """The sample's name in its shard or folder, for messages."""
    image: bytes | NDArray[np.uint8]
    """The encoded file (PNG, JPEG, ...), or RGB pixels, uint8 (H, W, 3)."""
    labels: tuple[int, ...]
    """Class ids, each once; may be empty."""


class LostShard(Exception):
    """A shard can't be had, or isn't what its manifest says; `name` is that of the shard."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class KnownLabels:
    """What is known of a set's labels without reading a shard."""

    counts: NDArray[np.int64]
    """(num_classes,): the samples that carry each class."""
    fewest: int
    """Labels of the sample that has fewest."""
    most: int
    """Labels of the sample that has most."""


class ImageSource(Protocol):
    """Random access to samples. Methods may be called from several threads at once."""

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard; the order of shards and samples never changes."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The name of class i at i, where the source knows names."""
        ...

    @property
    def cached_shards(self) -> int | None:
        """How many shards can be read at random before one has to be loaded anew.

        None where a read costs the same everywhere.
        """
        ...

    @property
    def known_labels(self) -> KnownLabels | None:
        """None where `labels` has to be asked for every sample."""
        ...

    @property
    def fetches(self) -> bool:
        """Whether shards come from afar, so that it pays to read few of them, and ahead."""
        ...

    def announce(self, shards: Sequence[int]) -> None:
        """These are about to be read, in this order. Returns at once."""
        ...

    def read(self, shard: int, index: int) -> Sample:
        """The sample. Raises LostShard, or InputError when its file can no longer be read."""
        ...

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        """The sample's labels, without reading its image. Raises as `read` does."""
        ...


def iterate_labels(source: ImageSource) -> Iterator[tuple[int, ...]]:
    """The labels of every sample, in stored order, without reading an image."""
    for shard, num_samples in enumerate(source.shard_sizes):
        for index in range(num_samples):
            yield source.labels(shard, index)
