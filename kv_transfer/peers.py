"""Whose a sender's addresses are: an incarnation, with its endpoints, belongs to whoever first opened a transfer as it.

Life of an entry: the first transfer of an incarnation that could connect binds it (`bind`) -> every later one must be
opened with a certificate of the same names, with the same secret of the process and, for each transport, with the same
endpoint (`check`) -> the entry goes when MOST_SENDERS others have been used since.

So a sender can't have the receiver read from an address that is another's, and one that was seen stays what it is. A
certificate may be renewed while a process lives: another fingerprint is the same sender's when the names and the secret
are. Without a secret (a sender of an earlier version) the fingerprint must stay.

**Endpoints are compared byte by byte**, and nothing here knows what they mean. A transport therefore makes its endpoint
once and gives these very bytes for the life of its incarnation: metadata that could be written in another order, or
that grows with later registrations, has to be frozen when the source is made. An endpoint that holds more than one
thing to reach somebody by (NIXL's: an agent's name, its addresses) is told apart by its transport (`claims`), and each
of them belongs to one incarnation: another can't wrap it into an endpoint of its own.

Every failure is a PermissionDeniedError with reason PEER_MISMATCH.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from kv_transfer.messages import MAX_INCARNATION, SECRET_BYTES, Open
from kv_transfer.ranks import split_endpoint
from tandem.errors import InvalidRequestError, PermissionDeniedError

MOST_SENDERS = 4096
MAX_ENDPOINT_BYTES = 256 << 10
LEAST_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True)
class Identity:
    """Who opened a transfer, by the certificate: its names and its fingerprint. Both are empty without TLS."""

    names: frozenset[str] = frozenset()
    fingerprint: str = ""


NOBODY = Identity()


@dataclass(slots=True)
class _Sender:
    identity: Identity
    secret: bytes = field(repr=False)
    """SHA-256 of the secret, or empty."""
    endpoints: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    """SHA-256 of the endpoints, one a rank, by transport."""
    claims: set[tuple[str, bytes]] = field(default_factory=set)
    """What nobody else may present: transport, and SHA-256 of an endpoint or of a part of one."""


class SenderTable:
    """The senders that one receiver has seen. Thread-safe."""

    def __init__(self, most: int = MOST_SENDERS) -> None:
        """`most`: entries kept; the one used longest ago goes first."""
        self._most = most
        self._lock = threading.Lock()
        self._senders: OrderedDict[str, _Sender] = OrderedDict()
        self._owners: dict[tuple[str, bytes], str] = {}

    def __len__(self) -> int:
        """Incarnations known."""
        return len(self._senders)

    def check(self, identity: Identity, opening: Open, claims: Iterable[bytes] = ()) -> None:
        """Before anything is connected: raises PermissionDeniedError unless the opening is what is known of its sender.

        `claims`: parts of its endpoint that nobody else may present (`TargetTransport.claims`).
        InvalidRequestError for an endpoint or a secret of a size that none has.
        """
        _check_sizes(opening)
        with self._lock:
            self._check(identity, opening, _claims(opening, claims))

    def bind(self, identity: Identity, opening: Open, claims: Iterable[bytes] = ()) -> None:
        """After the connection: from now on the sender is this. Raises as `check` does."""
        claimed = _claims(opening, claims)
        with self._lock:
            self._check(identity, opening, claimed)
            sender = self._senders.get(opening.source_incarnation)
            if sender is None:
                sender = self._senders[opening.source_incarnation] = _Sender(identity, _digest(opening.secret))
            sender.identity = identity
            sender.endpoints[opening.transport] = _digests(opening)
            sender.claims |= claimed
            self._owners.update(dict.fromkeys(claimed, opening.source_incarnation))
            self._senders.move_to_end(opening.source_incarnation)
            self._forget_oldest()

    def _check(self, identity: Identity, opening: Open, claims: set[tuple[str, bytes]]) -> None:
        for claim in claims:
            owner = self._owners.get(claim, opening.source_incarnation)
            if owner != opening.source_incarnation:
                raise _mismatch(opening, f"presents the {opening.transport} endpoint of incarnation {owner!r}")
        sender = self._senders.get(opening.source_incarnation)
        if sender is None:
            return
        if identity.names != sender.identity.names:
            raise _mismatch(opening, f"came with a certificate of {_names(sender.identity)}, now of {_names(identity)}")
        if not hmac.compare_digest(sender.secret, _digest(opening.secret)):
            raise _mismatch(opening, "is another process's: the secret differs")
        if not opening.secret and identity.fingerprint != sender.identity.fingerprint:
            raise _mismatch(
                opening, "came with another certificate, and without a secret that would tell a renewed one"
            )
        known = sender.endpoints.get(opening.transport)
        if known is not None and known != _digests(opening):
            raise _mismatch(opening, f"had another endpoint for {opening.transport} before")

    def _forget_oldest(self) -> None:
        while len(self._senders) > self._most:
            incarnation, sender = self._senders.popitem(last=False)
            for claim in sender.claims:
                if self._owners.get(claim) == incarnation:
                    del self._owners[claim]


def _check_sizes(opening: Open) -> None:
    if len(opening.source_incarnation) > MAX_INCARNATION:
        raise InvalidRequestError(
            f"an incarnation has at most {MAX_INCARNATION} characters", field="open.source_incarnation"
        )
    if len(opening.endpoint) > MAX_ENDPOINT_BYTES:
        raise InvalidRequestError(f"an endpoint has at most {MAX_ENDPOINT_BYTES} bytes", field="open.endpoint")
    if opening.secret and not LEAST_SECRET_BYTES <= len(opening.secret) <= 2 * SECRET_BYTES:
        raise InvalidRequestError(
            f"a secret has {LEAST_SECRET_BYTES} to {2 * SECRET_BYTES} bytes", field="open.source_secret"
        )


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() if data else b""


def _digests(opening: Open) -> tuple[bytes, ...]:
    """Of each rank's endpoint. Raises InvalidRequestError when they aren't as many as the layout says."""
    return tuple(_digest(endpoint) for endpoint in split_endpoint(opening.endpoint, opening.layout.tp_size))


def _claims(opening: Open, parts: Iterable[bytes]) -> set[tuple[str, bytes]]:
    endpoints = filter(None, _digests(opening))
    return {(opening.transport, digest) for digest in (*endpoints, *map(_digest, parts))}


def _names(identity: Identity) -> str:
    return ", ".join(sorted(identity.names)) or "nobody"


def _mismatch(opening: Open, what: str) -> PermissionDeniedError:
    return PermissionDeniedError(f"sender {opening.source_incarnation[:64]!r} {what}", reason="PEER_MISMATCH")
