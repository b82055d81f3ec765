"""A shuffle of any number of records in little memory: they are sorted by a hash of their keys.

The order is that of BLAKE2b, keyed with the seed, of the samples' keys: a permutation of the
whole set, not of a window, as random as the hash. It depends on the seed and the keys alone: not
on the order in which records come, nor on the size of buckets. Records of one key come together.
"""

import hashlib
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_DIGEST_BYTES = 16
_LENGTH = struct.Struct("<I")
_FANOUT = 256
Record = tuple[bytes, bytes]
"""(digest, payload)."""


def order_digest(key: str, seed: int) -> bytes:
    """Samples are in the order of these 16 bytes."""
    content = key.encode(errors="surrogateescape")
    return hashlib.blake2b(
        content, digest_size=_DIGEST_BYTES, key=str(seed).encode(), person=b"order"
    ).digest()


def is_held_out(key: str, share: float) -> bool:
    """True for `share` of all keys, the same ones for every seed, and more for a larger share."""
    content = key.encode(errors="surrogateescape")
    digest = hashlib.blake2b(content, digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") < share * 2**64


class KeyShuffle:
    """Takes records, then hands them out shuffled.

    Records go to 256 files by the first byte of their digest. A file of more than
    `bucket_num_bytes` is dealt out to 256 others by the next byte before any is read whole, so
    memory holds one bucket, or the records of a single key. Files lie in `folder`, which
    becomes a folder of its own and is removed by `drain`.
    """

    def __init__(self, folder: Path, seed: int, bucket_num_bytes: int) -> None:
        self._folder, self._seed, self._bucket_num_bytes = folder, seed, bucket_num_bytes
        self._buckets = _Buckets(folder, depth=0)

    def add(self, key: str, payload: bytes) -> None:
        self._buckets.add((order_digest(key, self._seed), payload))

    def drain(self) -> Iterator[Record]:
        """All records, sorted by digest, those of one key by payload; once."""
        self._buckets.close()
        for path in self._buckets.paths():
            yield from self._sorted(path, depth=1)
        shutil.rmtree(self._folder)

    def _sorted(self, path: Path, depth: int) -> Iterator[Record]:
        """The records of a file, all of which agree in their first `depth` bytes; removes it."""
        if path.stat().st_size <= self._bucket_num_bytes or depth == _DIGEST_BYTES:
            with open(path, "rb") as file:
                records = sorted(_read(file))
            path.unlink()
            yield from records
            return
        buckets = _Buckets(path.with_name(path.name + ".d"), depth)
        with open(path, "rb") as file:
            for record in _read(file):
                buckets.add(record)
        path.unlink()
        buckets.close()
        for part in buckets.paths():
            yield from self._sorted(part, depth + 1)


class _Buckets:
    """Files of records by byte `depth` of their digests, made as they are needed."""

    def __init__(self, folder: Path, depth: int) -> None:
        folder.mkdir()
        self._folder, self._depth = folder, depth
        self._files: list[BinaryIO | None] = [None] * _FANOUT

    def add(self, record: Record) -> None:
        digest, payload = record
        byte = digest[self._depth]
        file = self._files[byte]
        if file is None:
            file = self._files[byte] = open(self._path(byte), "wb")  # noqa: SIM115
        file.write(digest + _LENGTH.pack(len(payload)) + payload)

    def close(self) -> None:
        for file in self._files:
            if file is not None:
                file.close()

    def paths(self) -> list[Path]:
        """Of the files, in the order of their digests."""
        return [self._path(byte) for byte, file in enumerate(self._files) if file is not None]

    def _path(self, byte: int) -> Path:
        return self._folder / f"{byte:02x}"


def _read(file: BinaryIO) -> Iterator[Record]:
    while digest := file.read(_DIGEST_BYTES):
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        yield digest, file.read(length)
