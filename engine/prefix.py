"""Names of cached KV blocks: SHA-256 chains over everything that the bits of a block depend on. Torch-free, stateless.

A block's name covers its own tokens and, through the chain, all tokens before it, the model, the layout, the numerics
the tenant and its cache scope, so equal names mean equal KV, and tenants never see (or time) each other's prompts.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

_DOMAIN = b"tandem-prefix-v2"
_MAX_TOKEN = (1 << 32) - 1


def prefix_root(tenant: str, cache_scope: str, model_id: str, layout_id: str, numerics_id: str) -> bytes:
    """The 32-byte start of a chain. Fields are length-prefixed, so no two different tuples run together."""
    digest = hashlib.sha256(_DOMAIN)
    for text in (tenant, cache_scope, model_id, layout_id, numerics_id):
        raw = text.encode("utf-8")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()


def block_hashes(
    root: bytes,
    tokens: Sequence[int],
    block_size: int,
    previous: list[bytes] | None = None,
) -> list[bytes]:
    """The 32-byte names of all full blocks of `tokens`, in order; a partial last block has none.

    `previous` holds the names of the first blocks from an earlier call with the same root, block size and leading
    tokens: they are kept, and only later blocks are hashed. Returns a new list. Token ids are 0 .. 2^32-1 (ValueError
    otherwise).
    """
    hashes = list(previous or ())
    full = len(tokens) // block_size
    if len(hashes) > full:
        raise ValueError(
            f"{len(hashes)} earlier hashes, but {len(tokens)} tokens fill only {full} blocks of {block_size}"
        )
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, full * block_size, block_size):
        parent = hashlib.sha256(parent + _token_bytes(tokens[start : start + block_size])).digest()
        hashes.append(parent)
    return hashes


def _token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit words, the same on every machine."""
    try:
        words = array("I", tokens)
    except OverflowError as error:
        raise ValueError(f"token ids must be 0 .. {_MAX_TOKEN}: {error}") from None
    if sys.byteorder == "big":  # pragma: no cover
        words.byteswap()
    return words.tobytes()
