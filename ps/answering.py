"""From what a caller did wrong to the status that tells it so."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError

from ps.lanes.stream import StreamError
from ps.service import LateLoad, NotLoaded
from ps.shard import ForgottenReceipt

REFUSED = (NotLoaded, LateLoad, StreamError, DecodeError, ForgottenReceipt)
"""What a caller can mend; anything else is a bug of ours."""


def status_of(error: Exception) -> grpc.StatusCode:
    """The status for one of `REFUSED`."""
    if isinstance(error, NotLoaded):
        return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode.INVALID_ARGUMENT


@contextmanager
def answering(context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with a status for what its caller can mend."""
    try:
        yield
    except REFUSED as error:
        context.abort(status_of(error), str(error))
