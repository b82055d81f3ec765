"""The gRPC lane: vectors as raw-bytes streams, both halves side by side.

Always available. Serializers are None, so that messages are the bytes themselves; the first message
of a stream is a header (see protos/parameter_server.proto).
"""

import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final

import grpc
import torch
from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.answering import answering
from ps.lanes.headers import (
    asker,
    check_dtype,
    check_push_header,
    dtype_from,
    lengths_of,
    pull_header,
    pull_request,
    pulled_from,
    push_from,
    push_header,
)
from ps.lanes.lane import NEWEST, LaneName, Wanted
from ps.lanes.stream import StreamError, chunks, fill, narrowed_chunks
from ps.messages import (
    receipt_from,
    receipt_message,
    state_from,
    state_header,
    status_message,
)
from ps.push import Push
from ps.service import ShardService
from ps.shard import Receipt, ShardState
from ps.snapshot import Pulled

SERVICE = "asynception.Bytes"

ENDLESS_S = 1e9
"""What is left to a call without a deadline is more; gRPC gives it in seconds."""

Metadata = tuple[tuple[str, str], ...]


def bytes_handlers(service: ShardService) -> grpc.GenericRpcHandler:
    """The serving half, for `grpc.Server.add_generic_rpc_handlers`."""
    half = _ServingHalf(service)
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Pull": grpc.unary_stream_rpc_method_handler(half.pull, None, None),
            "Push": grpc.stream_unary_rpc_method_handler(half.push, None, None),
            "Read": grpc.unary_stream_rpc_method_handler(half.read, None, None),
            "Load": grpc.stream_unary_rpc_method_handler(half.load, None, None),
        },
    )


class _ServingHalf:
    def __init__(self, service: ShardService) -> None:
        self._service = service

    def pull(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        with answering(context):
            wanted = pb.PullRequest.FromString(request)
            if context.time_remaining() > ENDLESS_S:
                raise StreamError("a pull without a deadline: it could hold its version for ever")
            if not 0 <= wanted.wait_s <= threading.TIMEOUT_MAX:
                raise StreamError(f"wait_s = {wanted.wait_s}")
            worker, dtype = asker(wanted), dtype_from(wanted.dtype)
            if self._service.reached(wanted.at_least, wanted.wait_s, worker):
                yield from self._snapshot(worker, dtype)
            else:
                yield pb.PullHeader(not_yet=True).SerializeToString()

    def _snapshot(self, worker: int | None, dtype: torch.dtype) -> Iterator[bytes]:
        with self._service.pinned(worker) as snapshot:
            yield pull_header(snapshot, dtype, worker).SerializeToString()
            if dtype == torch.float32:
                yield from chunks((snapshot.parameters,))
            else:
                yield from narrowed_chunks(snapshot.parameters)
            yield from chunks((snapshot.statistics,))

    def push(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with answering(context):
            header = pb.PushHeader.FromString(first_message(messages))
            check_push_header(header)
            self._check_lengths(header)
            return self._settle(header, messages)

    def _settle(self, header: pb.PushHeader, messages: Iterator[bytes]) -> bytes:
        with self._service.staging(dtype_from(header.dtype)) as staging:
            fill((staging.gradient, staging.statistics_delta), messages)
            push = push_from(header, staging.gradient, staging.statistics_delta)
            return receipt_message(self._service.push(push)).SerializeToString()

    def _check_lengths(self, header: pb.PushHeader) -> None:
        """Two vectors of other lengths could fill the same number of bytes."""
        ranges, given = self._service.config.ranges, lengths_of(header)
        expected = (ranges.parameters.numel, ranges.statistics.numel)
        if given not in (expected, (0, 0)):
            raise StreamError(f"{given} elements instead of {expected}")

    def read(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        with answering(context):
            name = pb.ReadRequest.FromString(request).name
            state = self._service.captured(name)
            if state is None:
                context.abort(grpc.StatusCode.NOT_FOUND, f"no cut named {name!r}")
            yield state_header(state).SerializeToString()
            yield from chunks(list(state.vectors.values()))

    def load(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with answering(context):
            header = pb.StateHeader.FromString(first_message(messages))
            vectors = self._room(header)
            fill(list(vectors.values()), messages)
            self._service.load(state_from(header, vectors))
            return status_message(self._service.status()).SerializeToString()

    def _room(self, header: pb.StateHeader) -> dict[str, Tensor]:
        expected = self._service.config.vector_numels()
        given = {vector.name: vector.numel for vector in header.vectors}
        if given != expected:
            raise StreamError(f"vectors {given} instead of {expected}")
        return {name: torch.empty(numel) for name, numel in given.items()}


def first_message(messages: Iterator[bytes]) -> bytes:
    """A stream's header. Raises StreamError if there is none."""
    header = next(messages, None)
    if header is None:
        raise StreamError("an empty stream")
    return header


class ByteStreams:
    """The calling half of the lane to one shard; `read` and `load` have no other."""

    name: Final[LaneName] = "grpc"

    def __init__(self, channel: grpc.Channel, metadata: Metadata) -> None:
        def path(method: str) -> str:
            return f"/{SERVICE}/{method}"

        self._metadata = metadata
        self._lock, self._narrow = threading.Lock(), torch.zeros(0, dtype=torch.bfloat16)
        self._pull = channel.unary_stream(path("Pull"), None, None)
        self._push = channel.stream_unary(path("Push"), None, None)
        self._read = channel.unary_stream(path("Read"), None, None)
        self._load = channel.stream_unary(path("Load"), None, None)

    def open(self, timeout_s: float) -> None:
        """See Lane: the channel connects in the first call."""

    def close(self) -> None:
        """See Lane: calls end with the channel, which is its owner's to close."""

    def pull(
        self,
        parameters: Tensor,
        statistics: Tensor,
        timeout_s: float,
        wanted: Wanted = NEWEST,
    ) -> Pulled | None:
        """See Lane. Raises StreamError or grpc.RpcError."""
        request = pull_request(wanted).SerializeToString()
        messages = iter(self._pull(request, timeout=timeout_s, metadata=self._metadata))
        header = pb.PullHeader.FromString(first_message(messages))
        if header.not_yet:
            return None
        given = (header.num_parameters, header.num_statistics)
        assert given == (parameters.numel(), statistics.numel()), "the shard has another layout"
        check_dtype(header, wanted.dtype)
        wanted.filling()
        if wanted.dtype == torch.float32:
            fill((parameters, statistics), messages)
        else:
            self._fill_widened(parameters, statistics, messages)
        return pulled_from(header)

    def _fill_widened(
        self, parameters: Tensor, statistics: Tensor, messages: Iterator[bytes]
    ) -> None:
        """Messages may end between the two bytes of an element, so all are put down first."""
        with self._lock:
            if self._narrow.shape != parameters.shape:
                self._narrow = torch.zeros(parameters.shape, dtype=torch.bfloat16)
            fill((self._narrow, statistics), messages)
            parameters.copy_(self._narrow)

    def push(self, push: Push, timeout_s: float) -> Receipt:
        """See Lane. Raises grpc.RpcError."""
        header = push_header(push).SerializeToString()
        messages = chain((header,), chunks((push.gradient, push.statistics_delta)))
        answer = self._push(messages, timeout=timeout_s, metadata=self._metadata)
        return receipt_from(pb.Receipt.FromString(answer))

    def read(self, name: str, into: Callable[[str, int], Tensor], timeout_s: float) -> ShardState:
        """Fetch the copy of a cut. `into(vector's name, numel)` says where each vector goes.

        Raises StreamError or grpc.RpcError.
        """
        request = pb.ReadRequest(name=name).SerializeToString()
        messages = iter(self._read(request, timeout=timeout_s, metadata=self._metadata))
        header = pb.StateHeader.FromString(first_message(messages))
        vectors = {v.name: into(v.name, v.numel) for v in header.vectors}
        fill(list(vectors.values()), messages)
        return state_from(header, vectors)

    def load(self, state: ShardState, timeout_s: float) -> None:
        """Replace the shard's state. Raises grpc.RpcError."""
        header = state_header(state).SerializeToString()
        messages = chain((header,), chunks(list(state.vectors.values())))
        self._load(messages, timeout=timeout_s, metadata=self._metadata)
