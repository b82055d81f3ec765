"""The calling half of a connection: a ticket, the greeting, and one call after another."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

from protos import parameter_server_pb2 as pb
from ps.lanes.frames import MAX_ANSWER_NUM_BYTES, Wire
from ps.lanes.headers import pull_request
from ps.lanes.lane import LaneError, LaneUnavailable, NotAdmitted, Refused, Wanted
from ps.push import Push

HANDSHAKE_S = 10.0
"""A connection that isn't admitted within this time has failed."""

MAX_TIMEOUT_S = 86_400.0
"""Servers take no call that may last longer."""

W = TypeVar("W", bound=Wire)


@dataclass(frozen=True)
class Admitted(Generic[W]):
    """A connection that the server has let in, and the lengths of its vectors there."""

    wire: W
    num_parameters: int
    num_statistics: int

    @property
    def numels(self) -> tuple[int, int]:
        return self.num_parameters, self.num_statistics

    def check_length(self, push: Push) -> None:
        """Raises Refused for a push that the shard would refuse for its length."""
        given = (push.gradient.numel(), push.statistics_delta.numel())
        if given != self.numels:
            reason = f"{given} elements instead of {self.numels}"
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, reason)


class Caller(Generic[W]):
    """One connection, opened when it is needed; a call that fails in it ends it.

    connect(offer, timeout_s): a connection to where the server says it listens.
    """

    def __init__(
        self,
        offer: Callable[[float], pb.OpenLaneReply],
        connect: Callable[[pb.OpenLaneReply, float], W],
    ) -> None:
        self._offer, self._connect = offer, connect
        self._lock = threading.Lock()
        self._open: Admitted[W] | None = None
        self._closed = False

    @contextmanager
    def call(self, timeout_s: float) -> Iterator[Admitted[W]]:
        """The connection, for one call, which must end within `timeout_s`.

        Raises LaneError, and grpc.RpcError from asking for a ticket.
        """
        if not self._lock.acquire(timeout=timeout_s):
            raise LaneError("the deadline has passed while another call had the connection")
        try:
            self._drop_worn()
            admitted = self._open = self._open or self._admitted(timeout_s)
            admitted.wire.within(timeout_s)
            try:
                yield admitted
            except Refused:
                raise  # an answer like any other
            except BaseException:
                self._open = None
                admitted.wire.close()
                raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the connection, also under a call in another thread."""
        self._closed = True
        admitted = self._open
        if admitted is not None:
            admitted.wire.shutdown()
        if self._lock.acquire(blocking=False):
            try:
                if self._open is not None:
                    self._open.wire.close()
                self._open = None
            finally:
                self._lock.release()

    def _drop_worn(self) -> None:
        if self._open is not None and self._open.wire.is_worn:
            worn, self._open = self._open, None
            worn.wire.close()

    def _admitted(self, timeout_s: float) -> Admitted[W]:
        offer = self._offer(timeout_s)
        handshake_s = min(timeout_s, HANDSHAKE_S)
        wire = self._connect(offer, handshake_s)
        try:
            wire.within(handshake_s)
            welcome = _welcome(wire, offer.ticket)
        except BaseException:
            wire.close()
            raise
        if self._closed:
            wire.close()
            raise LaneError("the lane has been closed")
        return Admitted(wire, welcome.num_parameters, welcome.num_statistics)


def _welcome(wire: Wire, ticket: bytes) -> pb.Welcome:
    """What the server says to a ticket. Raises LaneUnavailable, NotAdmitted, Refused."""
    try:
        wire.handshake()
        wire.send_bytes(ticket)
        return answer_of(wire, "welcome").welcome
    except LaneUnavailable:
        raise
    except LaneError as error:
        raise NotAdmitted(f"not admitted: {error}") from error


def answer_of(wire: Wire, kind: str) -> pb.LaneAnswer:
    """The answer to a call. Raises Refused, or LaneError if it is of another kind."""
    answer = wire.receive(pb.LaneAnswer, MAX_ANSWER_NUM_BYTES)
    given = answer.WhichOneof("answer")
    if given == "refusal" and answer.refusal.status in grpc.StatusCode.__members__:
        raise Refused(grpc.StatusCode[answer.refusal.status], answer.refusal.reason)
    if given != kind:
        raise LaneError(f"an answer of kind {given} instead of {kind}")
    return answer


def pull_call(wanted: Wanted, timeout_s: float) -> pb.LaneCall:
    """The frame that asks for a version."""
    return pb.LaneCall(timeout_s=min(timeout_s, MAX_TIMEOUT_S), pull=pull_request(wanted))
