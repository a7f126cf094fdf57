"""TLS of a process: what it presents and whom it trusts, read again when the files change.

Life cycle: `tls_files` from flags -> `Tls(files, name)` at start, which proves by a handshake with itself that the
files work together -> credentials for servers, which take a renewed certificate for each new connection, and for
channels, of which a new one takes it. Connections that stand go on with what they began with.

Services know each other by DNS names in their certificates (`ROLE_NAMES`), whatever the address.
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tandem.errors import ConfigError
from tandem.service.files import Reloaded, check_private, read_bounded, tell_if_readable
from tandem.service.logging import get_logger

_log = get_logger(__name__)

ROLE_NAMES = {role: f"tandem-{role}" for role in ("gateway", "prefill", "decode")}
"""The DNS name in the certificate of each service."""

MAX_PEM_BYTES = 1 << 20
MOST_TURNS = 16
"""Of a handshake, which takes three."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: a certificate with its chain, its private key, and the authorities that are trusted."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Pem:
    """Contents of the files."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes


def add_tls_flags(parser: argparse.ArgumentParser) -> None:
    """--tls-cert, --tls-key and --tls-ca of a service."""
    add = parser.add_argument
    add(
        "--tls-cert", metavar="FILE", help="PEM: this service's certificate, with its chain; read again when it changes"
    )
    add("--tls-key", metavar="FILE", help="PEM: its private key")
    add("--tls-ca", metavar="FILE", help="PEM: authorities whose certificates peers have")


def tls_files(cert: str | Path | None, key: str | Path | None, ca: str | Path | None) -> TlsFiles | None:
    """The files that --tls-cert, --tls-key and --tls-ca name; None without any.

    Raises ConfigError for some of them, and for empty names: whoever gives a flag doesn't mean to go in clear.
    """
    given = {"--tls-cert": cert, "--tls-key": key, "--tls-ca": ca}
    _check_named(given)
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if not (cert and key and ca):
        raise ConfigError(f"{missing[0]}: --tls-cert, --tls-key and --tls-ca are needed together")
    return TlsFiles(Path(cert), Path(key), Path(ca))


def _check_named(given: Mapping[str, str | Path | None]) -> None:
    for flag, value in given.items():
        if value == "":
            raise ConfigError(f"{flag}: it is empty; name a file, or leave the flag out")


@dataclass(frozen=True, slots=True)
class ChannelTls:
    """How one channel is secured."""

    credentials: grpc.ChannelCredentials
    server_name: str = ""
    """The name that the server's certificate must have; empty: the host of its address."""


class Tls:
    """The certificates of one process. Thread-safe."""

    def __init__(self, files: TlsFiles, name: str) -> None:
        """`name` is the DNS name that peers look for, of ROLE_NAMES. Raises ConfigError for files that can't work."""
        self.files, self.name = files, name
        paths = (files.cert, files.key, files.ca)
        self._pem = Reloaded(paths, lambda: read_pem(files, name), "the TLS certificate")

    @property
    def version(self) -> int:
        """Grows when the files have been renewed."""
        return self._pem.current()[1]

    def server_credentials(self, *, client_certificates: bool = True) -> grpc.ServerCredentials:
        """For a server: every new connection gets the certificate of that moment, running ones keep theirs.

        `client_certificates`: only clients with a certificate of the authorities connect. Without, none is asked for.
        """
        first, told = self._pem.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal told
            pem, version = self._pem.current()
            if version == told:
                return None  # gRPC's word for: as before
            told = version
            return _server_configuration(pem)

        return grpc.dynamic_ssl_server_credentials(
            _server_configuration(first),
            fetch,  # type: ignore[arg-type]  # the stubs don't know of None
            require_client_authentication=client_certificates,
        )

    def channel(self, role: str) -> ChannelTls:
        """For a new channel to a service of `role`, with the certificate of this moment."""
        pem = self._pem.get()
        return ChannelTls(grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert), ROLE_NAMES[role])


class ClientTls:
    """How a client of the public API speaks TLS: files that are read again when they change. Thread-safe.

    What can't work leaves the last good ones in place, without a word: the program is somebody else's.
    """

    def __init__(self, ca: Path, cert: Path | None, key: Path | None, server_name: str) -> None:
        """Raises ConfigError for files that can't be read, or don't fit."""
        paths = [path for path in (ca, cert, key) if path is not None]
        self._server_name = server_name
        self._pem = Reloaded(paths, lambda: _read_client(ca, cert, key), "the client's certificate", quiet=True)

    @property
    def version(self) -> int:
        """Grows when the files have been renewed."""
        return self._pem.current()[1]

    def current(self) -> tuple[ChannelTls, int]:
        """For a new channel, with its version."""
        (trusted, private, chain), version = self._pem.current()
        return ChannelTls(grpc.ssl_channel_credentials(trusted, private, chain), self._server_name), version


def client_tls(
    ca: str | Path | None, cert: str | Path | None = None, key: str | Path | None = None, server_name: str = ""
) -> ChannelTls | None:
    """For one channel, with the files as they are now: see `client_files`."""
    files = client_files(ca, cert, key, server_name)
    return None if files is None else files.current()[0]


def client_files(
    ca: str | Path | None, cert: str | Path | None = None, key: str | Path | None = None, server_name: str = ""
) -> ClientTls | None:
    """TLS of a client that trusts `ca`, with a certificate if one is given; None: in clear.

    Raises ConfigError for files that can't be read, are needed together, or don't fit, and for empty names of files.
    """
    _check_named({"--tls-ca": ca, "--tls-cert": cert, "--tls-key": key})
    if not ca:
        if cert or key or server_name:
            raise ConfigError("--tls-ca: it is needed for TLS")
        return None
    if bool(cert) != bool(key):
        raise ConfigError("--tls-cert: --tls-cert and --tls-key are needed together")
    return ClientTls(Path(ca), Path(cert) if cert else None, Path(key) if key else None, server_name)


def _read_client(ca: Path, cert: Path | None, key: Path | None) -> tuple[bytes, bytes | None, bytes | None]:
    """Trusted, private key and chain. Raises ConfigError."""
    chain = read_bounded(cert, "--tls-cert", MAX_PEM_BYTES) if cert else None
    private = read_bounded(key, "--tls-key", MAX_PEM_BYTES) if key else None
    trusted = read_bounded(ca, "--tls-ca", MAX_PEM_BYTES)
    context = _context(ca, ssl.PROTOCOL_TLS_CLIENT)
    if cert and key:
        _load_own(context, cert, key)
    return trusted, private, chain


def _server_configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)


def read_pem(files: TlsFiles, name: str) -> Pem:
    """Reads the files and proves that they work together. Raises ConfigError with the flag's name."""
    check_private(files.key, "--tls-key")
    pem = _read(files)
    ends = check_files(files, name)
    if _read(files) != pem:
        raise ConfigError(f"--tls-cert: {files.cert} or its key is being replaced just now")
    tell_if_readable(files.key, "--tls-key")
    _log.info("TLS certificate read", file=str(files.cert), name=name, ends=ends)
    return pem


def _read(files: TlsFiles) -> Pem:
    return Pem(
        read_bounded(files.cert, "--tls-cert", MAX_PEM_BYTES),
        read_bounded(files.key, "--tls-key", MAX_PEM_BYTES),
        read_bounded(files.ca, "--tls-ca", MAX_PEM_BYTES),
    )


def check_files(files: TlsFiles, name: str) -> str:
    """A handshake with itself in memory, as server `name` and as its client, tells what peers would find wrong.

    Returns when the certificate ends, for people.

    Raises ConfigError: no PEM, a key of another certificate, an unknown authority, a wrong time, a missing name.
    """
    server, client = (_context(files.ca, kind) for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    for context in (server, client):
        _load_own(context, files.cert, files.key)
    server.verify_mode = ssl.CERT_REQUIRED
    try:
        return _handshake(server, client, name)
    except ssl.SSLCertVerificationError as exc:
        raise ConfigError(f"--tls-cert: {files.cert} would be refused by peers: {exc.verify_message}") from exc
    except ssl.SSLError as exc:
        raise ConfigError(f"--tls-cert: {files.cert} would be refused by peers: {exc.reason or exc}") from exc


def _context(ca: Path, protocol: int) -> ssl.SSLContext:
    """Trusts the authorities in `ca`. Raises ConfigError."""
    context = ssl.SSLContext(protocol)
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)  # gRPC isn't that strict
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"--tls-ca: {ca} holds no certificates: {_reason(exc)}") from exc
    return context


def _load_own(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Raises ConfigError."""
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as exc:
        what = f"{key} is no unencrypted private key of the certificate in {cert}"
        raise ConfigError(f"--tls-key: {what}: {_reason(exc)}") from exc


def _no_password() -> str:
    raise ValueError("it is encrypted")


def _reason(exc: Exception) -> str:
    return str(getattr(exc, "reason", None) or getattr(exc, "strerror", None) or exc)


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str:
    """Both ends in turns over two buffers, until neither waits for the other. When the server's certificate ends.

    Raises ssl.SSLError.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    reader = client.wrap_bio(to_client, to_server, server_hostname=name)
    ends: list[Callable[[], Any]] = [
        reader.do_handshake,
        server.wrap_bio(to_server, to_client, server_side=True).do_handshake,
    ]
    for _ in range(MOST_TURNS):
        for end in list(ends):
            try:
                end()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
    if ends:
        raise ssl.SSLError(0, "the handshake comes to no end")
    return str((reader.getpeercert() or {}).get("notAfter", ""))
