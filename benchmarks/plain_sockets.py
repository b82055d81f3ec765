"""The limit of the tcp lane: plain TCP connections that move the same bytes and do nothing else.

A message asks for a pull or announces a push, and answers a push; vectors follow bare, a megabyte a
call. Messages are half a page, as the lane's frames are: behind one of a few bytes, copies between
the kernel's pages and a vector's may take three times as long. On one host reno replaces whatever
congestion control is the system's: BBR paces loopback to two thirds of its speed.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

CHUNK_NUM_BYTES = 1 << 20
MESSAGE_NUM_BYTES = 2048
_PULL, _PUSH, _DONE = (letter.ljust(MESSAGE_NUM_BYTES) for letter in (b"l", b"s", b"k"))

Bytes = npt.NDArray[np.uint8]
"""A vector's memory, 1-d."""


def serve_sockets(num_bytes: int, host: str, pipe: Connection) -> None:
    """Serve one range of `num_bytes` until the parent closes the pipe; tells it the port first."""
    listener = socket.create_server((host, 0))
    pipe.send(listener.getsockname()[1])
    threading.Thread(target=accept, args=(listener, num_bytes), daemon=True).start()
    with contextlib.suppress(EOFError):
        pipe.recv()


def accept(listener: socket.socket, num_bytes: int) -> None:
    """Serve every connection in a thread of its own, for ever."""
    pulled = np.ones(num_bytes, np.uint8)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, pulled), daemon=True).start()


def _answer(connection: socket.socket, pulled: Bytes) -> None:
    tune(connection)
    staging, call = np.ones_like(pulled), np.zeros(MESSAGE_NUM_BYTES, np.uint8)
    while _received(connection, call):
        if call.tobytes() == _PULL:
            send(connection, pulled)
        else:
            receive(connection, staging)
            connection.sendall(_DONE)


def tune(connection: socket.socket) -> None:
    """No waiting for more to send, and no pacing within a host."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if connection.getsockname()[0] == connection.getpeername()[0]:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _received(connection: socket.socket, message: Bytes) -> bool:
    """Whether another message came before the peer left."""
    try:
        receive(connection, message)
    except EOFError:
        return False
    return True


def send(connection: socket.socket, vector: Bytes) -> None:
    """Send all bytes."""
    view = vector.data
    for start in range(0, view.nbytes, CHUNK_NUM_BYTES):
        connection.sendall(view[start : start + CHUNK_NUM_BYTES])


def receive(connection: socket.socket, vector: Bytes) -> None:
    """Fill the vector. Raises EOFError if the peer leaves."""
    view = vector.data
    while view.nbytes:
        part = view[:CHUNK_NUM_BYTES]
        count = connection.recv_into(part, part.nbytes, socket.MSG_WAITALL)
        if not count:
            raise EOFError("the peer has left")
        view = view[count:]


class SocketExchange:
    """The calling half: one connection to each server process, all of them at once."""

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        pulled: Sequence[Bytes],
        pushed: Sequence[Bytes],
    ) -> None:
        """pulled, pushed: what each server has its range of."""
        self._connections = [socket.create_connection(address) for address in addresses]
        for connection in self._connections:
            tune(connection)
        self._pulled, self._pushed = pulled, pushed
        self._threads = ThreadPoolExecutor(len(addresses))

    def pull(self) -> None:
        """Fill all ranges."""
        self._each(self._pull)

    def push(self) -> None:
        """Send all ranges."""
        self._each(self._push)

    def _each(self, call: Callable[[int], None]) -> None:
        if len(self._connections) == 1:
            call(0)
        else:
            list(self._threads.map(call, range(len(self._connections))))

    def _pull(self, index: int) -> None:
        self._connections[index].sendall(_PULL)
        receive(self._connections[index], self._pulled[index])

    def _push(self, index: int) -> None:
        self._connections[index].sendall(_PUSH)
        send(self._connections[index], self._pushed[index])
        receive(self._connections[index], np.empty(MESSAGE_NUM_BYTES, np.uint8))
