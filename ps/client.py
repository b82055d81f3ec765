"""Pull and push over all shards: routing, deadlines, retries, receipts, cuts."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import grpc
import torch
from torch import Tensor

from protos import parameter_server_pb2 as pb
from protos import parameter_server_pb2_grpc as pb_grpc
from ps.lanes.choice import LaneChoice
from ps.lanes.grpc import ByteStreams
from ps.lanes.lane import Lane, LaneName, LaneSettings, LaneUnavailable
from ps.lanes.shm import ShmLane
from ps.lanes.tcp import TcpLane
from ps.layout import Layout, ShardRanges
from ps.messages import ShardStatus, WorkerSequences, sequences_from, status_from
from ps.push import Push
from ps.retry import Retrying, RetryPolicy, ShardUnavailable, code_of
from ps.schedule import Clocks
from ps.server import TOKEN_KEY
from ps.shard import Receipt, ShardState, vector_range

__all__ = [
    "ModelState",
    "ParameterClient",
    "RetryPolicy",
    "Settled",
    "ShardClient",
    "ShardUnavailable",
]

T = TypeVar("T")

_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # http_proxy is for the way out of a cluster, not within it
    ("grpc.max_reconnect_backoff_ms", 5000),  # by default 120 s, most of a call's deadline
)

MAX_PULL_WAIT_S = 5.0
"""A pull that waits for a version asks again so often: a waiting call holds a server's thread."""


GRPC_ONLY = LaneSettings(choice="grpc")


class ShardClient:
    """One shard, as seen by a caller. Every method may raise ShardUnavailable.

    Pulls and pushes take a lane; all else, and the first ticket to a lane, goes by gRPC.
    """

    def __init__(
        self,
        address: str,
        token: str,
        retry: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        lanes: LaneSettings = GRPC_ONLY,
    ) -> None:
        self.address = address
        self._metadata = ((TOKEN_KEY, token),)
        self._retrying = Retrying(address, retry, clock, sleep)
        self._channel = grpc.insecure_channel(address, _CHANNEL_OPTIONS)
        self._control = pb_grpc.ParameterServerStub(self._channel)
        self._bytes = ByteStreams(self._channel, self._metadata)
        self._lane = LaneChoice(address, self._lanes(lanes))

    def _lanes(self, settings: LaneSettings) -> list[Lane]:
        host = self.address.rpartition(":")[0].strip("[]")
        lanes: dict[LaneName, Lane] = {
            "shm": ShmLane(self._offer),
            "tcp": TcpLane(host, self._offer),
            "grpc": self._bytes,
        }
        return list(lanes.values()) if settings.choice == "auto" else [lanes[settings.choice]]

    def _offer(self, timeout_s: float) -> pb.OpenLaneReply:
        request = pb.OpenLaneRequest()
        try:
            offer: pb.OpenLaneReply = self._control.OpenLane(
                request, timeout=timeout_s, metadata=self._metadata
            )
            return offer
        except grpc.RpcError as error:
            if code_of(error) is grpc.StatusCode.UNIMPLEMENTED:
                raise LaneUnavailable("the shard knows no other lane than gRPC") from error
            raise

    @property
    def lane(self) -> LaneName:
        """The lane that pulls and pushes take now."""
        return self._lane.name

    def connect(self) -> LaneName:
        """Settle which lane it is, rather than in the first pull or push.

        Raises InputError if the settings force one that doesn't work.
        """
        self._retrying(lambda timeout_s: self._lane.use(lambda lane: lane.open(timeout_s)))
        return self.lane

    def close(self) -> None:
        """End all calls under way."""
        self._lane.close()
        self._channel.close()

    def pull(self, parameters: Tensor, statistics: Tensor, at_least: int = 0) -> int:
        """Fill both with one version of the shard's ranges; returns the version.

        Waits, for as long as it takes, until the shard has come to `at_least`.
        """
        wait_s = min(MAX_PULL_WAIT_S, self._retrying.policy.attempt_s / 2) if at_least else 0.0

        def attempt(timeout_s: float) -> int | None:
            return self._lane.use(
                lambda lane: lane.pull(
                    parameters, statistics, timeout_s, at_least=at_least, wait_s=wait_s
                )
            )

        while (version := self._retrying(attempt)) is None:
            pass
        return version

    def push(self, push: Push) -> Receipt:
        """Send a push until it is settled; it is settled once, however often it was sent.

        After ShardUnavailable the shard may still settle it, and in the shm lane read its vectors:
        send the same push again, or end this life of the worker.
        """
        return self._retrying(
            lambda timeout_s: self._lane.use(lambda lane: lane.push(push, timeout_s))
        )

    def describe(self) -> ShardStatus:
        """Clocks and counters."""
        request = pb.DescribeRequest()
        return status_from(
            self._retrying(
                lambda t: self._control.Describe(request, timeout=t, metadata=self._metadata)
            )
        )

    def fence(self, worker: int, incarnation: int) -> Mapping[int, int]:
        """Refuse pushes of lives before `incarnation`; newest settled sequence of each life."""
        request = pb.FenceRequest(worker=worker, incarnation=incarnation)
        reply = self._retrying(
            lambda t: self._control.Fence(request, timeout=t, metadata=self._metadata)
        )
        return sequences_from([reply.clock])[worker]

    def expect(self, workers: Collection[int]) -> None:
        """See `Shard.expect`."""
        request = pb.ExpectRequest(workers=workers)
        self._retrying(lambda t: self._control.Expect(request, timeout=t, metadata=self._metadata))

    def cut(self, name: str, version: int, wait_s: float, vectors: Sequence[str]) -> None:
        """Copy the state at `version`, or at the version that stands after `wait_s`."""
        request = pb.CutRequest(name=name, version=version, wait_s=wait_s, vectors=vectors)
        self._retrying(
            lambda t: self._control.Cut(request, timeout=t, metadata=self._metadata), wait_s
        )

    def read(self, name: str, into: Callable[[str, int], Tensor]) -> ShardState:
        """Fetch the copy that `cut` made."""
        return self._retrying(lambda timeout_s: self._bytes.read(name, into, timeout_s))

    def release(self, name: str) -> None:
        """Free the copy that `cut` made."""
        request = pb.ReleaseRequest(name=name)
        self._retrying(lambda t: self._control.Release(request, timeout=t, metadata=self._metadata))

    def load(self, state: ShardState) -> None:
        """Replace the shard's state."""
        self._retrying(lambda timeout_s: self._bytes.load(state, timeout_s))


@dataclass(frozen=True)
class Settled:
    """The newest push of a life that was settled; -1 for none."""

    everywhere: int
    """At every shard."""
    somewhere: int
    """At one shard at least."""


NOTHING_SETTLED = Settled(-1, -1)


@dataclass(frozen=True)
class ModelState:
    """The state of all shards: whole flat vectors, independent of the number of shards.

    `clocks` and `last_sequences` are of the shard that is behind: what they count is in every
    shard. `version_skew` is how many updates the shard ahead had more.
    """

    clocks: Clocks
    vectors: Mapping[str, Tensor]
    last_sequences: WorkerSequences
    version_skew: int = 0


class ParameterClient:
    """All shards as one: flat vectors in, flat vectors out, the shards served in parallel."""

    def __init__(
        self,
        addresses: Sequence[str],
        layout: Layout,
        token: str,
        retry: RetryPolicy,
        lanes: LaneSettings = GRPC_ONLY,
    ) -> None:
        """lanes: how pulls and pushes travel; gRPC alone will do for a caller of control calls."""
        assert len(addresses) == len(layout.shards)
        self.layout = layout
        self.shards = [ShardClient(each, token, retry, lanes=lanes) for each in addresses]
        # A push must not wait for a pull that waits for what the push would bring about.
        self._threads = ThreadPoolExecutor(2 * len(addresses), thread_name_prefix="ps-client")

    @property
    def lanes(self) -> list[LaneName]:
        """The lane to each shard."""
        return [shard.lane for shard in self.shards]

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
        self, parameters: Tensor, statistics: Tensor, at_least: Sequence[int] | None = None
    ) -> list[int]:
        """Fill the flat vectors; returns the version of each shard.

        at_least: a version for each shard, which is waited for, for as long as it takes.
        Raises ShardUnavailable; the vectors' contents are then arbitrary.
        """

        def call(shard: ShardClient, ranges: ShardRanges, index: int) -> int:
            return shard.pull(
                parameters[ranges.parameters.slice()],
                statistics[ranges.statistics.slice()],
                at_least[index] if at_least else 0,
            )

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
        """Tell every shard which workers are still at work; see `Shard.expect`."""
        self._each(lambda shard, _, __: shard.expect(workers))

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

    def load(self, state: ModelState) -> None:
        """Replace the state of all shards; receipts are forgotten."""

        def call(shard: ShardClient, ranges: ShardRanges, _: int) -> None:
            vectors = {
                name: vector[vector_range(ranges, name).slice()]
                for name, vector in state.vectors.items()
            }
            shard.load(ShardState(state.clocks, vectors))

        self._each(call)


def cut_lead(num_shards: int) -> int:
    """How many updates ahead a cut's version lies: room for pushes that land while it is set."""
    return 1 + num_shards


def _join(states: Sequence[ShardState], vectors: Mapping[str, Tensor]) -> ModelState:
    clocks = min((state.clocks for state in states), key=lambda c: c.updates)
    ahead = max(state.clocks.updates for state in states)
    sequences = behind([state.last_sequences for state in states])
    return ModelState(clocks, vectors, sequences, ahead - clocks.updates)


def behind(sequences: Sequence[WorkerSequences]) -> dict[int, dict[int, int]]:
    """By worker and life, the newest sequence that all shards have settled."""
    common: dict[int, dict[int, int]] = {}
    for worker in set.intersection(*(set(each) for each in sequences)):
        lives = [each[worker] for each in sequences]
        shared = set.intersection(*(set(life) for life in lives))
        common[worker] = {life: min(each[life] for each in lives) for life in sorted(shared)}
    return common
