"""Pull and push over all shards at once: routing, receipts, cuts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from ps.lanes.lane import LaneName, LaneSettings
from ps.layout import Layout, ShardRanges
from ps.messages import ShardStatus, WorkerSequences
from ps.push import Push
from ps.receipts import Receipt, Settled
from ps.retry import RetryPolicy, ShardUnavailable
from ps.schedule import Clocks
from ps.shard_client import GRPC_ONLY, ShardClient
from ps.state import ShardState, vector_range
from ps.tls import Identity
from ps.wire import AS_IS, WireSettings

__all__ = [
    "ModelState",
    "ParameterClient",
    "RetryPolicy",
    "ShardClient",
    "ShardUnavailable",
]

T = TypeVar("T")


@dataclass(frozen=True)
class ModelState:
    """The state of all shards: whole flat vectors, independent of the number of shards.

    `clocks` and `last_sequences` are of the shard that is behind: what they count is in every
    shard. `version_skew` is how many updates the shard ahead had more, and what
    `newest_sequences` counts is in one shard at least.
    """

    clocks: Clocks
    vectors: Mapping[str, Tensor]
    last_sequences: WorkerSequences
    version_skew: int = 0
    newest_sequences: WorkerSequences = field(default_factory=dict)


class ParameterClient:
    """All shards as one: flat vectors in, flat vectors out, the shards served in parallel."""

    def __init__(
        self,
        addresses: Sequence[str],
        layout: Layout,
        token: str,
        retry: RetryPolicy,
        lanes: LaneSettings = GRPC_ONLY,
        wire: WireSettings = AS_IS,
        identity: Identity | None = None,
    ) -> None:
        """lanes: how pulls and pushes travel; gRPC alone will do for a caller of control calls.

        With `wire.error_feedback`, a client is one worker's.
        """
        assert len(addresses) == len(layout.shards)
        self.layout = layout
        self.shards = [
            ShardClient(address, token, retry, lanes=lanes, wire=wire, identity=identity)
            for address in addresses
        ]
        self._num_expectations = 0
        # A push must not wait for a pull that waits for what the push would bring about.
        self._threads = ThreadPoolExecutor(2 * len(addresses), thread_name_prefix="ps-client")

    @property
    def lanes(self) -> list[LaneName]:
        """The lane to each shard."""
        return [shard.lane for shard in self.shards]

    def follow(self, shard: int, address: str, epoch: int) -> None:
        """A shard is served there now; see `ShardClient.follow`."""
        self.shards[shard].follow(address, epoch)

    def give_up_if(self, is_lost: Callable[[int], bool]) -> None:
        """Make no call again to a shard of which this is so; see `ShardClient.give_up_if`."""
        for index, shard in enumerate(self.shards):
            shard.give_up_if(partial(is_lost, index))

    def connect(self) -> list[LaneName]:
        """Settle which lane each shard is reached by; see `ShardClient.connect`."""
        return self._each(lambda shard, _, __: shard.connect())

    def close(self) -> None:
        """End all calls under way."""
        for shard in self.shards:
            shard.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _each(self, call: Callable[[ShardClient, ShardRanges, int], T]) -> list[T]:
        if len(self.shards) == 1:
            return [call(self.shards[0], self.layout.shards[0], 0)]
        calls = [
            self._threads.submit(call, shard, ranges, index)
            for index, (shard, ranges) in enumerate(
                zip(self.shards, self.layout.shards, strict=True)
            )
        ]
        # All calls end before an error is raised: none may use the caller's vectors after that.
        for ending in calls:
            ending.exception()
        return [ended.result() for ended in calls]

    def pull(
        self,
        parameters: Tensor,
        statistics: Tensor,
        at_least: Sequence[int] | None = None,
        worker: int | None = None,
    ) -> list[int]:
        """Fill the flat vectors; returns the version of each shard.

        at_least: a version for each shard, which is waited for, for as long as it takes.
        worker: who will compute from what is pulled, if anyone; see `ShardClient.pull`.
        Raises ShardUnavailable; the vectors' contents are then arbitrary.
        """

        def call(shard: ShardClient, ranges: ShardRanges, index: int) -> int:
            return shard.pull(
                parameters[ranges.parameters.slice()],
                statistics[ranges.statistics.slice()],
                at_least[index] if at_least else 0,
                worker,
            ).version

        return self._each(call)

    def push(
        self,
        worker: int,
        incarnation: int,
        sequence: int,
        pulled_versions: Sequence[int],
        num_samples: int,
        gradient: Tensor,
        statistics_delta: Tensor,
    ) -> list[Receipt]:
        """Send the flat gradient (mean over `num_samples`) and BN deltas to their shards.

        Returns each shard's receipt. Raises ShardUnavailable; the same push, sent again, is
        settled only where it wasn't yet.
        """

        def call(shard: ShardClient, ranges: ShardRanges, index: int) -> Receipt:
            return shard.push(
                Push(
                    worker,
                    incarnation,
                    sequence,
                    pulled_versions[index],
                    num_samples,
                    gradient[ranges.parameters.slice()],
                    statistics_delta[ranges.statistics.slice()],
                )
            )

        return self._each(call)

    def describe(self) -> list[ShardStatus]:
        """Clocks and counters of each shard."""
        return self._each(lambda shard, _, __: shard.describe())

    def fence(self, worker: int, incarnation: int) -> dict[int, Settled]:
        """Refuse pushes of lives before `incarnation`, at every shard.

        Returns how far each life's pushes had come.
        """
        shards = self._each(lambda shard, _, __: shard.fence(worker, incarnation))
        by_life = {
            life: [sequences.get(life, -1) for sequences in shards]
            for life in sorted(set().union(*shards))
        }
        return {life: Settled(min(each), max(each)) for life, each in by_life.items()}

    def expect(self, workers: Collection[int]) -> None:
        """Tell every shard which workers are still at work; see `Shard.expect`.

        One client of a run makes these calls, one after another.
        """
        self._num_expectations += 1
        number = self._num_expectations
        self._each(lambda shard, _, __: shard.expect(workers, number))

    def enter(self, worker: int, incarnation: int) -> None:
        """Put a new life of a worker at work, at the same clock at every shard."""
        clock = max(self._each(lambda shard, _, __: shard.enter(worker, incarnation)))
        self._each(lambda shard, _, __: shard.enter(worker, incarnation, clock))

    def cut(self, name: str, vectors: Sequence[str] = (), wait_s: float = 10.0) -> None:
        """Copy every shard's state at one and the same version, without holding training up.

        The version lies a few updates ahead of the shard that is ahead; a shard that doesn't
        reach it within `wait_s` is copied where it stands. `wait_s` = 0: all where they stand.
        """
        ahead = max(status.clocks.updates for status in self.describe())
        target = ahead + cut_lead(len(self.shards)) if wait_s else 0
        self._each(lambda shard, _, __: shard.cut(name, target, wait_s, vectors))

    def read(self, name: str) -> ModelState:
        """Fetch the copies that `cut` made, joined to whole flat vectors."""
        vectors: dict[str, Tensor] = {}

        def room(ranges: ShardRanges, vector: str, numel: int) -> Tensor:
            span = vector_range(ranges, vector)
            assert span.numel == numel, f"{vector}: {numel} elements instead of {span.numel}"
            return self._whole(vectors, vector)[span.slice()]

        states = self._each(
            lambda shard, ranges, _: shard.read(name, lambda v, n: room(ranges, v, n))
        )
        return _join(states, vectors)

    def _whole(self, vectors: dict[str, Tensor], name: str) -> Tensor:
        if name not in vectors:
            last = vector_range(self.layout.shards[-1], name)
            vectors.setdefault(name, torch.empty(last.stop))
        return vectors[name]

    def release(self, name: str) -> None:
        """Free the copies that `cut` made."""
        self._each(lambda shard, _, __: shard.release(name))

    def load(self, state: ModelState, clocks: Sequence[Clocks] | None = None) -> None:
        """Replace the state of all shards; receipts are forgotten, the newest sequences kept.

        clocks: of each shard, where they differ.
        """

        def call(shard: ShardClient, ranges: ShardRanges, index: int) -> None:
            vectors = {
                name: vector[vector_range(ranges, name).slice()]
                for name, vector in state.vectors.items()
            }
            own = clocks[index] if clocks else state.clocks
            shard.load(ShardState(own, vectors, state.last_sequences))

        self._each(call)


def cut_lead(num_shards: int) -> int:
    """How many updates ahead a cut's version lies: room for pushes that land while it is set."""
    return 1 + num_shards


def _join(states: Sequence[ShardState], vectors: Mapping[str, Tensor]) -> ModelState:
    clocks = min((state.clocks for state in states), key=lambda c: c.updates)
    skew = max(state.clocks.updates for state in states) - clocks.updates
    sequences = [state.last_sequences for state in states]
    return ModelState(clocks, vectors, behind(sequences), skew, ahead(sequences))


def behind(sequences: Sequence[WorkerSequences]) -> dict[int, dict[int, int]]:
    """By worker and life, the newest sequence that all shards have settled."""
    common: dict[int, dict[int, int]] = {}
    for worker in set.intersection(*(set(each) for each in sequences)):
        lives = [each[worker] for each in sequences]
        shared = set.intersection(*(set(life) for life in lives))
        common[worker] = {life: min(each[life] for each in lives) for life in sorted(shared)}
    return common


def ahead(sequences: Sequence[WorkerSequences]) -> dict[int, dict[int, int]]:
    """By worker and life, the newest sequence that any of these has settled."""
    newest: dict[int, dict[int, int]] = {}
    for worker, lives in chain.from_iterable(each.items() for each in sequences):
        known = newest.setdefault(worker, {})
        known.update({life: max(known.get(life, -1), last) for life, last in lives.items()})
    return newest
