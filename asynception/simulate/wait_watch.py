"""Who waits for a version that others are to make, while others may be waiting for it.

A shard that is behind all others goes on only with a push of each worker, or of enough of them.
If one of those waits for another shard's next version, nobody may ever go on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from asynception.simulate.world import Party, Violation


class Summing(Protocol):
    """What is known of a shard that sums pushes up."""

    version: int

    @property
    def summed_workers(self) -> set[int]:
        """Whose pushes are in the sum for the next version."""


@dataclass(frozen=True)
class _Wait:
    party: Party
    worker: int
    address: str
    at_least: int


class WaitWatch:
    """Pulls under way that ask for a version of a shard, by any worker."""

    def __init__(self) -> None:
        self._waits: set[_Wait] = set()

    @contextmanager
    def waiting(self, party: Party, worker: int, address: str, at_least: int) -> Iterator[None]:
        """A process waits in the block for this version."""
        wait = _Wait(party, worker, address, at_least)
        self._waits.add(wait)
        try:
            yield
        finally:
            self._waits.discard(wait)

    def check(self, shards: Mapping[str, Summing]) -> None:
        """Whoever waits has done all that the shard needs that is furthest behind."""
        least = min((shard.version for shard in shards.values()), default=0)
        behind = {name: each for name, each in shards.items() if each.version == least}
        for wait in self._waits:
            shard = shards.get(wait.address)  # none: of a session that is over
            if shard is None or shard.version >= wait.at_least or not wait.party.alive:
                continue
            for name, each in behind.items():
                if wait.worker not in each.summed_workers:
                    raise Violation(
                        f"worker {wait.worker} waits for version {wait.at_least} of "
                        f"{wait.address}, and {name} lacks its push at version {least}"
                    )
