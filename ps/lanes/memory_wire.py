"""A connection over which the two processes show each other memory.

A vector is shown as a place: its segment's number on this connection, and an offset. The first time
a segment is named, its file descriptor travels beside the frame; the peer maps what it is shown,
read-only and once, and keeps the mapping as long as the connection.
"""

import os
import socket
import struct
import weakref
from collections.abc import Sequence

import torch
from google.protobuf.message import Message
from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.lanes.frames import FRAME_NUM_BYTES, Wire, frame_of
from ps.lanes.lane import LaneError, LaneUnavailable, NoSharedMemory
from ps.lanes.segment import Segment, map_vector, offset_in_segment, segment_of

MAX_NEW_SEGMENTS = 8
"""File descriptors beside one frame, at most."""

MAX_SEGMENTS = 256
"""Segments that one peer may show over a connection; a bound on descriptors and mappings."""

_CREDENTIALS = struct.Struct("3i")


class MemoryWire(Wire):
    """A connected Unix socket whose peer runs as the same user."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises LaneUnavailable if the peer is another user."""
        super().__init__(connection)
        self._shown: weakref.WeakKeyDictionary[Segment, int] = weakref.WeakKeyDictionary()
        self._num_shown = 0
        self._outgoing: list[Segment] = []
        self._incoming: list[int] = []
        self._fds: dict[int, int] = {}
        self._views: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        _check_peer(connection)

    def show(self, vectors: Sequence[Tensor]) -> pb.Memory:
        """Where vectors made in segments lie, for the frame that is sent next.

        Raises NoSharedMemory for others.
        """
        memory = pb.Memory()
        for vector in vectors:
            if vector.numel():
                segment = segment_of(vector)
                if segment is None:
                    raise NoSharedMemory(
                        f"this process has no shared memory for {vector.nbytes / 1e6:,.1f} MB"
                    )
                number = self._number(segment, memory)
                offset = offset_in_segment(vector)
                memory.places.append(pb.Place(segment=number, offset_num_bytes=offset))
        return memory

    def _number(self, segment: Segment, memory: pb.Memory) -> int:
        number = self._shown.get(segment)
        if number is None:
            number = self._shown[segment] = self._num_shown
            self._num_shown += 1
            self._outgoing.append(segment)
            memory.new_segments.append(number)
        return number

    def views(
        self, memory: pb.Memory, numels: Sequence[int], first: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Vectors that the frame received last has shown, read-only, in the peer's memory.

        first: dtype of the first one; the others are float32.
        Raises LaneError for places that can't hold vectors of these lengths.
        """
        self._keep(memory.new_segments)
        if len(memory.places) != sum(1 for numel in numels if numel):
            raise LaneError(f"{len(memory.places)} places for vectors of {numels} elements")
        places = iter(memory.places)
        dtypes = [first, *[torch.float32] * (len(numels) - 1)]
        return [
            self._view(next(places), numel, dtype) if numel else torch.empty(0, dtype=dtype)
            for numel, dtype in zip(numels, dtypes, strict=True)
        ]

    def _keep(self, numbers: Sequence[int]) -> None:
        if len(numbers) != len(self._incoming):
            raise LaneError(f"{len(self._incoming)} file descriptors for {len(numbers)} segments")
        if len(self._fds) + len(numbers) > MAX_SEGMENTS:
            raise LaneError(f"more than {MAX_SEGMENTS} segments")
        for number in numbers:
            if number in self._fds:
                raise LaneError(f"segment {number} is there already")
            self._fds[number] = self._incoming.pop(0)

    def _view(self, place: pb.Place, numel: int, dtype: torch.dtype) -> Tensor:
        key = (place.segment, place.offset_num_bytes, numel, dtype)
        view = self._views.get(key)
        if view is None:
            if place.segment not in self._fds or len(self._views) >= 2 * MAX_SEGMENTS:
                raise LaneError(f"no segment {place.segment}, or too many mappings")
            view = map_vector(self._fds[place.segment], place.offset_num_bytes, numel, dtype)
            self._views[key] = view
        return view

    def send(self, message: Message) -> None:
        """Send one frame, and beside it the descriptors of segments that are new to the peer."""
        segments, self._outgoing = self._outgoing, []
        frame = memoryview(frame_of(message))
        sent = self._send_with(frame, [segment.fd for segment in segments]) if segments else 0
        self._send_all(frame[sent:])

    def _send_with(self, frame: memoryview, fds: Sequence[int]) -> int:
        self._limit(socket.SO_SNDTIMEO)
        try:
            return socket.send_fds(self._socket, [frame], list(fds))
        except OSError as error:
            raise LaneError(f"the connection failed: {error}") from error

    def _receive_frame(self) -> bytes:
        self._close_incoming()
        frame = b""
        while len(frame) < FRAME_NUM_BYTES:
            self._limit(socket.SO_RCVTIMEO)
            part = self._receive_with_fds(FRAME_NUM_BYTES - len(frame))
            if not part:
                raise LaneError("the connection ended")
            frame += part
        return frame

    def _receive_with_fds(self, num_bytes: int) -> bytes:
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._socket, num_bytes, MAX_NEW_SEGMENTS, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise LaneError(f"the connection failed: {error}") from error
        self._incoming += fds
        if flags & socket.MSG_CTRUNC or len(self._incoming) > MAX_NEW_SEGMENTS:
            raise LaneError("too many file descriptors")
        return data

    def _close_incoming(self) -> None:
        while self._incoming:
            os.close(self._incoming.pop())

    def close(self) -> None:
        """End the connection; mappings go with the last user of their views."""
        super().close()
        self._close_incoming()
        while self._fds:
            os.close(self._fds.popitem()[1])
        self._views.clear()


def _check_peer(connection: socket.socket) -> None:
    size = _CREDENTIALS.size
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    if user != os.geteuid():
        raise LaneUnavailable(f"the peer is user {user}, and this process runs as {os.geteuid()}")
