"""The serving half of a connection that has been admitted: one call after another."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Generic

import torch
from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.answering import REFUSED, status_of
from ps.lanes.calling import HANDSHAKE_S, MAX_TIMEOUT_S, W
from ps.lanes.headers import asker, dtype_from, lengths_of, pull_header, push_from
from ps.lanes.lane import LaneError
from ps.lanes.stream import StreamError
from ps.messages import receipt_message
from ps.service import ShardService
from ps.snapshot import Snapshot

MAX_REASON_LENGTH = 400
"""Characters of a refusal's reason: it must fit a frame."""


class Serving(ABC, Generic[W]):
    """Serves one connection until its peer leaves, or LaneError ends it.

    A call takes no longer than its caller waits, so that a peer that stalls holds neither this
    thread nor a pin for ever.
    """

    def __init__(self, service: ShardService, wire: W) -> None:
        self._service, self._wire = service, wire
        ranges = service.config.ranges
        self._numels = (ranges.parameters.numel, ranges.statistics.numel)

    def welcome(self) -> None:
        """Tell the peer that it is in."""
        welcome = pb.Welcome(num_parameters=self._numels[0], num_statistics=self._numels[1])
        self._wire.send(pb.LaneAnswer(welcome=welcome))

    def serve(self) -> None:
        """Answer calls. Raises LaneError when the connection fails or the peer speaks nonsense."""
        while self._wire.wait():
            self._wire.within(HANDSHAKE_S)
            call = self._wire.receive(pb.LaneCall)
            if not 0 < call.timeout_s <= MAX_TIMEOUT_S:
                raise LaneError(f"timeout_s = {call.timeout_s}")
            self._wire.within(call.timeout_s)
            self._answer(call)

    def _answer(self, call: pb.LaneCall) -> None:
        kind = call.WhichOneof("call")
        try:
            if kind == "pull":
                self._pull(call)
            elif kind == "push":
                self._push(call)
            else:
                raise LaneError(f"a call of kind {kind} out of turn")
        except REFUSED as error:
            refusal = pb.Refusal(
                status=status_of(error).name, reason=str(error)[:MAX_REASON_LENGTH]
            )
            self._wire.send(pb.LaneAnswer(refusal=refusal))

    def _pull(self, call: pb.LaneCall) -> None:
        wanted = call.pull
        if not 0 <= wanted.wait_s <= call.timeout_s:
            raise StreamError(f"wait_s = {wanted.wait_s}")
        worker, dtype = asker(wanted), self._travels_as(dtype_from(wanted.dtype))
        if not self._service.reached(wanted.at_least, wanted.wait_s, worker):
            self._wire.send(pb.LaneAnswer(pull=pb.PullHeader(not_yet=True)))
            return
        with self._service.pinned(worker) as snapshot:
            answer = pb.LaneAnswer(pull=pull_header(snapshot, dtype, worker))
            self._hand_over(answer, snapshot, dtype)

    def _travels_as(self, wanted: torch.dtype) -> torch.dtype:
        """What parameters travel in, if a caller wants them in a dtype."""
        return wanted

    def _push(self, call: pb.LaneCall) -> None:
        header = call.push
        given = lengths_of(header)
        if given != self._numels:  # where the next frame begins is anyone's guess
            raise LaneError(f"a push of {given} elements instead of {self._numels}")
        with self._received(call, self._dtype_of(header)) as (gradient, statistics_delta):
            receipt = self._service.push(push_from(header, gradient, statistics_delta))
        self._wire.send(pb.LaneAnswer(receipt=receipt_message(receipt)))

    @staticmethod
    def _dtype_of(header: pb.PushHeader) -> torch.dtype:
        try:
            return dtype_from(header.dtype)
        except StreamError as error:  # again, where does the next frame begin?
            raise LaneError(f"a push with {error}") from error

    @abstractmethod
    def _hand_over(self, answer: pb.LaneAnswer, snapshot: Snapshot, dtype: torch.dtype) -> None:
        """Give the peer what it pulled; it has it, or the connection is over, on return."""

    @abstractmethod
    def _received(
        self, call: pb.LaneCall, dtype: torch.dtype
    ) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """Gradient, in its dtype, and deltas of a push, whole, inside the block."""
