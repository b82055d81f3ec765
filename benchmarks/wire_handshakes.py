"""Handshakes of strangers for `wire_fuzz.py --tls`: none may be answered by more than its end."""

import contextlib
import socket
import ssl
from collections.abc import Callable

from wire_cases import Cases
from wire_target import PATIENCE_S, PromiseBroken, check

from ps.authority import new_identities
from ps.tls import Identity

RECORD = b"\x16\x03\x01"
"""How a record of a handshake begins: then its length in two bytes."""


def ended(connection: socket.socket) -> bool:
    """Read until the peer ends the connection; True. Raises what says that there is no more yet."""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
        while connection.recv(1 << 16):
            pass
    return True


def send_to_the_end(connection: socket.socket, data: bytes) -> None:
    """Send, say that there is no more, and read until the server ends the connection too."""
    with contextlib.suppress(ConnectionError, OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    connection.settimeout(PATIENCE_S)
    try:
        ended(connection)
    except TimeoutError:
        raise PromiseBroken("a connection is kept open though nothing more can come") from None


def _stranger(identity: Identity | None, newest: ssl.TLSVersion) -> ssl.SSLContext:
    """Of someone who takes any server; with the certificate of another run, or none."""
    context = identity.caller_context() if identity else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = newest
    return context


class Handshakes:
    """Endless attempts, the same for a seed but for what OpenSSL draws by itself."""

    def __init__(self, caller: Identity, cases: Cases) -> None:
        """caller: whose good handshakes are changed a little."""
        self._good, self._name, self._cases = caller.caller_context(), caller.name, cases
        self._strangers = [
            _stranger(identity, newest)
            for identity in (None, new_identities().caller)
            for newest in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        ]
        self._kinds: tuple[Callable[[socket.socket, bytes], None], ...] = (
            self._bytes,
            self._changed_answer,
            self._wrong_certificate,
        )

    def attempt(self, connection: socket.socket, ticket: bytes) -> None:
        """One, on a bare connection. ticket: what would let a good caller in."""
        self._cases.random.choice(self._kinds)(connection, ticket)

    def hello(self) -> bytes:
        """How a good caller begins."""
        return self._flight(*self._caller())

    def _caller(self) -> tuple[ssl.SSLObject, ssl.MemoryBIO]:
        """A good caller without a socket: itself, and what it will say."""
        self._heard, said = ssl.MemoryBIO(), ssl.MemoryBIO()
        return self._good.wrap_bio(self._heard, said, server_hostname=self._name), said

    @staticmethod
    def _flight(caller: ssl.SSLObject, said: ssl.MemoryBIO) -> bytes:
        """What it says until it has to hear something, or has said all."""
        with contextlib.suppress(ssl.SSLWantReadError):
            caller.do_handshake()
        return said.read()

    def _bytes(self, connection: socket.socket, ticket: bytes) -> None:
        """Noise, a record of noise, a changed hello, or the ticket in the clear."""
        noise = self._cases.noise(600)
        data = (
            noise,
            RECORD + len(noise).to_bytes(2, "big") + noise,
            self._cases.mutated(self.hello()) + noise,
            ticket + noise,
        )[self._cases.random.randrange(4)]
        send_to_the_end(connection, data)

    def _changed_answer(self, connection: socket.socket, ticket: bytes) -> None:
        """A good hello; then the certificate and what proves it, not as they should be."""
        caller, said = self._caller()
        connection.sendall(self._flight(caller, said))
        answer = b""
        while not answer:
            heard = connection.recv(1 << 16)
            check(heard != b"", "a good hello was not answered")
            self._heard.write(heard)
            answer = self._flight(caller, said)
        send_to_the_end(connection, self._cases.mutated(answer))

    def _wrong_certificate(self, connection: socket.socket, ticket: bytes) -> None:
        """A handshake as good as others', by someone with another certificate, or none."""
        context = self._cases.random.choice(self._strangers)
        with (
            contextlib.suppress(ConnectionError, ssl.SSLError),
            context.wrap_socket(connection, server_hostname=self._name) as encrypted,
        ):
            # In TLS 1.3 the caller is done before the server has looked at its certificate.
            encrypted.sendall(ticket)
            check(encrypted.recv(1) == b"", "a stranger was answered")
