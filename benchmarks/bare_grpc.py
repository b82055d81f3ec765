"""The limit of the grpc lane: a bare gRPC stream of raw bytes, with the same malloc settings.

Two methods, no headers, no serializers, no interceptor: a pull streams a vector's bytes in messages
of a megabyte, a push streams them back and is answered with an empty message. The same copies are
made at both ends, since gRPC takes and gives nothing but `bytes`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import grpc
import numpy as np
from plain_sockets import CHUNK_NUM_BYTES, Bytes

from ps.malloc import tune_malloc

_SERVICE = "bare.Bytes"


def serve_grpc(num_bytes: int, host: str, num_workers: int, pipe: Connection) -> None:
    """Serve one range of `num_bytes` until the parent closes the pipe; tells it the port first."""
    tune_malloc()
    half = _ServingHalf(num_bytes)
    server = grpc.server(ThreadPoolExecutor(2 * num_workers), options=[("grpc.so_reuseport", 0)])
    handlers = {
        "Pull": grpc.unary_stream_rpc_method_handler(half.pull, None, None),
        "Push": grpc.stream_unary_rpc_method_handler(half.push, None, None),
    }
    generic = grpc.method_handlers_generic_handler(_SERVICE, handlers)
    server.add_generic_rpc_handlers((generic,))
    pipe.send(server.add_insecure_port(f"{host}:0"))
    server.start()
    with contextlib.suppress(EOFError):
        pipe.recv()
    server.stop(None)


class _ServingHalf:
    def __init__(self, num_bytes: int) -> None:
        self._pulled = np.ones(num_bytes, np.uint8)
        self._staging: list[Bytes] = []

    def pull(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        return _messages(self._pulled)

    def push(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        staging = self._staging.pop() if self._staging else np.ones_like(self._pulled)
        _fill(staging, messages)
        self._staging.append(staging)
        return b""


def _messages(vector: Bytes) -> Iterator[bytes]:
    for start in range(0, vector.size, CHUNK_NUM_BYTES):
        yield vector[start : start + CHUNK_NUM_BYTES].tobytes()


def _fill(vector: Bytes, messages: Iterator[bytes]) -> None:
    position = 0
    for message in messages:
        np.copyto(vector[position : position + len(message)], np.frombuffer(message, np.uint8))
        position += len(message)
    assert position == vector.size, f"{position} bytes instead of {vector.size}"


class GrpcExchange:
    """The calling half: one channel to each server process, all of them at once."""

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        pulled: Sequence[Bytes],
        pushed: Sequence[Bytes],
    ) -> None:
        """pulled, pushed: what each server has its range of."""
        channels = [grpc.insecure_channel(f"{host}:{port}") for host, port in addresses]
        self._pulls = [c.unary_stream(f"/{_SERVICE}/Pull", None, None) for c in channels]
        self._pushes = [c.stream_unary(f"/{_SERVICE}/Push", None, None) for c in channels]
        self._pulled, self._pushed = pulled, pushed
        self._threads = ThreadPoolExecutor(len(addresses))

    def pull(self) -> None:
        """Fill all ranges."""
        list(self._threads.map(self._pull, range(len(self._pulls))))

    def push(self) -> None:
        """Send all ranges."""
        list(self._threads.map(self._push, range(len(self._pushes))))

    def _pull(self, index: int) -> None:
        _fill(self._pulled[index], iter(self._pulls[index](b"", timeout=60)))

    def _push(self, index: int) -> None:
        self._pushes[index](_messages(self._pushed[index]), timeout=60)
