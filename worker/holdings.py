"""What a worker still has of what it pulled, should the server that it came from be lost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ps.push import NewestPushes
from ps.snapshot import Pulled
from worker.exchange import Exchange
from worker.host_vectors import HostVectors

PulledVectors = Callable[[], tuple[Tensor, Tensor] | None]
"""Flat parameters and BN statistics as they were when work on them began; None if they are kept
nowhere."""

MAX_TRIES = 3
"""To read what may be overwritten meanwhile."""


@dataclass(frozen=True)
class HeldCopy:
    """A shard's part of parameters and BN statistics at one version: float32, on the host.

    Where pulls travel as bf16, the parameters are rounded to it.
    """

    version: int
    parameters: Tensor
    statistics: Tensor
    newest_pushes: NewestPushes
    """What is in it."""


class Holdings:
    """Tells which version of a shard there is, and copies it; nothing is kept for its sake.

    A pull lands in the host's vectors, which may be the model's own; work then begins on them, and
    changes the statistics, and with local steps the parameters. One thread calls `begin` and
    `end`, any other may ask.
    """

    def __init__(self, vectors: HostVectors, exchange: Exchange, pulled: PulledVectors) -> None:
        self._vectors, self._exchange, self._pulled = vectors, exchange, pulled
        self._begun: Sequence[Pulled] | None = None

    def begin(self, versions: Sequence[Pulled]) -> None:
        """Work on these versions has begun: `pulled` has them."""
        self._begun = versions

    def end(self) -> None:
        """Other versions take their place; what `pulled` has is about to change."""
        self._begun = None

    def version(self, shard: int) -> int | None:
        """The newest version of a shard that is here whole; None if there is none now."""
        found = self._source(shard)
        return found[0].version if found else None

    def copy(self, shard: int) -> HeldCopy | None:
        """The shard's part of that version."""
        ranges = self._exchange.layout.shards[shard]
        for _ in range(MAX_TRIES):
            found = self._source(shard)
            if found is None:
                return None
            held, parameters, statistics = found
            copy = HeldCopy(
                held.version,
                parameters[ranges.parameters.slice()].detach().to("cpu", copy=True),
                statistics[ranges.statistics.slice()].detach().to("cpu", copy=True),
                held.newest_pushes,
            )
            again = self._source(shard)
            # Still there, and in the same place: what was copied was whole.
            if again and again[0] == held and again[1] is parameters and again[2] is statistics:
                return copy
        return None

    def _source(self, shard: int) -> tuple[Pulled, Tensor, Tensor] | None:
        """The version, and the whole vectors that have this shard's part of it."""
        arrived, begun = self._exchange.pulled[shard], self._begun
        pulled = self._pulled()
        if pulled is None:
            return None
        parameters, statistics = pulled
        hosts = self._vectors
        apart = parameters.data_ptr() != hosts.parameters.data_ptr()
        if begun is not None and (begun[shard] == arrived or (arrived is None and apart)):
            return begun[shard], parameters, statistics
        if arrived is not None:
            return arrived, hosts.parameters, hosts.statistics
        return None
