"""WebDataset shards (.tar, .tar.gz, .tgz) read at random."""

import gzip
import os
import zlib
from collections.abc import Sequence
from io import BytesIO

from model.errors import InputError
from worker.data.cache import RecentCache
from worker.data.source import Sample
from worker.data.tar_index import TarIndex, index_tar, unreadable

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_GZIP_SUFFIXES = (".tar.gz", ".tgz")


class WebDatasetSource:
    """One shard per file, in the order given.

    Opening reads every shard once, to index its members and to check its labels; afterwards an
    image in a plain tar is one positional read. A compressed tar can only be read whole: up to
    `cached_shards` of them are kept decompressed in memory, and one that was dropped is
    decompressed again when it is next asked for.

    Pickles as its index, so that it can be opened once and sent to other processes that see the
    same files.

    Raises InputError for whatever `index_tar` refuses and for files that cannot be read.
    """

    def __init__(self, paths: Sequence[str], cached_shards: int = 8) -> None:
        assert paths
        self._indices = tuple(_index_file(os.fspath(path)) for path in paths)
        self._cached_shards = cached_shards
        self._decompressed: RecentCache[int, bytes] = RecentCache(cached_shards)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(len(index.keys) for index in self._indices)

    @property
    def class_names(self) -> None:
        return None

    @property
    def cached_shards(self) -> int | None:
        compressed = any(index.path.endswith(_GZIP_SUFFIXES) for index in self._indices)
        return self._cached_shards if compressed else None

    @property
    def known_labels(self) -> None:
        return None

    @property
    def fetches(self) -> bool:
        return False

    def announce(self, shards: Sequence[int]) -> None:
        pass

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        return self._indices[shard].labels(index)

    def read(self, shard: int, index: int) -> Sample:
        found = self._indices[shard]
        offset, num_bytes = int(found.image_offsets[index]), int(found.image_num_bytes[index])
        if found.path.endswith(_GZIP_SUFFIXES):
            tar = self._decompressed.get(shard, lambda: _decompress(found.path))
            image = tar[offset : offset + num_bytes]
        else:
            image = _read_at(found.path, offset, num_bytes)
        if len(image) != num_bytes:
            raise unreadable(found.path, f"it ends before byte {offset + num_bytes}")
        return Sample(found.keys[index], image, found.labels(index))


def _index_file(path: str) -> TarIndex:
    if path.endswith(_GZIP_SUFFIXES):
        return index_tar(path, BytesIO(_decompress(path)))
    try:
        archive = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise _cannot_open(path, error) from None
    with archive:
        return index_tar(path, archive)


def _decompress(path: str) -> bytes:
    try:
        with gzip.open(path) as archive:
            return archive.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise unreadable(path, str(error)) from None
    except OSError as error:
        raise _cannot_open(path, error) from None


def _read_at(path: str, offset: int, num_bytes: int) -> bytes:
    """Opens the file anew each time: there may be more shards than file descriptors."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, num_bytes, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _cannot_open(path, error) from None


def _cannot_open(path: str, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read, check that it exists everywhere ({error.strerror})")
