"""Which shards a user means: those of a manifest, a folder, or a pattern, near or far."""

import glob
import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from model.errors import InputError
from worker.data.fetch import FetchError, FetchSettings, RemoteFolder, file_name, is_remote
from worker.data.manifest import SUFFIX, Manifest, ShardEntry
from worker.data.open import expand_ranges, has_ranges
from worker.data.webdataset import TAR_SUFFIXES

_GZIP_SUFFIXES = (".tar.gz", ".tgz")
_MAX_BYTES = 1 << 40
_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardSet:
    """Shards in order: `names` below `folder`, which is a path or a URL."""

    location: str
    """As the user wrote it."""
    folder: str
    names: tuple[str, ...]
    manifest: Manifest | None = None
    """If it was a manifest that named them."""

    @property
    def is_remote(self) -> bool:
        return is_remote(self.folder)

    def entry(self, index: int) -> ShardEntry | None:
        """What the manifest says of a shard."""
        return None if self.manifest is None else self.manifest.shards[index]


def find_shards(location: str) -> ShardSet:
    """location: a manifest, a folder, a tar, a glob or a brace pattern; a path or a URL.

    A shard that a manifest or a brace pattern names needn't be there. Raises InputError for a
    location without shards.
    """
    if location.endswith(SUFFIX):
        return _of_manifest(location)
    if has_ranges(location):
        paths = expand_ranges(location)
    elif is_remote(location):
        paths = _remote_paths(location)
    else:
        paths = _local_paths(location)
    paths = [path for path in paths if path.endswith(TAR_SUFFIXES)]
    if not paths:
        raise InputError(
            f"{location}: no shard there: name a manifest, a folder, or a pattern of files ending "
            f"in {', '.join(TAR_SUFFIXES)}"
        )
    folder = _common_folder(paths)
    names = tuple(path.removeprefix(folder).lstrip("/") for path in paths)
    return ShardSet(location, folder, names)


@contextmanager
def opened_shard(folder: str, name: str) -> Iterator[tuple[BinaryIO, Path]]:
    """The shard as an uncompressed tar that can be sought in, and the file as it is stored.

    A remote shard is copied to a temporary file, and a compressed one decompressed to another, in
    the folder that TMPDIR names; both are removed afterwards.
    Raises FetchError for a shard that can't be read.
    """
    with tempfile.TemporaryDirectory(prefix="asynception-") as temporary:
        if is_remote(folder):
            stored = _fetched(_remote_folder(folder), name, Path(temporary))
        else:
            stored = Path(folder, name)
        try:
            plain = stored
            if name.endswith(_GZIP_SUFFIXES):
                plain = _decompressed(stored, Path(temporary))
            file = open(plain, "rb")  # noqa: SIM115
        except OSError as error:
            raise FetchError(f"it can't be read ({error.strerror or error})") from None
        with file:
            yield file, stored


def _of_manifest(location: str) -> ShardSet:
    try:
        if is_remote(location):
            source = RemoteFolder(location, FetchSettings(), location)
            with tempfile.TemporaryDirectory(prefix="asynception-") as temporary:
                content = _fetched(source, file_name(location), Path(temporary)).read_bytes()
        else:
            content = Path(location).read_bytes()
    except FetchError as error:
        raise InputError(f"{location}: can't be fetched: {error.reason}") from None
    except OSError as error:
        raise InputError(f"{location}: cannot be read ({error.strerror})") from None
    manifest = Manifest.from_json(content, location)
    folder = manifest.base or _folder(location)
    return ShardSet(location, folder, tuple(shard.name for shard in manifest.shards), manifest)


@cache
def _remote_folder(folder: str) -> RemoteFolder:
    """One for each process: it keeps connections."""
    return RemoteFolder(f"{folder.rstrip('/')}/{SUFFIX}", FetchSettings(), folder)


def _fetched(source: RemoteFolder, name: str, temporary: Path) -> Path:
    """Raises FetchError."""

    @contextmanager
    def new_part() -> Iterator[Path]:
        descriptor, part = tempfile.mkstemp(dir=temporary)
        os.close(descriptor)
        yield Path(part)

    return source.fetch(name, new_part, lambda part: part.rename(temporary / "stored"), _MAX_BYTES)


def _decompressed(stored: Path, temporary: Path) -> Path:
    plain = temporary / "plain"
    try:
        with gzip.open(stored) as source, open(plain, "wb") as target:
            shutil.copyfileobj(source, target, _PART_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FetchError(f"it is truncated or damaged ({error})") from None
    return plain


def _local_paths(location: str) -> list[str]:
    if os.path.isdir(location):
        return sorted(os.path.join(location, name) for name in os.listdir(location))
    if glob.has_magic(location) and not os.path.exists(location):
        return sorted(glob.glob(location))
    if not os.path.exists(location):
        raise InputError(f"{location}: doesn't exist: name a manifest, a folder, or a pattern")
    return [location]


def _remote_paths(location: str) -> list[str]:
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(location)
        if glob.has_magic(path):
            found = fs.glob(path)
        else:
            found = fs.ls(path, detail=False) if fs.isdir(path) else [path]
    except Exception as error:  # drivers raise what they like
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{location}: can't be listed ({reason}): name a manifest") from None
    return sorted(_as_url(fs, path) for path in found)


def _as_url(fs: Any, path: str) -> str:
    return path if is_remote(path) else str(fs.unstrip_protocol(path))


def _common_folder(paths: Sequence[str]) -> str:
    folders = [_folder(path).split("/") for path in paths]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in shared) or ("/" if paths[0].startswith("/") else ".")


def _folder(path: str) -> str:
    """Of the file at a path or URL."""
    folder, slash, _ = path.rpartition("/")
    return folder if folder else (slash or ".")
