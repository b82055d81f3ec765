"""Where a shard takes in the connections of the tcp and shm lanes."""

import atexit
import contextlib
import errno
import logging
import os
import secrets
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from model.errors import InputError
from protos import parameter_server_pb2 as pb
from ps.lanes.frames import Wire
from ps.lanes.lane import LaneError, LaneSettings
from ps.lanes.memory_wire import MemoryWire
from ps.lanes.serving import Serving
from ps.lanes.shm import ShmServing
from ps.lanes.tcp import TcpServing
from ps.lanes.tickets import TICKET_NUM_BYTES, Tickets
from ps.lanes.tls_wire import TlsWire
from ps.service import ShardService

ADMISSION_S = 5.0
"""A connection must shake hands, show its ticket and take its welcome in this time."""

_STOP_S = 1.0
_EXIT_S = 30.0
_PAUSE_S = 0.05
_BACKLOG = 128

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Listener:
    listening: socket.socket
    wire: Callable[[socket.socket], Wire]
    serving: Callable[[ShardService, Any], Serving[Any]]


_gates: "weakref.WeakSet[Gate]" = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Once the interpreter has begun to end, a thread that comes back to it from C++ is ended by
    unwinding its stack; where C++ forbids that, as when a tensor is freed, the process aborts."""
    for gate in tuple(_gates):
        gate.stop(0.0)
    deadline_s = time.monotonic() + _EXIT_S
    for thread in tuple(_threads):  # also those that have left their gate, and free what it was
        thread.join(max(0.0, deadline_s - time.monotonic()))


class Gate:
    """Listens on a TCP and a Unix socket; a connection with a ticket is served in its own thread.

    What a connection does wrong ends that connection alone. There are `max_connections` at most,
    those that have yet to show their ticket included; more are closed at once.
    """

    def __init__(
        self,
        service: ShardService,
        host: str,
        settings: LaneSettings,
        max_connections: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Binds at once. Raises InputError if the ports of the range are taken.

        tls: with it, who comes by TCP must show a certificate first, and all is encrypted.
        """
        self._service, self._max_connections = service, max_connections
        self._tickets = Tickets()
        self._lock = threading.Lock()
        self._wires: dict[Wire, threading.Thread] = {}
        self._stopped = False
        self._listeners: list[_Listener] = []
        self._offer = pb.OpenLaneReply()
        if settings.choice in ("auto", "tcp"):
            listener = listen(host, settings.port_range)
            self._offer.tcp_port = listener.getsockname()[1]
            wire = Wire if tls is None else partial(TlsWire, context=tls)
            self._listeners.append(_Listener(listener, wire, TcpServing))
        if settings.choice in ("auto", "shm") and hasattr(os, "memfd_create"):
            self._offer.shm_socket = f"asynception-{secrets.token_hex(16)}"
            listener = _listen_here(self._offer.shm_socket)
            self._listeners.append(_Listener(listener, MemoryWire, ShmServing))
        _gates.add(self)

    @property
    def num_connections(self) -> int:
        """Connections that are open now."""
        with self._lock:  # one that is being taken in may be served already
            return len(self._wires)

    def offer(self) -> pb.OpenLaneReply:
        """A ticket, and where to show it. Raises NotLoaded."""
        reply = pb.OpenLaneReply(ticket=self._tickets.issue())
        reply.MergeFrom(self._offer)
        if not self._service.may_be_mapped():
            reply.ClearField("shm_socket")
        return reply

    def start(self) -> None:
        """Begin to take in connections."""
        for listener in self._listeners:
            thread = threading.Thread(target=self._accept, args=(listener,), daemon=True)
            thread.start()
            _threads.add(thread)

    def stop(self, wait_s: float = _STOP_S) -> None:
        """Close the sockets and end all connections; waits for their threads, `wait_s` at most."""
        with self._lock:
            self._stopped = True
            wires = dict(self._wires)
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.listening.shutdown(socket.SHUT_RDWR)  # wakes `accept`, as close doesn't
            listener.listening.close()
        for wire in wires:
            wire.shutdown()
        deadline_s = time.monotonic() + wait_s
        for thread in wires.values():
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _accept(self, listener: _Listener) -> None:
        while not self._stopped:
            try:
                connection, _ = listener.listening.accept()
            except OSError as error:
                if not self._stopped:  # for want of descriptors, say; others may be closed soon
                    _log.warning("a connection was not taken in: %s", error)
                    time.sleep(_PAUSE_S)
                continue
            try:
                self._take_in(listener, connection)
            except (OSError, LaneError, RuntimeError) as error:
                _log.warning("a connection was closed at once: %s", error)
                connection.close()

    def _take_in(self, listener: _Listener, connection: socket.socket) -> None:
        wire = listener.wire(connection)
        thread = threading.Thread(target=self._attend, args=(listener, wire), daemon=True)
        try:
            with self._lock:
                if self._stopped or len(self._wires) >= self._max_connections:
                    raise LaneError(f"{len(self._wires)} connections are open")
                thread.start()
                _threads.add(thread)
                self._wires[wire] = thread
        except (LaneError, RuntimeError):
            wire.close()  # not `connection`, which a wire may have made another socket of
            raise

    def _attend(self, listener: _Listener, wire: Wire) -> None:
        try:
            wire.within(ADMISSION_S)
            wire.handshake()
            if not self._tickets.redeem(wire.receive_bytes(TICKET_NUM_BYTES)):
                raise LaneError("no good ticket")
            serving = listener.serving(self._service, wire)
            serving.welcome()
            serving.serve()
        except LaneError as error:
            _log.info("a connection was ended: %s", error)
        except Exception:
            _log.exception("a bug ended a connection")
        finally:
            wire.close()
            with self._lock:
                del self._wires[wire]


def listen(host: str, port_range: tuple[int, int] | None) -> socket.socket:
    """A listening TCP socket at `host` alone, on the first port of the range that is free.

    Raises InputError if there is none, OSError if the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports: Iterable[int] = range(port_range[0], port_range[1] + 1) if port_range else (0,)
    for port in ports:
        try:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise ports_taken(host, port_range)


def ports_taken(host: str, port_range: tuple[int, int] | None) -> InputError:
    """For a server that finds no free port."""
    return InputError(
        f"lanes.port_range = {list(port_range or ())}: all of these ports are taken at {host}, or"
        f" not for this user, so a server can't listen there; set a wider range (a server takes"
        f" two ports), above 1023, or leave it unset"
    )


def _listen_here(name: str) -> socket.socket:
    """A listening Unix socket in the abstract namespace: no file that could be left behind."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(_BACKLOG)
    return listener
