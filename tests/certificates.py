"""A certificate authority for tests: files as `--tls-cert`, `--tls-key` and `--tls-ca` take them."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

ROLES = ("tandem-gateway", "tandem-prefill", "tandem-decode")


@dataclass(frozen=True)
class Issued:
    """Paths of one certificate, its key and its authority's certificate."""

    cert: Path
    key: Path
    ca: Path

    def flags(self) -> list[str]:
        return ["--tls-cert", str(self.cert), "--tls-key", str(self.key), "--tls-ca", str(self.ca)]


class Authority:
    """Issues certificates into a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._name = folder, _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ca = folder / f"{name}.pem"
        builder = self._builder(self._name, self._key.public_key(), 10).add_extension(
            x509.BasicConstraints(True, 0), True
        )
        self.ca.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def issue(self, name: str, *dns: str, days: float = 1, uris: tuple[str, ...] = ()) -> Issued:
        """A certificate for the DNS names (and for 127.0.0.1), until `days` from now. Again: it replaces the files."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        names += [x509.DNSName(text) for text in dns]
        names += [x509.UniformResourceIdentifier(text) for text in uris]
        builder = self._builder(_name(name), key.public_key(), days)
        certificate = builder.add_extension(x509.SubjectAlternativeName(names), False).sign(self._key, hashes.SHA256())
        issued = Issued(self._folder / f"{name}.crt", self._folder / f"{name}.key", self.ca)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _replace(issued.key, private)
        _replace(issued.cert, certificate.public_bytes(Encoding.PEM))
        return issued

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: float) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=30))
            .not_valid_after(now + datetime.timedelta(days=days))
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.touch(0o600)
    fresh.write_bytes(data)
    fresh.replace(path)
