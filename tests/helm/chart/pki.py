"""Certificates and keys of a release: what its Secrets hold, what its client needs, and what a service presents."""

from __future__ import annotations

import hashlib
import socket
import ssl
from pathlib import Path
from typing import Any

from certificates import Authority
from cryptography import x509

KEY = "a-key-of-32-characters-and-no-less"
SERVICES = ("gateway", "prefill", "decode")


class Pki:
    """Secrets NAME-tls of each service and of a client, and those of API keys: `keys` and `test-key`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._authority, self._folder = Authority(folder), folder
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        self.secrets = {
            "keys": {"keys.json": f'{{"alice": ["{digest}"]}}'.encode()},
            "test-key": {"key": KEY.encode()},
        }
        for name in (*SERVICES, "client"):
            self.issue(name)

    def issue(self, name: str) -> int:
        """A new certificate and key into the Secret NAME-tls. Its serial number."""
        issued = self._authority.issue(name, f"tandem-{name}")
        pairs = {"tls.crt": issued.cert, "tls.key": issued.key, "ca.crt": issued.ca}
        self.secrets[f"{name}-tls"] = {key: path.read_bytes() for key, path in pairs.items()}
        return x509.load_pem_x509_certificate(issued.cert.read_bytes()).serial_number

    @property
    def client(self) -> dict[str, Any]:
        """What `tandem.client.Client` is told."""
        files = {f"tls_{kind}": self._folder / f"client.{end}" for kind, end in (("cert", "crt"), ("key", "key"))}
        return {**files, "tls_ca": self._authority.ca, "tls_server_name": "tandem-gateway", "api_key": KEY}

    def presented(self, name: str, address: str, port: int) -> int:
        """The serial number of the certificate that a new connection to the service gets."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self._authority.ca)
        context.load_cert_chain(self._folder / "client.crt", self._folder / "client.key")
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((address, port), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname=f"tandem-{name}") as connection,
        ):
            certificate = connection.getpeercert(binary_form=True)
        assert certificate is not None
        return x509.load_der_x509_certificate(certificate).serial_number
