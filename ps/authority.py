"""An authority for one run, which certifies a server's and a caller's identity and is forgotten."""

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from ps.tls import Identities, Identity

RUN_NAME = "asynception.run"
"""The name in a run's own certificates: what is certified is the run, wherever a server lies."""

VALID_DAYS = 400
"""From the day before the run begins, as clocks differ; runs take months."""


def new_identities() -> Identities:
    """A server's identity serves and doesn't call, a caller's calls and doesn't serve."""
    authority = _Authority()
    return Identities(
        authority.identity("server", ExtendedKeyUsageOID.SERVER_AUTH),
        authority.identity("caller", ExtendedKeyUsageOID.CLIENT_AUTH),
    )


class _Authority:
    """Holds the key that signs; nothing else ever sees it."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("asynception authority")
        self._pem = self._certified(
            self._name,
            self._key.public_key(),
            x509.BasicConstraints(ca=True, path_length=0),
            (),
        )

    def identity(self, title: str, usage: ObjectIdentifier) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certified(
            _name(title),
            key.public_key(),
            x509.BasicConstraints(ca=False, path_length=None),
            (
                x509.ExtendedKeyUsage([usage]),
                x509.SubjectAlternativeName([x509.DNSName(RUN_NAME)]),
            ),
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Identity(self._pem, certificate, pem, RUN_NAME)

    def _certified(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        constraints: x509.BasicConstraints,
        extensions: tuple[x509.ExtensionType, ...],
    ) -> bytes:
        """The signed certificate, as PEM."""
        start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=VALID_DAYS))
            .add_extension(constraints, critical=True)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


def _name(title: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
