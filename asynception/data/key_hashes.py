"""Which keys are in several shards, found by their hashes without holding all in memory."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

_PARTITIONS = 64
_RECORD = np.dtype([("hash", "<u8"), ("shard", "<u4")])


class KeyHashes:
    """Hashes of keys by shard, in 64 temporary files by their highest bits; used in a `with`.

    Memory holds one file at a time: 12 bytes of every 64th key, and as much again to sort them.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="asynception-")
        paths = [Path(self._folder.name, str(number)) for number in range(_PARTITIONS)]
        self._files: list[BinaryIO] = [open(path, "w+b") for path in paths]  # noqa: SIM115

    def add(self, shard: int, hashes: NDArray[np.uint64]) -> None:
        """hashes: of the keys of one shard, sorted."""
        records = np.empty(len(hashes), _RECORD)
        records["hash"], records["shard"] = hashes, shard
        firsts = np.arange(_PARTITIONS, dtype=np.uint64) << np.uint64(58)
        borders = [*np.searchsorted(hashes, firsts).tolist(), len(hashes)]
        for file, first, end in zip(self._files, borders, borders[1:], strict=False):
            file.write(records[first:end].tobytes())

    def repeated(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(hash, the shards that have it, sorted) of each hash that is in several."""
        for file in self._files:
            file.seek(0)
            records = np.frombuffer(file.read(), _RECORD)
            records = records[np.lexsort((records["shard"], records["hash"]))]
            hashes = records["hash"]
            starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)])
            ends = np.append(starts[1:], len(hashes))[: len(starts)]
            for run in np.flatnonzero(ends - starts > 1).tolist():
                shards = records["shard"][starts[run] : ends[run]]
                yield int(hashes[starts[run]]), tuple(shards.tolist())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()
        self._folder.cleanup()
