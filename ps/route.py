"""The way to one server: its channel, and the lanes that work between it and this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import grpc

from model.errors import InputError
from protos import parameter_server_pb2 as pb
from protos import parameter_server_pb2_grpc as pb_grpc
from ps.lanes import liveness
from ps.lanes.choice import LaneChoice
from ps.lanes.grpc import ByteStreams, Metadata
from ps.lanes.lane import Lane, LaneError, LaneName, LaneSettings, LaneUnavailable
from ps.lanes.shm import ShmLane
from ps.lanes.tcp import TcpLane
from ps.lanes.tls_wire import TlsWire
from ps.retry import code_of
from ps.tls import Identity

_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # http_proxy is for the way out of a cluster, not within it
    ("grpc.initial_reconnect_backoff_ms", 100),  # by default 1 s, in which calls fail untried
    ("grpc.max_reconnect_backoff_ms", 5000),  # by default 120 s, most of a call's deadline
)


def open_channel(address: str, identity: Identity | None) -> grpc.Channel:
    """identity: for servers that have one."""
    options = (*_CHANNEL_OPTIONS, *liveness.channel_options())
    if identity is not None:
        return identity.channel(address, options)
    return grpc.insecure_channel(address, options)


@contextmanager
def may_be_closed(is_closed: Callable[[], bool]) -> Iterator[None]:
    """Calls in the block may meet a channel that another thread has closed: LaneError."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:  # gRPC's, if the call had not begun yet
        if not is_closed():
            raise
        raise LaneError("the channel has been closed") from error


class Route:
    """What a caller has of one server."""

    def __init__(
        self, address: str, metadata: Metadata, lanes: LaneSettings, identity: Identity | None
    ) -> None:
        self.address, self._metadata = address, metadata
        self._channel = open_channel(address, identity)
        self.control = pb_grpc.ParameterServerStub(self._channel)
        self.bytes = ByteStreams(self._channel, metadata)
        self.lane = LaneChoice(address, self._lanes(lanes, identity))

    def _lanes(self, settings: LaneSettings, identity: Identity | None) -> list[Lane]:
        makers: dict[LaneName, Callable[[], Lane]] = {
            "shm": lambda: ShmLane(self._offer),
            "tcp": lambda: self._tcp(identity),
            "grpc": lambda: self.bytes,
        }
        if settings.choice != "auto":
            return [makers[settings.choice]()]
        return [make() for make in makers.values()]

    def _tcp(self, identity: Identity | None) -> TcpLane:
        host = self.address.rpartition(":")[0].strip("[]")
        if identity is None:
            return TcpLane(host, self._offer)
        name = identity.name or host
        return TcpLane(
            host, self._offer, partial(TlsWire, context=identity.caller_context(), server_name=name)
        )

    def _offer(self, timeout_s: float) -> pb.OpenLaneReply:
        request = pb.OpenLaneRequest()
        try:
            offer: pb.OpenLaneReply = self.control.OpenLane(
                request, timeout=timeout_s, metadata=self._metadata
            )
            return offer
        except grpc.RpcError as error:
            if code_of(error) is grpc.StatusCode.UNIMPLEMENTED:
                raise LaneUnavailable("the shard knows no other lane than gRPC") from error
            raise

    def close(self) -> None:
        """End all calls under way."""
        self.lane.close()
        self._channel.close()
