"""The coordinator's memory on disk: a state, and the calls since, so that it may die."""

import pickle
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from asynception.coordinator import Coordinator
from asynception.ledger import Ledger
from asynception.totals import Totals
from ps.receipts import Settled
from worker.data.lease import Lease
from worker.step_report import StepReport

JOURNAL_FILE = ".coordinator.journal"
"""In a run's folder, while it goes on."""

MAX_NUM_BYTES = 8 << 20
"""Of calls; then their effect is written in their place."""

_HEAD = struct.Struct("<II")
"""Of a record: how many bytes follow, and their CRC-32."""

Call = tuple[str, Sequence[Any]]
"""A method's name, and its arguments."""


class JournalLost(RuntimeError):
    """What the coordinator knew is not to be had."""


class Journal:
    """A file of pickled records: a state, then calls. Its one writer may be killed anywhere.

    Written without fsync: it is to outlive the process, not the machine, with which the driver on
    it and so the whole session would die.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self.num_bytes = 0
        """Of calls since the state."""

    def create(self) -> None:
        """An empty one, before the first writer starts. Raises OSError."""
        self._path.write_bytes(b"")

    def remove(self) -> None:
        """It isn't needed any more, or no longer true."""
        self._path.unlink(missing_ok=True)

    def read(self) -> tuple[Mapping[str, Any] | None, list[Call]]:
        """The state, if there ever was one, and the calls since.

        A record that a death cut short is left out: its call was never answered. Raises JournalLost
        if there is no file.
        """
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise JournalLost(f"the coordinator's journal is lost: {error}") from None
        records = [pickle.loads(record) for record in _records(content)]
        return (records[0], records[1:]) if records else (None, [])

    def begin(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: what was there before is in it."""
        incomplete = self._path.with_name(f"{self._path.name}.incomplete")
        try:
            incomplete.write_bytes(_record(state))
            incomplete.replace(self._path)
            self._close()
            self._file = self._path.open("ab", buffering=0)
        except OSError:
            self._give_up()
        self.num_bytes = 0

    def append(self, call: Call) -> None:
        """Note a call before it is made. What can't be written is not to be come back to."""
        if self._file is None:
            return
        record = _record(call)
        try:
            if self._file.write(record) != len(record):
                self._give_up()
        except OSError:
            self._give_up()
        self.num_bytes += len(record)

    def _give_up(self) -> None:
        self._close()
        self.remove()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _record(value: Any) -> bytes:
    content = pickle.dumps(value)
    return _HEAD.pack(len(content), zlib.crc32(content)) + content


def _records(content: bytes) -> Iterator[bytes]:
    """The whole ones."""
    start = 0
    while start + _HEAD.size <= len(content):
        num_bytes, checksum = _HEAD.unpack_from(content, start)
        start += _HEAD.size
        record = content[start : start + num_bytes]
        if len(record) < num_bytes or zlib.crc32(record) != checksum:
            return
        yield record
        start += num_bytes


class JournaledCoordinator(Coordinator):
    """A coordinator that a successor can take the place of.

    Every call that changes something is noted before it is made, and so before it is answered. A
    call whose answer was lost is made again by its caller (`max_task_retries` of the actor), and
    gets the answer that the first one had.
    """

    def __init__(
        self,
        ledger: Ledger,
        totals: Totals,
        journal: Journal,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Goes on where the journal ends. Raises JournalLost."""
        if clock is None:
            super().__init__(ledger, totals)
        else:
            super().__init__(ledger, totals, clock)
        state, calls = journal.read()
        if state is not None:
            self.restore(state)
            for name, arguments in calls:
                getattr(Coordinator, name)(self, *arguments)
            self.num_deaths += 1
        self._journal = journal
        journal.begin(self.state())

    def _note(self, name: str, *arguments: Any) -> None:
        if self._journal.num_bytes > MAX_NUM_BYTES:
            self._journal.begin(self.state())
        self._journal.append((name, arguments))

    def enlist(self, worker: int, incarnation: int | None = None) -> int:
        self._note("enlist", worker, incarnation)
        return super().enlist(worker, incarnation)

    def lease(self, worker: int, incarnation: int, number: int | None = None) -> Lease | None:
        self._note("lease", worker, incarnation, number)
        return super().lease(worker, incarnation, number)

    def report(self, worker: int, incarnation: int, steps: Sequence[StepReport]) -> int | None:
        if steps:
            self._note("report", worker, incarnation, steps)
        return super().report(worker, incarnation, steps)

    def published(self, num_samples: int) -> None:
        self._note("published", num_samples)
        super().published(num_samples)

    def end(
        self, worker: int, settled: Settled | None = None, incarnation: int | None = None
    ) -> int:
        self._note("end", worker, settled, incarnation)
        return super().end(worker, settled, incarnation)

    def close(self) -> None:
        self._note("close")
        super().close()
