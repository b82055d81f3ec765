"""What a data set is to the rest of the worker: encoded samples, read at random."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
)


class Sample(NamedTuple):
    """One image as it is stored, and its labels."""

    key: str
    """The sample's name in its shard or folder, for messages."""
    image: bytes
    """The encoded file (PNG, JPEG, ...)."""
    labels: tuple[int, ...]
    """Class ids, each once; may be empty."""


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

    def read(self, shard: int, index: int) -> Sample:
        """The sample, encoded. Raises InputError when its file can no longer be read."""
        ...

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        """The sample's labels, from memory."""
        ...


def iterate_labels(source: ImageSource) -> Iterator[tuple[int, ...]]:
    """The labels of every sample, in stored order, without reading an image."""
    for shard, num_samples in enumerate(source.shard_sizes):
        for index in range(num_samples):
            yield source.labels(shard, index)
