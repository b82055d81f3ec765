"""What a pack has finished, kept where the next one finds it if this one is killed."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from model.errors import InputError
from worker.data.manifest import ShardEntry


class SkippedSample(NamedTuple):
    """A sample that isn't in its shard."""

    key: str
    reason: str
    labels: list[int]


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard."""

    split: str
    index: int
    entry: ShardEntry
    fewest_labels: int
    """Labels of the sample that has fewest; those of no sample are 2**31."""
    most_labels: int
    skipped: tuple[SkippedSample, ...]

    def to_json(self) -> str:
        return json.dumps({**vars(self), "entry": list(vars(self.entry).values())})

    @classmethod
    def from_json(cls, line: bytes) -> Self:
        values: dict[str, Any] = json.loads(line)
        entry = ShardEntry(*values.pop("entry"))
        skipped = tuple(SkippedSample(*each) for each in values.pop("skipped"))
        return cls(**values, entry=entry, skipped=skipped)


class Journal:
    """A file with a line for each finished shard, below the fingerprint of the plan.

    Raises InputError if the file is of another plan; `remove` says what to remove then.
    """

    def __init__(self, path: Path, fingerprint: str, remove: str) -> None:
        self.records: list[ShardRecord] = []
        """Those of earlier runs."""
        whole = path.read_bytes().rpartition(b"\n")[0].split(b"\n") if path.exists() else [b""]
        if whole[0] and whole[0].decode() != fingerprint:
            raise InputError(
                f"{path.parent.parent}: holds an unfinished pack of another plan (images, labels "
                f"or options have changed since): go on with the same, or remove {remove} to "
                "begin anew"
            )
        self.records += [ShardRecord.from_json(line) for line in whole[1:]]
        # Written anew, since a line that was cut short by a kill must not be gone on with.
        self._file = open(path, "wb")  # noqa: SIM115
        self._append(fingerprint, *(record.to_json() for record in self.records))

    def add(self, record: ShardRecord) -> None:
        """On the disk when this returns."""
        self._append(record.to_json())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _append(self, *lines: str) -> None:
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises InputError if another process is at work in `folder`; the lock dies with us."""
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder.parent}: another process packs into it: wait for its end, or stop it"
            ) from None
        yield
