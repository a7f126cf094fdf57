"""Who a request belongs to, and which cached prefixes it may share.

A tenant is a name that comes from an authenticated identity, never from the request. Its cache scope goes with the
record into the prefix hashes of both workers, so that nobody can see, or time, what another tenant's prompts were.
"""

from __future__ import annotations

import hashlib

ANONYMOUS = ""
"""The tenant of everybody where no identity is asked for."""

_DOMAIN = b"tandem-cache-scope-v1"


def cache_scope(tenant: str, salt: str = "") -> str:
    """64 hexadecimal digits for a tenant and its request's salt; empty when there is neither.

    Fields are length-prefixed, so no two different pairs run together. The salt itself goes no further.
    """
    if tenant == ANONYMOUS and not salt:
        return ""
    digest = hashlib.sha256(_DOMAIN)
    for text in (tenant, salt):
        raw = text.encode("utf-8")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()
