"""Who waits for a version that others are to make, while others may be waiting for it.

A shard that is behind all others goes on only with a push of each worker, or of enough of them.
If one of those waits for another shard's next version, nobody may ever go on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from asynception.simulate.world import NoProgress, Party, Violation, current

LONGEST_S = 60.0
"""Nothing that befalls a run takes so long, but for nodes that are away, and nobody is to wait for
workers without a node."""


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
        """A process waits in the block for this version, or until it may pull."""
        wait, began_s = _Wait(party, worker, address, at_least), current().now_s
        self._waits.add(wait)
        try:
            yield
        finally:
            self._waits.discard(wait)
        waited_s = current().now_s - began_s
        if waited_s > LONGEST_S:
            raise NoProgress(f"worker {worker} waited {waited_s:.0f} s for {address}")

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
