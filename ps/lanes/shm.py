"""The shm lane: vectors stay in memory that both processes map, both halves side by side.

A push copies nothing: the shard reads the gradient where backpropagation left it. A pull is one
copy, by the worker, out of a pinned version; a worker that wants bf16 rounds what it copies, as
nothing would be saved by travelling in it. Frames tell each side what the other may read.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.lanes.calling import MAX_TIMEOUT_S, Caller, answer_of, pull_call
from ps.lanes.headers import pulled_from, push_header
from ps.lanes.lane import NEWEST, LaneError, LaneName, LaneUnavailable, Wanted
from ps.lanes.memory_wire import MemoryWire
from ps.lanes.segment import segment_of, shared_zeros
from ps.lanes.serving import Serving
from ps.lanes.stream import copy_rounded
from ps.messages import receipt_from
from ps.push import Push
from ps.shard import Receipt
from ps.snapshot import Pulled, Snapshot


class ShmServing(Serving[MemoryWire]):
    """The serving half of one connection."""

    def _travels_as(self, wanted: torch.dtype) -> torch.dtype:
        return torch.float32

    def _hand_over(self, answer: pb.LaneAnswer, snapshot: Snapshot, dtype: torch.dtype) -> None:
        try:
            answer.memory.CopyFrom(self._wire.show((snapshot.parameters, snapshot.statistics)))
            self._wire.send(answer)
            if not self._wire.receive(pb.LaneCall).released:
                raise LaneError("a call before the pulled version was released")
        except BaseException:
            # Before the pin goes, so that a peer that is still copying can't send its release:
            # on a Unix socket, unlike TCP, an end is seen at once.
            self._wire.shutdown()
            raise

    @contextmanager
    def _received(self, call: pb.LaneCall, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        gradient, statistics_delta = self._wire.views(call.memory, self._numels, dtype)
        yield gradient, statistics_delta


class ShmLane:
    """The calling half: one connection for pulls and one for pushes, so that neither waits."""

    name: Final[LaneName] = "shm"

    def __init__(self, offer: Callable[[float], pb.OpenLaneReply]) -> None:
        self._pulls, self._pushes = Caller(offer, _connect), Caller(offer, _connect)
        self._mailboxes = [torch.empty(0), torch.empty(0)]

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
            wire = admitted.wire
            numels = (parameters.numel(), statistics.numel())
            assert numels == admitted.numels, "the shard has another layout"
            wire.send(pull_call(replace(wanted, dtype=torch.float32), timeout_s))
            answer = answer_of(wire, "pull")
            if answer.pull.not_yet:
                return None
            pinned = wire.views(answer.memory, numels)
            wanted.filling()
            if wanted.dtype == torch.float32:
                parameters.copy_(pinned[0])
            else:
                copy_rounded(parameters, pinned[0], wire.block)
            statistics.copy_(pinned[1])
            wire.send(pb.LaneCall(released=True))  # fails if the pin went before the copy was done
            return pulled_from(answer.pull)

    def push(self, push: Push, timeout_s: float) -> Receipt:
        """See Lane. Vectors that aren't in shared memory are copied there first."""
        call = pb.LaneCall(timeout_s=min(timeout_s, MAX_TIMEOUT_S), push=push_header(push))
        with self._pushes.call(timeout_s) as admitted:
            admitted.check_length(push)
            vectors = [self._shared(0, push.gradient), self._shared(1, push.statistics_delta)]
            call.memory.CopyFrom(admitted.wire.show(vectors))
            admitted.wire.send(call)
            return receipt_from(answer_of(admitted.wire, "receipt").receipt)

    def _shared(self, index: int, vector: Tensor) -> Tensor:
        """The vector if it lies in a segment, or else a copy that does."""
        if segment_of(vector):
            return vector
        mailbox = self._mailboxes[index]
        if mailbox.shape != vector.shape or mailbox.dtype != vector.dtype:
            mailbox = self._mailboxes[index] = shared_zeros(vector.numel(), vector.dtype)
        return mailbox.copy_(vector)

    def close(self) -> None:
        """See Lane."""
        self._pulls.close()
        self._pushes.close()


def _connect(offer: pb.OpenLaneReply, timeout_s: float) -> MemoryWire:
    """That it connects shows that both share a host: abstract names are a host's own."""
    if not offer.shm_socket:
        raise LaneUnavailable("the shard offers no shm lane")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"\0{offer.shm_socket}")
        return MemoryWire(connection)
    except OSError as error:
        connection.close()
        raise LaneUnavailable(f"the shard is not on this host ({error})") from error
    except BaseException:
        connection.close()
        raise
