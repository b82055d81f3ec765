"""From what a caller did wrong to the status that tells it so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ps.lanes.stream import StreamError
from ps.replicated import Busy, Retired, StandbyLost
from ps.service import LateLoad, NotLoaded
from ps.shard import ForgottenReceipt
from ps.standby import NotInStep, OutOfTurn, Superseded

_STATUSES = {
    NotLoaded: grpc.StatusCode.FAILED_PRECONDITION,
    NotInStep: grpc.StatusCode.FAILED_PRECONDITION,
    StandbyLost: grpc.StatusCode.FAILED_PRECONDITION,
    Superseded: grpc.StatusCode.ABORTED,
    Retired: grpc.StatusCode.UNAVAILABLE,
    Busy: grpc.StatusCode.UNAVAILABLE,
}
"""INVALID_ARGUMENT for all others."""

REFUSED = (*_STATUSES, LateLoad, OutOfTurn, StreamError, DecodeError, ForgottenReceipt)
"""What a caller can mend; anything else is a bug of ours."""


def status_of(error: Exception) -> grpc.StatusCode:
    """The status for one of `REFUSED`."""
    return _STATUSES.get(type(error), grpc.StatusCode.INVALID_ARGUMENT)


@contextmanager
def answering(context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with a status for what its caller can mend."""
    try:
        yield
    except REFUSED as error:
        context.abort(status_of(error), str(error))


class DecodingInterceptor(grpc.ServerInterceptor):
    """Decodes requests in the handler's thread, where what can't be decoded is answered as such.

    gRPC itself would keep each call that it couldn't decode for ever: it ends it twice, and waits
    for the second end (grpcio 1.76).
    """

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The handler of the call, as one of raw bytes where it has a message of its own."""
        handler = continuation(handler_call_details)
        if handler is None or handler.unary_unary is None or handler.request_deserializer is None:
            return handler
        decode, behaviour = handler.request_deserializer, handler.unary_unary

        def decode_and_call(request: bytes, context: grpc.ServicerContext) -> Any:
            with answering(context):
                message = decode(request)
            return behaviour(message, context)

        return grpc.unary_unary_rpc_method_handler(
            decode_and_call, None, handler.response_serializer
        )
