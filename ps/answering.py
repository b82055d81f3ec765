"""From what a caller did wrong to the status that tells it so."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError

from ps.lanes.stream import StreamError
from ps.service import NotLoaded
from ps.shard import ForgottenReceipt


@contextmanager
def answering(context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with a status for what its caller can mend; anything else is a bug of ours."""
    try:
        yield
    except NotLoaded as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except (StreamError, DecodeError, ForgottenReceipt) as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
