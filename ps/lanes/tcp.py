"""The tcp lane: bytes straight between a socket and flat vectors, both halves side by side."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.lanes.calling import MAX_TIMEOUT_S, Caller, answer_of, pull_call
from ps.lanes.frames import Wire
from ps.lanes.headers import check_dtype, pulled_from, push_header
from ps.lanes.lane import NEWEST, LaneName, LaneUnavailable, Wanted
from ps.lanes.serving import Serving
from ps.messages import receipt_from
from ps.push import Push
from ps.shard import Receipt
from ps.snapshot import Pulled, Snapshot


class TcpServing(Serving[Wire]):
    """The serving half of one connection."""

    def _hand_over(self, answer: pb.LaneAnswer, snapshot: Snapshot, dtype: torch.dtype) -> None:
        self._wire.send(answer)
        self._wire.send_as(dtype, snapshot.parameters)
        self._wire.send_vectors((snapshot.statistics,))

    @contextmanager
    def _received(self, call: pb.LaneCall, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        with self._service.staging(dtype) as staging:
            vectors = (staging.gradient, staging.statistics_delta)
            self._wire.receive_vectors(vectors)
            yield vectors


class TcpLane:
    """The calling half: one connection for pulls and one for pushes, so that neither waits."""

    name: Final[LaneName] = "tcp"

    def __init__(
        self,
        host: str,
        offer: Callable[[float], pb.OpenLaneReply],
        wire: Callable[[socket.socket], Wire] = Wire,
    ) -> None:
        """wire: makes one of a connected socket."""

        def connect(offer: pb.OpenLaneReply, timeout_s: float) -> Wire:
            return _connect(host, offer.tcp_port, timeout_s, wire)

        self._pulls, self._pushes = Caller(offer, connect), Caller(offer, connect)

    def open(self, timeout_s: float) -> None:
        """See Lane."""
        with self._pulls.call(timeout_s):
            pass

    def pull(
        self,
        parameters: Tensor,
        statistics: Tensor,
        timeout_s: float,
        wanted: Wanted = NEWEST,
    ) -> Pulled | None:
        """See Lane."""
        with self._pulls.call(timeout_s) as admitted:
            numels = (parameters.numel(), statistics.numel())
            assert numels == admitted.numels, "the shard has another layout"
            admitted.wire.send(pull_call(wanted, timeout_s))
            header = answer_of(admitted.wire, "pull").pull
            if header.not_yet:
                return None
            check_dtype(header, wanted.dtype)
            wanted.filling()
            admitted.wire.receive_as(wanted.dtype, parameters)
            admitted.wire.receive_vectors((statistics,))
            return pulled_from(header)

    def push(self, push: Push, timeout_s: float) -> Receipt:
        """See Lane."""
        call = pb.LaneCall(timeout_s=min(timeout_s, MAX_TIMEOUT_S), push=push_header(push))
        with self._pushes.call(timeout_s) as admitted:
            admitted.check_length(push)
            admitted.wire.send(call)
            admitted.wire.send_vectors((push.gradient, push.statistics_delta))
            return receipt_from(answer_of(admitted.wire, "receipt").receipt)

    def close(self) -> None:
        """See Lane."""
        self._pulls.close()
        self._pushes.close()


def _connect(host: str, port: int, timeout_s: float, wire: Callable[[socket.socket], Wire]) -> Wire:
    if not port:
        raise LaneUnavailable("the shard offers no tcp lane")
    try:
        return wire(socket.create_connection((host, port), timeout_s))
    except OSError as error:
        raise LaneUnavailable(f"no connection to port {port} of {host}: {error}") from error
