"""One connection of a lane: framed protobuf messages and bare vectors, within deadlines.

A frame is a message's length (4 bytes, little-endian), the message, and zeros up to
FRAME_NUM_BYTES; an answer that is longer takes several frames, with zeros behind the last. Vectors
follow a frame bare, back to back: their lengths follow from the frame, and they go straight between
the socket and the tensor's memory.

The sockets block, and the kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO): with a timeout of
Python's own a socket doesn't block, so that one chunk takes many calls instead of one.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from ps.lanes import liveness
from ps.lanes.lane import LaneError
from ps.lanes.stream import CHUNK_NUM_BYTES, beside_blocks, bytes_of, new_block

FRAME_NUM_BYTES = 2048
"""Half a page, and so much do places in the kernel's pages differ from those in pages of vectors
that begin with a page. When they differ by about 64 bytes, as behind a short frame, a processor may
take each store for one that the next loads depend on: copies then took three times as long."""

_LENGTH = struct.Struct("<I")
MAX_MESSAGE_NUM_BYTES = FRAME_NUM_BYTES - _LENGTH.size
"""Of one frame."""

MAX_ANSWER_NUM_BYTES = 64 * FRAME_NUM_BYTES - _LENGTH.size
"""What a version's header says of some ten thousand workers."""

_TIMEVAL = struct.Struct("@ll")
_NO_LIMIT = _TIMEVAL.pack(0, 0)

M = TypeVar("M", bound=Message)


class Wire:
    """A connected socket. One thread uses it at a time; any thread may `shutdown`.

    Everything raises LaneError when the peer left, said nonsense, or did not move within the time
    that `within` set. The connection is then out of step and must be closed.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._socket = connection
        self._deadline_s = 0.0
        if connection.family != socket.AF_UNIX:
            _tune_tcp(connection)

    def within(self, timeout_s: float) -> None:
        """All that follows must be done in this time."""
        self._deadline_s = time.monotonic() + timeout_s

    def handshake(self) -> None:
        """What must be done before all else: in the clear, nothing."""

    @property
    def is_worn(self) -> bool:
        """Whether the next call had better have a new connection."""
        return False

    def send(self, message: Message) -> None:
        """Send one message."""
        self._send_all(memoryview(frame_of(message)))

    def send_vectors(self, vectors: Sequence[Tensor]) -> None:
        """Send the bytes of contiguous CPU vectors, one after the other."""
        for vector in vectors:
            self._send_all(bytes_of(vector).data)

    def send_as(self, dtype: torch.dtype, vector: Tensor) -> None:
        """Send a vector in its own dtype, or a float32 one as bf16.

        While one block is cast, those before it travel.
        """
        if dtype == vector.dtype:
            self.send_vectors((vector,))
            return
        for part, block in beside_blocks(vector, self.block):
            self._send_all(bytes_of(block.copy_(part)).data)

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._send_all(memoryview(data))

    def receive(self, kind: type[M], max_num_bytes: int = MAX_MESSAGE_NUM_BYTES) -> M:
        """Receive a message, of one frame or, if it may be longer, of several."""
        frames = self._receive_frame()
        (num_bytes,) = _LENGTH.unpack_from(frames)
        if num_bytes > max_num_bytes:
            raise LaneError(f"a message of {num_bytes} bytes")
        if num_bytes > MAX_MESSAGE_NUM_BYTES:
            frames += self.receive_bytes(_padded(num_bytes) - len(frames))
        try:
            return kind.FromString(frames[_LENGTH.size : _LENGTH.size + num_bytes])
        except DecodeError as error:
            raise LaneError(f"no {kind.__name__}: {error}") from error

    def receive_vectors(self, vectors: Sequence[Tensor]) -> None:
        """Fill contiguous CPU vectors; after an error their contents are arbitrary."""
        for vector in vectors:
            self._fill(bytes_of(vector).data)

    def receive_as(self, dtype: torch.dtype, vector: Tensor) -> None:
        """Fill a vector from what `send_as` sent; after an error its contents are arbitrary."""
        if dtype == vector.dtype:
            self.receive_vectors((vector,))
            return
        for part, block in beside_blocks(vector, self.block):
            self._fill(bytes_of(block).data)
            part.copy_(block)

    @cached_property
    def block(self) -> Tensor:
        """The connection's own buffer for casts, once one is needed."""
        return new_block()

    def receive_bytes(self, num_bytes: int) -> bytes:
        """Receive so many bytes."""
        data = bytearray(num_bytes)
        self._fill(memoryview(data))
        return bytes(data)

    def wait(self) -> bool:
        """Wait, for as long as it takes, until the peer sends something; False if it has left."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _NO_LIMIT)
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        return False

    def shutdown(self) -> None:
        """End the connection for both ends at once; whoever waits in it gets a LaneError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and free the socket; not while another thread uses it."""
        self.shutdown()
        self._socket.close()

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise LaneError("the deadline has passed")
        return max(left_s, 1e-3)  # 0 would be no limit at all

    def _limit(self, option: int) -> None:
        seconds, rest = divmod(self._left_s(), 1)
        timeval = _TIMEVAL.pack(int(seconds), int(rest * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, option, timeval)

    def _send_all(self, data: memoryview) -> None:
        with as_lane_errors():
            while data.nbytes:
                self._limit(socket.SO_SNDTIMEO)
                data = data[self._socket.send(data[:CHUNK_NUM_BYTES]) :]

    def _fill(self, room: memoryview) -> None:
        with as_lane_errors():
            while room.nbytes:
                self._limit(socket.SO_RCVTIMEO)
                part = room[:CHUNK_NUM_BYTES]
                count = self._socket.recv_into(part, part.nbytes, socket.MSG_WAITALL)
                if count == 0:
                    raise LaneError("the connection ended")
                room = room[count:]

    def _receive_frame(self) -> bytes:
        return self.receive_bytes(FRAME_NUM_BYTES)


def frame_of(message: Message) -> bytes:
    """A message as it travels."""
    body = message.SerializeToString()
    assert len(body) <= MAX_ANSWER_NUM_BYTES
    return (_LENGTH.pack(len(body)) + body).ljust(_padded(len(body)), b"\0")


def _padded(num_bytes: int) -> int:
    """What a message of so many bytes takes, its length in front, in whole frames."""
    return -(-(_LENGTH.size + num_bytes) // FRAME_NUM_BYTES) * FRAME_NUM_BYTES


@contextmanager
def as_lane_errors() -> Iterator[None]:
    """Failures of a socket in the block end its connection."""
    try:
        yield
    except BlockingIOError as error:  # SO_RCVTIMEO or SO_SNDTIMEO ran out
        raise LaneError("the deadline has passed") from error
    except OSError as error:
        raise LaneError(f"the connection failed: {error}") from error


def _tune_tcp(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    liveness.watch(connection)
    _unpace_loopback(connection)


def _unpace_loopback(connection: socket.socket) -> None:
    """Within a host there is no congestion: BBR's pacing would cost a third of the speed."""
    with contextlib.suppress(OSError):
        if connection.getsockname()[0] == connection.getpeername()[0]:
            option = getattr(socket, "TCP_CONGESTION", None)
            if option is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, b"reno")
