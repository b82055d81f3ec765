"""Replication over gRPC: what a server answers, and how its session and its primary call it.

Pushes travel from a primary to its standby as from a worker to a server, in a lane; all else by
gRPC.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import grpc

from model.errors import InputError
from protos import parameter_server_pb2 as pb
from protos import parameter_server_pb2_grpc as pb_grpc
from ps.answering import answering
from ps.image import Image
from ps.imaging import (
    image_from,
    image_header,
    operation_from,
    operation_message,
    order_from,
    order_message,
    room_for,
)
from ps.lanes.grpc import SERVICE, first_message
from ps.lanes.lane import LaneError, LaneSettings, Refused
from ps.lanes.stream import chunks, fill
from ps.operations import Operation
from ps.push import Order, Push
from ps.replica import Link, LinkDown, LinkRefused
from ps.replicated import ReplicatedService
from ps.retry import Retrying, RetryPolicy, ShardUnavailable, code_of
from ps.route import may_be_closed, open_channel
from ps.server import TOKEN_KEY
from ps.shard_client import ShardClient
from ps.standby import Echo, Superseded
from ps.tls import Identity

LINK_DEADLINE_S = 1.0
"""A call to a standby that fails is made again for so long; then it is asked whether to go on."""

Connect = Callable[[str], Link]
"""From a standby's address to the way there."""


def add_replication(server: grpc.Server, service: ReplicatedService, connect: Connect) -> None:
    """Have a server answer for a shard with a standby, or one that is one."""
    servicer = _ReplicationServicer(service, connect)
    pb_grpc.add_ReplicationServicer_to_server(servicer, server)
    seed = grpc.stream_unary_rpc_method_handler(servicer.seed, None, None)
    handlers = grpc.method_handlers_generic_handler(SERVICE, {"Seed": seed})
    server.add_generic_rpc_handlers((handlers,))


class _ReplicationServicer(pb_grpc.ReplicationServicer):
    def __init__(self, service: ReplicatedService, connect: Connect) -> None:
        self._service, self._connect = service, connect

    def Attach(self, request: pb.AttachRequest, context: grpc.ServicerContext) -> pb.AttachReply:
        with answering(context):
            self._service.attach(request.epoch, lambda: self._connect(request.address))
        return pb.AttachReply()

    def Detach(self, request: pb.EpochRequest, context: grpc.ServicerContext) -> pb.EpochReply:
        with answering(context):
            self._service.detach(request.epoch)
        return pb.EpochReply()

    def Promote(self, request: pb.EpochRequest, context: grpc.ServicerContext) -> pb.EpochReply:
        with answering(context):
            version = self._service.promote(request.epoch)
        return pb.EpochReply(version=version)

    def Retire(self, request: pb.EpochRequest, context: grpc.ServicerContext) -> pb.EpochReply:
        with answering(context):
            self._service.retire(request.epoch)
        return pb.EpochReply()

    def Follow(self, request: pb.Operation, context: grpc.ServicerContext) -> pb.OperationReply:
        order, echo = order_from(request.order), Echo()
        with answering(context):
            if request.WhichOneof("operation") == "complete":
                self._service.complete(order)
            else:
                echo = self._service.follow(order, operation_from(request))
        return pb.OperationReply(checksum=echo.checksum)

    def seed(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with answering(context):
            header = pb.ImageHeader.FromString(first_message(messages))
            vectors = room_for(header, self._service.config.vector_numels())
            fill(list(vectors.values()), messages)
            self._service.seed(order_from(header.order), image_from(header, vectors))
        return b""


class ReplicationClient:
    """One server, as seen by the session. Every method may raise ShardUnavailable, and
    grpc.RpcError where the server refuses."""

    def __init__(
        self,
        address: str,
        token: str,
        retry: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        identity: Identity | None = None,
    ) -> None:
        self.address = address
        self._metadata = ((TOKEN_KEY, token),)
        self._retrying = Retrying(address, retry, clock, sleep)
        self._channel, self._is_closed = open_channel(address, identity), False
        self._stub = pb_grpc.ReplicationStub(self._channel)
        self._seed = self._channel.stream_unary(f"/{SERVICE}/Seed", None, None)

    def close(self) -> None:
        """End calls under way, which then raise ShardUnavailable."""
        self._is_closed = True
        self._channel.close()

    def attach(self, standby: str, epoch: int) -> None:
        """See `ReplicatedService.attach`."""
        request = pb.AttachRequest(epoch=epoch, address=standby)
        self._call(lambda t: self._stub.Attach(request, timeout=t, metadata=self._metadata))

    def detach(self, epoch: int) -> None:
        """See `ReplicatedService.detach`."""
        request = pb.EpochRequest(epoch=epoch)
        self._call(lambda t: self._stub.Detach(request, timeout=t, metadata=self._metadata))

    def promote(self, epoch: int) -> int:
        """See `ReplicatedService.promote`."""
        request = pb.EpochRequest(epoch=epoch)
        reply: pb.EpochReply = self._call(
            lambda t: self._stub.Promote(request, timeout=t, metadata=self._metadata)
        )
        return reply.version

    def retire(self, epoch: int) -> None:
        """See `ReplicatedService.retire`."""
        request = pb.EpochRequest(epoch=epoch)
        self._call(lambda t: self._stub.Retire(request, timeout=t, metadata=self._metadata))

    def follow(self, message: pb.Operation) -> int:
        """See `ReplicatedService.follow` and `complete`; returns the checksum."""
        reply: pb.OperationReply = self._call(
            lambda t: self._stub.Follow(message, timeout=t, metadata=self._metadata)
        )
        return reply.checksum

    def seed(self, order: Order, image: Image) -> None:
        """See `ReplicatedService.seed`."""
        header = image_header(order, image).SerializeToString()
        vectors = list(image.vectors.values())
        self._call(
            lambda t: self._seed(
                chain((header,), chunks(vectors)), timeout=t, metadata=self._metadata
            )
        )

    def _call(self, call: Callable[[float], Any]) -> Any:
        def attempt(timeout_s: float) -> Any:
            with may_be_closed(lambda: self._is_closed):
                return call(timeout_s)

        return self._retrying(attempt)


class StandbyLink:
    """From a primary to its standby; see `Link`."""

    def __init__(
        self,
        address: str,
        token: str,
        retry: RetryPolicy,
        lanes: LaneSettings,
        identity: Identity | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """retry: of which the length of an attempt counts."""
        once = retry.model_copy(update={"deadline_s": LINK_DEADLINE_S})
        choice = "auto" if lanes.choice == "shm" else lanes.choice  # it is on another node
        lanes = LaneSettings(choice=choice)
        self._pushes = ShardClient(
            address, token, once, clock, sleep, lanes=lanes, identity=identity
        )
        self._others = ReplicationClient(address, token, once, clock, sleep, identity)
        self._is_closed = False

    def seed(self, order: Order, image: Image) -> None:
        """See Link."""
        with _as_of_a_link():
            self._others.seed(order, image)

    def follow(self, order: Order, operation: Operation) -> Echo:
        """See Link."""
        with _as_of_a_link(), may_be_closed(lambda: self._is_closed):
            if isinstance(operation, Push):
                receipt = self._pushes.forward(replace(operation, order=order))
                return Echo(replace(receipt, checksum=0), receipt.checksum)
            return Echo(checksum=self._others.follow(operation_message(order, operation)))

    def complete(self, order: Order) -> None:
        """See Link."""
        with _as_of_a_link():
            self._others.follow(pb.Operation(order=order_message(order), complete=True))

    def close(self) -> None:
        """See Link."""
        self._is_closed = True
        self._pushes.close()
        self._others.close()


@contextmanager
def _as_of_a_link() -> Iterator[None]:
    try:
        yield
    except (ShardUnavailable, LaneError) as error:
        raise LinkDown(str(error)) from error
    except InputError as error:
        raise LinkRefused(str(error)) from error
    except grpc.RpcError as error:
        reason = str(error.details()) if isinstance(error, grpc.Call | Refused) else str(error)
        if code_of(error) is grpc.StatusCode.ABORTED:
            raise Superseded(reason) from error
        raise LinkRefused(f"the standby refused: {reason}") from error
