"""Certificates as people's own authorities issue them, good ones and others."""

import datetime
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ps.tls import Identity

BOTH_USES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
DAY = datetime.timedelta(days=1)


@dataclass
class Certified:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self):
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self, encryption=None):
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            encryption or serialization.NoEncryption(),
        )

    def identity(self, authorities, chain=()):
        """What a process with it shows, and whom it trusts."""
        pem = b"".join(each.pem for each in (self, *chain))
        return Identity(b"".join(each.pem for each in authorities), pem, self.key_pem())


def issue(
    title, issuer=None, *, hosts=(), names=(), uses=(), authority=False, days=(-1, 1)
) -> Certified:
    """Signed by `issuer`, or by itself. days: from which to which it is valid, as of now."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    others = [x509.IPAddress(ipaddress.ip_address(host)) for host in hosts]
    others += [x509.DNSName(name) for name in names]
    if others:
        builder = builder.add_extension(x509.SubjectAlternativeName(others), critical=False)
    if uses:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    return Certified(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def certify(folder, host):
    """A certificate for both uses that is its own authority: the settings with its files."""
    own = issue("own", hosts=[host], authority=True)
    paths = {}
    for setting, content in (
        ("authority_file", own.pem),
        ("certificate_file", own.pem),
        ("key_file", own.key_pem()),
    ):
        path = folder / f"{setting}.pem"
        path.write_bytes(content)
        paths[setting] = str(path)
    return paths


def lock_key(path):
    """Put a password on the key in a file."""
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    encryption = serialization.BestAvailableEncryption(b"a password")
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
