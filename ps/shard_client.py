"""Calls to one shard: lanes, wire types, deadlines, retries."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import grpc
from torch import Tensor

from protos import parameter_server_pb2 as pb
from protos import parameter_server_pb2_grpc as pb_grpc
from ps.lanes.choice import LaneChoice
from ps.lanes.grpc import ByteStreams
from ps.lanes.lane import Lane, LaneName, LaneSettings, LaneUnavailable, Wanted
from ps.lanes.shm import ShmLane
from ps.lanes.tcp import TcpLane
from ps.messages import ShardStatus, sequences_from, status_from
from ps.push import Push
from ps.receipts import Receipt
from ps.retry import Retrying, RetryPolicy, code_of
from ps.server import TOKEN_KEY
from ps.state import ShardState
from ps.tls import Identity
from ps.wire import AS_IS, PushCast, WireSettings

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
        wire: WireSettings = AS_IS,
        identity: Identity | None = None,
    ) -> None:
        """identity: for servers that have one."""
        self.address = address
        self._pull_dtype, self._cast = wire.pull_dtype, PushCast(wire)
        self._metadata = ((TOKEN_KEY, token),)
        self._retrying = Retrying(address, retry, clock, sleep)
        self._channel = (
            identity.channel(address, _CHANNEL_OPTIONS)
            if identity
            else grpc.insecure_channel(address, _CHANNEL_OPTIONS)
        )
        self._may_use_tcp = identity is None
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
        if settings.choice != "auto":
            return [lanes[settings.choice]]
        return [lane for name, lane in lanes.items() if self._may_use_tcp or name != "tcp"]

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

    def pull(
        self,
        parameters: Tensor,
        statistics: Tensor,
        at_least: int = 0,
        worker: int | None = None,
        filling: Callable[[], None] | None = None,
    ) -> int:
        """Fill both float32 vectors with one version of the shard's ranges; returns the version.

        Waits, for as long as it takes, until the shard has come to `at_least`, and until its policy
        lets `worker` pull, if it is a worker that will compute from what it gets. `filling` is
        called before each attempt's first write to the vectors.
        """
        waits = at_least > 0 or worker is not None
        wait_s = min(MAX_PULL_WAIT_S, self._retrying.policy.attempt_s / 2) if waits else 0.0
        wanted = Wanted(at_least, worker, wait_s, self._pull_dtype)
        if filling is not None:
            wanted = replace(wanted, filling=filling)

        def attempt(timeout_s: float) -> int | None:
            return self._lane.use(lambda lane: lane.pull(parameters, statistics, timeout_s, wanted))

        while (version := self._retrying(attempt)) is None:
            pass
        return version

    def push(self, push: Push) -> Receipt:
        """Send a push, in float32, until it is settled: once, however often it was sent.

        After ShardUnavailable the shard may still settle it, and in the shm lane read its vectors:
        send the same push again, or end this life of the worker.
        """
        return self._cast.send(push, self._send)

    def _send(self, push: Push) -> Receipt:
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

    def expect(self, workers: Collection[int], number: int) -> None:
        """See `ShardService.expect`."""
        request = pb.ExpectRequest(workers=workers, number=number)
        self._retrying(lambda t: self._control.Expect(request, timeout=t, metadata=self._metadata))

    def enter(self, worker: int, incarnation: int, clock: int | None = None) -> int:
        """See `Shard.enter`."""
        request = pb.EnterRequest(worker=worker, incarnation=incarnation, clock=clock)
        reply = self._retrying(
            lambda t: self._control.Enter(request, timeout=t, metadata=self._metadata)
        )
        return int(reply.clock)

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
