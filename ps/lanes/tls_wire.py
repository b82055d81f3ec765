"""A connection of the tcp lane inside mutual TLS.

The same frames and vectors, straight between the tensors' memory and OpenSSL, which cuts them into
records of 16 KB. Unlike a plain socket's, its calls begin again when the kernel's time limit runs
out, so Python keeps the time here, with a socket that doesn't block.

Nothing is said at the end (no close_notify): how much follows is known from each frame, so a
stream that is cut off short never passes for a whole one.
"""

import contextlib
import math
import socket
import ssl

from ps.lanes.frames import Wire, as_lane_errors
from ps.lanes.lane import LaneError, LaneUnavailable
from ps.lanes.stream import CHUNK_NUM_BYTES

RECORD_NUM_BYTES = 1 << 14

MAX_RECORDS = 1 << 24
"""Of one key: RFC 8446, section 5.5, allows AES-GCM 2^24.5. After that the caller connects anew, as
Python can't ask for new keys. It is 275 GB, of both directions together."""

_SLACK_S = 0.1
"""What a peer may be late: to set a limit is a system call, which is not made for each record."""


class TlsWire(Wire):
    """A connected TCP socket over which nothing goes before both sides have shown who they are.

    OpenSSL's state is not for two threads at once, nor need it be: one uses the wire, and
    `shutdown` touches the socket alone.
    """

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext, server_name: str | None = None
    ) -> None:
        """server_name: what the server's certificate must be for; None if this is the server."""
        super().__init__(connection)
        self._socket = self._tls = context.wrap_socket(
            connection,
            server_side=server_name is None,
            server_hostname=server_name,
            do_handshake_on_connect=False,
        )
        self._limit_s = math.inf
        self._num_records = 0

    @property
    def is_worn(self) -> bool:
        """Whether its keys have encrypted as much as they may."""
        return self._num_records > MAX_RECORDS

    def handshake(self) -> None:
        """Raises LaneUnavailable for a peer that isn't who it should be, LaneError.

        To a caller it may seem done before the server has seen the caller's certificate.
        """
        with as_lane_errors():
            self._limit(socket.SO_RCVTIMEO)
            try:
                self._tls.do_handshake()
            except ssl.SSLCertVerificationError as error:
                raise LaneUnavailable(
                    f"the peer's certificate is not good: {error.verify_message}"
                ) from error
        assert self._tls.version() == "TLSv1.3", "nothing goes in the clear"

    def wait(self) -> bool:
        """See Wire."""
        if self._tls.pending():
            return True
        with contextlib.suppress(OSError):
            self._limit_s = math.inf
            self._tls.settimeout(None)
            return bool(socket.socket.recv(self._tls, 1, socket.MSG_PEEK))  # encrypted as it is
        return False

    def shutdown(self) -> None:
        """See Wire.

        Not by SSLSocket's own, which takes the encryption off first: what another thread is
        about to send would go in the clear.
        """
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)

    def _limit(self, option: int) -> None:
        left_s = self._left_s()
        if not left_s <= self._limit_s <= left_s + _SLACK_S:
            self._tls.settimeout(left_s)
            self._limit_s = left_s

    def _send_all(self, data: memoryview) -> None:
        self._count(data)
        super()._send_all(data)

    def _fill(self, room: memoryview) -> None:
        self._count(room)
        with as_lane_errors():
            while room.nbytes:
                self._limit(socket.SO_RCVTIMEO)
                count = self._tls.recv_into(room[:CHUNK_NUM_BYTES])
                if count == 0:
                    raise LaneError("the connection ended")
                room = room[count:]

    def _count(self, data: memoryview) -> None:
        self._num_records += -(-data.nbytes // RECORD_NUM_BYTES)
