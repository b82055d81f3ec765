"""A set of shards that a manifest describes: opened without reading a shard, near or far.

Reading 100,000 shards to learn how many samples each holds is what a manifest saves. In return
every shard is compared with its manifest when it is first read, and one that differs counts as
lost: its positions in the order of the epoch would otherwise name other samples.
"""

import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from model.errors import InputError
from worker.data.cache import RecentCache
from worker.data.fetch import FetchError, FetchSettings, RemoteFolder, file_name, is_remote
from worker.data.manifest import SUFFIX, Manifest, ShardEntry
from worker.data.shard_cache import LostShards, ShardCache
from worker.data.source import KnownLabels, LostShard, Sample
from worker.data.tar_index import TarIndex, index_tar

_GZIP_SUFFIXES = (".tar.gz", ".tgz")
_MAX_MANIFEST_BYTES = 1 << 30
_FEWEST_INDICES = 16


class Shards(Protocol):
    """The files of a manifest."""

    def open(self, entry: ShardEntry) -> BinaryIO:
        """The shard, of the size that its manifest says. Raises LostShard."""
        ...

    def announce(self, entries: Sequence[ShardEntry]) -> None:
        """These are about to be opened, in this order. Returns at once."""
        ...

    def reject(self, entry: ShardEntry, reason: str) -> LostShard:
        """The shard is no good; returns the error, which `open` raises for a while."""
        ...


class LocalShards:
    """Shards in a folder, read in place."""

    def __init__(self, folder: Path, settings: FetchSettings) -> None:
        self._folder = folder
        self._lost = LostShards(settings.retry_lost_s)

    def open(self, entry: ShardEntry) -> BinaryIO:
        self._lost.check(entry.name)
        try:
            file = open(os.path.join(self._folder, entry.name), "rb")  # noqa: SIM115
        except OSError as error:
            raise self.reject(entry, f"it can't be read ({error.strerror})") from None
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes != entry.num_bytes:
            file.close()
            raise self.reject(
                entry, f"it has {num_bytes} bytes, and its manifest says {entry.num_bytes}"
            )
        return file

    def announce(self, entries: Sequence[ShardEntry]) -> None:
        pass

    def reject(self, entry: ShardEntry, reason: str) -> LostShard:
        return self._lost.add(entry.name, reason)


class ManifestSource:
    """An ImageSource of the shards (.tar, .tar.gz, .tgz) that a manifest lists.

    An image in a plain tar is one positional read. Compressed ones are kept decompressed, up to
    `cached_shards` of them. Where the samples of a shard lie is found when it is first read, and
    kept for about `indexed_samples` samples: let that exceed a shuffle window.

    Pickles as its location: the other process reads the manifest itself.
    Raises InputError for a manifest that can't be had or used.
    """

    def __init__(
        self,
        location: str,
        settings: FetchSettings,
        setting_name: str,
        *,
        cached_shards: int = 8,
        indexed_samples: int = 250_000,
    ) -> None:
        where = f"{setting_name}={location!r}"
        manifest = _read_manifest(location, settings, where)
        opener = partial(
            ManifestSource, cached_shards=cached_shards, indexed_samples=indexed_samples
        )
        self._reopen = opener, (location, settings, setting_name)
        self._manifest = manifest
        self._shards = _open_shards(location, manifest, settings, where)
        self._sizes = tuple(entry.num_samples for entry in manifest.shards)
        self._cached_shards = cached_shards
        self._decompressed: RecentCache[int, bytes] = RecentCache(cached_shards)
        num_indices = indexed_samples * len(self._sizes) // max(1, manifest.num_samples)
        self._indices: RecentCache[int, TarIndex] = RecentCache(max(_FEWEST_INDICES, num_indices))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self._manifest.class_names

    @property
    def cached_shards(self) -> int | None:
        compressed = any(entry.name.endswith(_GZIP_SUFFIXES) for entry in self._manifest.shards)
        return self._cached_shards if compressed else None

    @property
    def known_labels(self) -> KnownLabels:
        found = self._manifest
        return KnownLabels(found.label_counts, found.fewest_labels, found.most_labels)

    @property
    def fetches(self) -> bool:
        return isinstance(self._shards, ShardCache)

    def check_room(self, num_shards: int) -> None:
        """Raises InputError unless any `num_shards` shards fit into the cache of fetched ones."""
        if isinstance(self._shards, ShardCache):
            sizes = sorted((entry.num_bytes for entry in self._manifest.shards), reverse=True)
            what = f"the {min(num_shards, len(sizes))} shards that are read at a time"
            self._shards.check_room(sum(sizes[:num_shards]), what)

    def announce(self, shards: Sequence[int]) -> None:
        self._shards.announce([self._manifest.shards[shard] for shard in shards])

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        with self._opened(shard) as (found, _):
            return found.labels(index)

    def read(self, shard: int, index: int) -> Sample:
        with self._opened(shard) as (found, file):
            offset, num_bytes = int(found.image_offsets[index]), int(found.image_num_bytes[index])
            if found.path.endswith(_GZIP_SUFFIXES):
                image = self._tar_bytes(shard, file)[offset : offset + num_bytes]
            else:
                image = os.pread(file.fileno(), num_bytes, offset)
            if len(image) != num_bytes:
                raise self._reject(shard, f"it ends before byte {offset + num_bytes}")
            return Sample(found.keys[index], image, found.labels(index))

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[TarIndex, BinaryIO]]:
        """The shard's index and its file. Fetching comes first: an index is made under a lock."""
        with self._shards.open(self._manifest.shards[shard]) as file:
            yield self._indices.get(shard, lambda: self._index(shard, file)), file

    def _index(self, shard: int, file: BinaryIO) -> TarIndex:
        entry = self._manifest.shards[shard]
        compressed = entry.name.endswith(_GZIP_SUFFIXES)
        archive = BytesIO(self._tar_bytes(shard, file)) if compressed else file
        try:
            index = index_tar(entry.name, archive)
        except InputError as error:
            raise self._reject(shard, str(error).removeprefix(f"{entry.name}: ")) from None
        if difference := _difference(index, entry, self._manifest):
            raise self._reject(shard, difference)
        return index

    def _tar_bytes(self, shard: int, file: BinaryIO) -> bytes:
        """A compressed shard, decompressed."""
        return self._decompressed.get(shard, lambda: self._decompress(shard, file))

    def _decompress(self, shard: int, file: BinaryIO) -> bytes:
        try:
            file.seek(0)  # it may have been read before, and dropped from memory since
            with gzip.open(file) as archive:
                return archive.read()
        except (EOFError, zlib.error, OSError) as error:
            raise self._reject(shard, f"it can't be decompressed ({error})") from None

    def _reject(self, shard: int, reason: str) -> LostShard:
        return self._shards.reject(self._manifest.shards[shard], reason)


def open_manifest(
    location: str,
    settings: FetchSettings,
    setting_name: str,
    *,
    cached_shards: int = 8,
    indexed_samples: int = 250_000,
) -> ManifestSource:
    """The set that the manifest at `location`, a path or URL, describes.

    Raises InputError, also for URLs of anything else: without a manifest every shard would have to
    be fetched whole before training could begin.
    """
    name = file_name(location) if is_remote(location) else location
    if not name.endswith(SUFFIX):
        raise InputError(
            f"{setting_name}={location!r}: remote shards need a manifest, and this is none: make "
            f"one with `asynception data index {location!r} --out FOLDER`, and name the "
            f"*{SUFFIX} file"
        )
    return ManifestSource(
        location,
        settings,
        setting_name,
        cached_shards=cached_shards,
        indexed_samples=indexed_samples,
    )


def _read_manifest(location: str, settings: FetchSettings, where: str) -> Manifest:
    try:
        if is_remote(location):
            content = _fetch_manifest(location, settings, where)
        else:
            content = Path(location).read_bytes()
    except FetchError as error:
        raise InputError(f"{where} can't be fetched: {error.reason}") from None
    except OSError as error:
        raise InputError(f"{where} can't be read ({error.strerror}): check the path") from None
    return Manifest.from_json(content, where)


def _fetch_manifest(location: str, settings: FetchSettings, where: str) -> bytes:
    remote = RemoteFolder(location, settings, where)

    @contextmanager
    def new_part() -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "manifest"
            path.touch()
            yield path

    return remote.fetch(remote.name, new_part, Path.read_bytes, _MAX_MANIFEST_BYTES)


def _open_shards(
    location: str, manifest: Manifest, settings: FetchSettings, where: str
) -> LocalShards | ShardCache:
    beside = location if manifest.base is None else f"{manifest.base.rstrip('/')}/{SUFFIX}"
    if is_remote(beside):
        return ShardCache(RemoteFolder(beside, settings, where), settings)
    return LocalShards(Path(beside).parent, settings)


def _difference(index: TarIndex, entry: ShardEntry, manifest: Manifest) -> str | None:
    """What the shard has that its manifest doesn't say, if anything."""
    if len(index.keys) != entry.num_samples:
        return f"it holds {len(index.keys)} samples, and its manifest says {entry.num_samples}"
    num_classes = len(manifest.label_counts)
    strange = index.label_ids[(index.label_ids < 0) | (index.label_ids >= num_classes)]
    if len(strange):
        return f"it has the label {strange[0]}, and its manifest counts {num_classes} classes"
    lengths = np.diff(index.label_offsets)
    fewest, most = manifest.fewest_labels, manifest.most_labels
    if len(lengths) and not fewest <= lengths.min() <= lengths.max() <= most:
        return (
            f"its samples have {lengths.min()} to {lengths.max()} labels, and its manifest says "
            f"{fewest} to {most}"
        )
    return None
