"""Plain sockets in TLS, by Python's ssl: what a lane that wraps tcp could reach at most."""

import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from measured_rows import Measured
from shard_processes import HOST, running, start_process

from ps.lanes.stream import CHUNK_NUM_BYTES
from ps.tls import Identities, Identity

TIMEOUT_S = 60.0


def _context(identity: Identity, protocol: int) -> ssl.SSLContext:
    """Mutual TLS 1.3, as gRPC has it."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=identity.authorities.decode())
    with tempfile.NamedTemporaryFile() as file:  # the only way in for a chain
        file.write(identity.certificate + b"\n" + identity.key)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _serve(identity: Identity, num_bytes: int, pipe: Connection) -> None:
    """For each byte that comes, so many go back, until the other end leaves."""
    context = _context(identity, ssl.PROTOCOL_TLS_SERVER)
    with socket.create_server((HOST, 0)) as listening:
        pipe.send(listening.getsockname()[1])
        connection, _ = listening.accept()
    vector = memoryview(bytearray(num_bytes))
    with context.wrap_socket(connection, server_side=True) as wire:
        wire.settimeout(TIMEOUT_S)
        while wire.recv(1):
            sent = 0
            while sent < num_bytes:
                sent += wire.send(vector[sent : sent + CHUNK_NUM_BYTES])


@contextmanager
def tls_sockets(identities: Identities, num_bytes: int) -> Iterator[Callable[[], Measured]]:
    """Yields what has so many bytes sent over one connection, and says the GB/s."""
    served = start_process(_serve, identities.server, num_bytes)
    room = memoryview(bytearray(num_bytes))
    with running([served]):
        connection = socket.create_connection((HOST, served.pipe.recv()), TIMEOUT_S)
        context = _context(identities.caller, ssl.PROTOCOL_TLS_CLIENT)
        with context.wrap_socket(connection, server_hostname=identities.caller.name) as wire:
            yield lambda: _pull(wire, room)


def _pull(wire: ssl.SSLSocket, room: memoryview) -> Measured:
    start_s = time.perf_counter()
    wire.sendall(b"?")
    filled = 0
    while filled < room.nbytes:
        num_bytes = wire.recv_into(room[filled : filled + CHUNK_NUM_BYTES])
        assert num_bytes, "the other end left"
        filled += num_bytes
    return {"pull_gb_per_s": room.nbytes / 1e9 / (time.perf_counter() - start_s)}
