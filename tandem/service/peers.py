"""Who is at the other end of an RPC, as its certificate says, and which RPCs are for whom.

Without TLS nobody has a name and everybody may call. With TLS the services' own RPCs are for holders of a role's
certificate (`tandem.service.tls.ROLE_NAMES`); health and reflection are for everybody who could connect.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from tandem.errors import PermissionDeniedError, UnauthenticatedError

Context = grpc.aio.ServicerContext[Any, Any]
Admit = Callable[[str, Context], None]
"""Takes an RPC's full method and its context; raises for a caller that may not."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A certificate's holder. Without TLS, or without a certificate, all fields are empty."""

    dns_names: frozenset[str] = frozenset()
    uris: tuple[str, ...] = ()
    common_name: str = ""
    fingerprint: str = ""
    """SHA-256 of the certificate, hexadecimal."""

    @property
    def known(self) -> bool:
        """True for somebody who presented a certificate."""
        return bool(self.fingerprint)


NOBODY = Peer()


def peer_of(context: Context) -> Peer:
    """The peer of an RPC; NOBODY without a certificate."""
    found: Mapping[str, Any] = context.auth_context() or {}
    pem = _texts(found, "x509_pem_cert")
    if not pem:
        return NOBODY
    der = ssl.PEM_cert_to_DER_cert(pem[0].strip())
    return Peer(
        dns_names=frozenset(_texts(found, "peer_dns")),
        uris=_texts(found, "peer_uri"),
        common_name=next(iter(_texts(found, "x509_common_name")), ""),
        fingerprint=hashlib.sha256(der).hexdigest(),
    )


def _texts(found: Mapping[str, Any], key: str) -> tuple[str, ...]:
    # What is no UTF-8 stays unlike anything else.
    return tuple(value.decode("utf-8", "backslashreplace") for value in found.get(key, ()))


def callers(names: Mapping[str, str]) -> Admit:
    """Admits to each service in `names` (full name: DNS name) only peers with that name; other services are open.

    The check raises UnauthenticatedError without a certificate, PermissionDeniedError with another one.
    """

    def admit(method: str, context: Context) -> None:
        """Raises UnauthenticatedError without a certificate, PermissionDeniedError with one of another role."""
        service = method.strip("/").partition("/")[0]
        wanted = names.get(service)
        if wanted is None:
            return
        peer = peer_of(context)
        if not peer.known:
            raise UnauthenticatedError(f"{service} needs a client certificate with the DNS name {wanted}")
        if wanted not in peer.dns_names:
            has = ", ".join(sorted(peer.dns_names)) or "none"
            raise PermissionDeniedError(
                f"{service} is for callers with the DNS name {wanted} in their certificate; this one has {has}"
            )

    return admit
