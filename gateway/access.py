"""Who may use the public API, and for which tenant: by API keys from a file, or by client certificates.

The file (JSON, or TOML where its name says so) maps tenants to SHA-256 hashes of their keys, in hexadecimal:

    {"alice": ["9f86d081..."], "bob": ["60303ae2...", "fd61a03a..."]}

It is read again when it changes: a new key works, and a removed one doesn't, from the next request on. Keys are random
and long (`openssl rand -hex 32`), so that a plain hash keeps them. No key is kept or logged.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc

from gateway.tenants import ANONYMOUS
from tandem.errors import ConfigError, UnauthenticatedError
from tandem.service.files import Reloaded, check_private, read_bounded, tell_if_readable
from tandem.service.peers import Peer, peer_of

FLAG = "--api-keys"
MAX_FILE_BYTES = 1 << 20
MAX_KEY_BYTES = 512
HEADER = "authorization"
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{64}")
_SECRET = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
"""What a key or its hash looks like."""
Context = grpc.aio.ServicerContext[Any, Any]


class Keys:
    """Hashes of all keys, and whose they are."""

    def __init__(self, tenants: Mapping[str, Iterable[str]]) -> None:
        """`tenants` as checked by `read_keys`."""
        # Found by a digest under a secret of this process, so that how long the search takes tells nothing of a hash.
        self._secret = secrets.token_bytes(32)
        self._found = {
            self._blind(bytes.fromhex(text)): (bytes.fromhex(text), tenant)
            for tenant, hashes in tenants.items()
            for text in hashes
        }

    def _blind(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")

    def tenant_of(self, key: bytes) -> str | None:
        """The tenant of a key; None for an unknown one."""
        digest = hashlib.sha256(key).digest()
        known, tenant = self._found.get(self._blind(digest), (bytes(32), None))
        return tenant if hmac.compare_digest(known, digest) else None


def read_keys(path: Path) -> Keys:
    """Reads the file. Raises ConfigError that says what is wrong, but never with a hash or a name.

    In a file that is the wrong way round the names are keys.
    """
    check_private(path, FLAG)
    data = read_bounded(path, FLAG, MAX_FILE_BYTES)
    try:
        text = data.decode("utf-8")
        tenants = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as exc:
        # The parser's own words might quote the file.
        raise ConfigError(f"{FLAG}: {path} is no {'TOML' if path.suffix == '.toml' else 'JSON'}") from exc
    _check(tenants, path)
    tell_if_readable(path, FLAG)
    return Keys(tenants)


def _check(tenants: object, path: Path) -> None:
    if not isinstance(tenants, dict) or not tenants:
        raise ConfigError(f"{FLAG}: {path} must map at least one tenant to hashes of its keys")
    seen: dict[str, int] = {}
    for number, (tenant, hashes) in enumerate(tenants.items(), 1):
        entry = f"{FLAG}: {path}: tenant number {number}"
        if not _TENANT.fullmatch(tenant):
            raise ConfigError(f"{entry}: a tenant's name has 1 to 128 letters, digits and . _ @ + -")
        if _SECRET.fullmatch(tenant):
            raise ConfigError(f"{entry} is named like a key or a hash: each tenant's name comes before its hashes")
        if not isinstance(hashes, list) or not all(isinstance(one, str) and _HASH.fullmatch(one) for one in hashes):
            raise ConfigError(f"{entry} needs a list of SHA-256 hashes, 64 digits of 0-9a-f each")
        for one in hashes:
            if seen.setdefault(one, number) != number:
                raise ConfigError(f"{entry} has the same key as tenant number {seen[one]}")


class Access:
    """Tells tenants apart. Belongs to the event loop."""

    def __init__(self, keys_file: Path | None = None, *, certificates: bool = False) -> None:
        """With `keys_file` everybody needs a key; else with `certificates` the client's certificate tells who it is;
        with neither all are one anonymous tenant. Raises ConfigError for a bad file.
        """
        self._certificates = certificates
        self._keys: Reloaded[Keys] | None = None
        if keys_file is not None:
            self._keys = Reloaded([keys_file], lambda: read_keys(keys_file), "the file of API keys")

    @property
    def open(self) -> bool:
        """Whoever reaches the gateway may use it."""
        return self._keys is None and not self._certificates

    def tenant_of(self, context: Context) -> str:
        """The tenant of an RPC's caller. Raises UnauthenticatedError."""
        if self._keys is not None:
            tenant = self._keys.get().tenant_of(_bearer(context.invocation_metadata() or ()))
            if tenant is None:
                raise UnauthenticatedError("this API key is unknown", reason="UNKNOWN_API_KEY")
            return tenant
        return certificate_tenant(peer_of(context)) if self._certificates else ANONYMOUS

    def admit(self, method: str, context: Context) -> None:
        """For the server shell: the public API is for tenants; health and reflection are for everybody."""
        if method.startswith("/tandem."):
            self.tenant_of(context)


def certificate_tenant(peer: Peer) -> str:
    """`cert:uri:NAME` by the first URI of a certificate, else `cert:dns:NAME` by the alphabetically first of its DNS
    names, else `cn:NAME`. Raises UnauthenticatedError.

    The kinds are apart, because authorities that check one kind of name may take another as it comes.
    """
    kinds = (("cert:uri", peer.uris), ("cert:dns", sorted(peer.dns_names)), ("cn", (peer.common_name,)))
    tenant = next((f"{kind}:{name}" for kind, names in kinds for name in names if name), "")
    if not peer.known or not tenant:
        raise UnauthenticatedError("a client certificate with a name is needed", reason="NO_CERTIFICATE")
    return tenant


def _bearer(metadata: Iterable[tuple[str, Any]]) -> bytes:
    """The key of the one `authorization: Bearer KEY`. Raises UnauthenticatedError."""
    values = [value for name, value in metadata if name == HEADER]
    if len(values) != 1 or not isinstance(values[0], str):
        raise UnauthenticatedError("send one header `authorization: Bearer KEY`", reason="NO_API_KEY")
    scheme, _, key = values[0].partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not 1 <= len(key.encode()) <= MAX_KEY_BYTES:
        raise UnauthenticatedError("the header `authorization` must be `Bearer KEY`", reason="NO_API_KEY")
    return key.encode()
