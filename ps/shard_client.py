"""Calls to one shard: lanes, wire types, deadlines, retries."""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.lanes.lane import LaneName, LaneSettings, Wanted
from ps.messages import ShardStatus, sequences_from, status_from
from ps.push import Push
from ps.receipts import Receipt
from ps.retry import Retrying, RetryPolicy
from ps.route import Route, may_be_closed
from ps.server import TOKEN_KEY
from ps.snapshot import Pulled
from ps.state import ShardState
from ps.tls import Identity
from ps.wire import AS_IS, PushCast, WireSettings

T = TypeVar("T")

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
        self._pull_dtype, self._cast = wire.pull_dtype, PushCast(wire)
        self._metadata = ((TOKEN_KEY, token),)
        self._retrying = Retrying(address, retry, clock, sleep)
        self._open = lambda address: Route(address, self._metadata, lanes, identity)
        self._moving = threading.Lock()
        self._route, self._epoch = self._open(address), 0

    @property
    def address(self) -> str:
        """Of the server that has the shard, as far as is known here."""
        return self._route.address

    def follow(self, address: str, epoch: int) -> None:
        """The shard is served there now. Calls under way are made again there.

        Any thread may call. epoch: rises with each server that takes the place of another; one
        that doesn't comes late, and has no effect.
        """
        with self._moving:
            if epoch <= self._epoch:
                return
            self._epoch, before, self._route = epoch, self._route, self._open(address)
            self._retrying.address = address
        before.close()

    def give_up_if(self, is_lost: Callable[[], bool]) -> None:
        """A call that failed is not made again once this is so; any thread may ask it."""
        self._retrying.is_lost = is_lost

    def _call(self, call: Callable[[Route, float], T], extra_s: float = 0.0) -> T:
        """`call(route, timeout_s)` until it succeeds; see `Retrying`."""

        def attempt(timeout_s: float) -> T:
            route = self._route
            with may_be_closed(lambda: route is not self._route):
                return call(route, timeout_s)

        return self._retrying(attempt, extra_s)

    @property
    def lane(self) -> LaneName:
        """The lane that pulls and pushes take now."""
        return self._route.lane.name

    def connect(self) -> LaneName:
        """Settle which lane it is, rather than in the first pull or push.

        Raises InputError if the settings force one that doesn't work.
        """
        self._call(lambda route, t: route.lane.use(lambda lane: lane.open(t)))
        return self.lane

    def close(self) -> None:
        """End all calls under way."""
        self._route.close()

    def pull(
        self,
        parameters: Tensor,
        statistics: Tensor,
        at_least: int = 0,
        worker: int | None = None,
        filling: Callable[[], None] | None = None,
    ) -> Pulled:
        """Fill both float32 vectors with one version of the shard's ranges; returns which.

        Waits, for as long as it takes, until the shard has come to `at_least`, and until its policy
        lets `worker` pull, if it is a worker that will compute from what it gets; one is told what
        is in it. `filling` is called before each attempt's first write to the vectors.
        """
        waits = at_least > 0 or worker is not None
        wait_s = min(MAX_PULL_WAIT_S, self._retrying.policy.attempt_s / 2) if waits else 0.0
        wanted = Wanted(at_least, worker, wait_s, self._pull_dtype)
        if filling is not None:
            wanted = replace(wanted, filling=filling)

        def attempt(route: Route, timeout_s: float) -> Pulled | None:
            return route.lane.use(lambda lane: lane.pull(parameters, statistics, timeout_s, wanted))

        while (pulled := self._call(attempt)) is None:
            pass
        return pulled

    def push(self, push: Push) -> Receipt:
        """Send a push, in float32, until it is settled: once, however often it was sent.

        After ShardUnavailable the shard may still settle it, and in the shm lane read its vectors:
        send the same push again, or end this life of the worker.
        """
        return self._cast.send(push, self.forward)

    def forward(self, push: Push) -> Receipt:
        """Send a push in the dtype that it has; else as `push`."""
        return self._call(lambda route, t: route.lane.use(lambda lane: lane.push(push, t)))

    def describe(self) -> ShardStatus:
        """Clocks and counters."""
        request = pb.DescribeRequest()
        return status_from(
            self._call(lambda r, t: r.control.Describe(request, timeout=t, metadata=self._metadata))
        )

    def fence(self, worker: int, incarnation: int) -> Mapping[int, int]:
        """Refuse pushes of lives before `incarnation`; newest settled sequence of each life."""
        request = pb.FenceRequest(worker=worker, incarnation=incarnation)
        reply = self._call(
            lambda r, t: r.control.Fence(request, timeout=t, metadata=self._metadata)
        )
        return sequences_from([reply.clock])[worker]

    def expect(self, workers: Collection[int], number: int) -> None:
        """See `ShardService.expect`."""
        request = pb.ExpectRequest(workers=workers, number=number)
        self._call(lambda r, t: r.control.Expect(request, timeout=t, metadata=self._metadata))

    def enter(self, worker: int, incarnation: int, clock: int | None = None) -> int:
        """See `Shard.enter`."""
        request = pb.EnterRequest(worker=worker, incarnation=incarnation, clock=clock)
        reply = self._call(
            lambda r, t: r.control.Enter(request, timeout=t, metadata=self._metadata)
        )
        return int(reply.clock)

    def cut(self, name: str, version: int, wait_s: float, vectors: Sequence[str]) -> None:
        """Copy the state at `version`, or at the version that stands after `wait_s`."""
        request = pb.CutRequest(name=name, version=version, wait_s=wait_s, vectors=vectors)
        self._call(lambda r, t: r.control.Cut(request, timeout=t, metadata=self._metadata), wait_s)

    def read(self, name: str, into: Callable[[str, int], Tensor]) -> ShardState:
        """Fetch the copy that `cut` made."""
        return self._call(lambda route, t: route.bytes.read(name, into, t))

    def release(self, name: str) -> None:
        """Free the copy that `cut` made."""
        request = pb.ReleaseRequest(name=name)
        self._call(lambda r, t: r.control.Release(request, timeout=t, metadata=self._metadata))

    def load(self, state: ShardState) -> None:
        """Replace the shard's state."""
        self._call(lambda route, t: route.bytes.load(state, t))
