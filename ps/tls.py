"""Mutual TLS between the processes of a run: who may serve, and who may call.

`auto` needs nothing from people: the driver makes an authority for the run alone, with one
certificate for servers and one for callers, and hands them to the actors through Ray. The
authority's key is forgotten at once. With files, people's own authority says who belongs.
"""

import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import grpc
from pydantic import model_validator

from model.errors import InputError
from model.settings import Settings


class SecuritySettings(Settings):
    """Whether what processes say to each other is encrypted, and both sides show who they are."""

    tls: Literal["off", "auto", "files"] = "off"
    """auto: certificates for this run alone, made when it starts. files: your own, below. With
    either, gRPC and the tcp lane are mutual TLS; within a node vectors stay in shared memory."""
    authority_file: str | None = None
    """PEM of the authorities that certificates of servers and callers must come from."""
    certificate_file: str | None = None
    """PEM of the certificate, and the chain behind it, that every process shows: good for servers
    and clients, and with the names or addresses by which the nodes are called."""
    key_file: str | None = None
    """PEM of its private key. The three files are read on every node."""

    @model_validator(mode="after")
    def _files_are_for_files(self) -> Self:
        for name in ("authority_file", "certificate_file", "key_file"):
            value = getattr(self, name)
            if self.tls == "files" and value is None:
                raise ValueError(
                    f'security.tls = "files" needs security.{name}: give it, or set tls to "auto"'
                )
            if self.tls != "files" and value is not None:
                raise ValueError(
                    f'security.{name} = {value!r} has no effect with security.tls = "{self.tls}": '
                    'remove it, or set tls to "files"'
                )
        return self


@dataclass(frozen=True)
class Identity:
    """What one side shows, and whom it trusts; PEM. `repr` keeps the key to itself."""

    authorities: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    name: str | None = None
    """That a server's certificate must have; its address unless given."""

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server that takes in callers with a certificate alone."""
        pair = (self.key, self.certificate)
        return grpc.ssl_server_credentials([pair], self.authorities, require_client_auth=True)

    def channel(self, address: str, options: tuple[tuple[str, Any], ...]) -> grpc.Channel:
        """A connection to a server that must show a certificate with the right name."""
        credentials = grpc.ssl_channel_credentials(self.authorities, self.key, self.certificate)
        name = (("grpc.ssl_target_name_override", self.name),) if self.name else ()
        return grpc.secure_channel(address, credentials, (*options, *name))

    def server_context(self) -> ssl.SSLContext:
        """As `server_credentials`, for sockets. Raises InputError for PEM that doesn't serve."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nobody resumes a session: each is verified in full
        return context

    def caller_context(self) -> ssl.SSLContext:
        """As `channel`, for sockets; the name goes into each connection. Raises InputError.

        But for a certificate that has a name as its common name alone: that isn't looked at.
        """
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        context.hostname_checks_common_name = False
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3  # both ends are ours
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: trusts what it is given
        try:
            with _as_file(self.authorities) as path:
                context.load_verify_locations(path)
            with _as_file(self.certificate + b"\n" + self.key) as path:
                context.load_cert_chain(path, password=b"")  # or OpenSSL asks the terminal for one
        except ssl.SSLError as error:
            raise InputError(
                f"security.authority_file, certificate_file, key_file: OpenSSL can't use them"
                f" ({error}), so no process could show or check a certificate; give PEM of the"
                f" authorities, of the certificate with its chain, and of its key with no password"
            ) from error
        return context


@dataclass(frozen=True)
class Identities:
    """What the processes of one run show: servers and callers."""

    server: Identity
    caller: Identity


def identities(settings: SecuritySettings) -> Identities | None:
    """For a new run; None without TLS. Raises InputError for files that can't be used."""
    if settings.tls == "off":
        return None
    if settings.tls == "files":
        return _read(settings)
    from ps.authority import new_identities  # for the driver alone

    return new_identities()


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path to it, all that `ssl` takes; in memory alone where the system has such files."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("pem"), "wb", buffering=0) as file:
            file.write(content)
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile(buffering=0) as named:
            named.write(content)
            yield named.name


def _read(settings: SecuritySettings) -> Identities:
    own = Identity(
        _content("authority_file", settings.authority_file),
        _content("certificate_file", settings.certificate_file),
        _content("key_file", settings.key_file),
    )
    own.server_context()  # says here, rather than on every node, what is wrong with them
    return Identities(own, own)


def _content(name: str, path: str | None) -> bytes:
    assert path is not None, "the settings see to it"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"security.{name} = {path!r} can't be read: {error.strerror}") from None
    if b"-----BEGIN" not in content:
        raise InputError(f"security.{name} = {path!r} is no PEM file: convert it with openssl")
    return content
