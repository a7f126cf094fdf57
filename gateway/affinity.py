"""Which prompt prefixes a worker has probably cached, as the gateway itself remembers.

Life cycle: one `PrefixMemory` per worker incarnation; `remember` when a prompt is sent there, `expected` when a pair
is chosen. A guess: the worker decides what is cached, and a wrong guess costs time only.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

LEAST_CHUNK = 32
MAX_ENTRIES = 65_536


def chunk_for(block_size: int) -> int:
    """Tokens that are remembered as one: whole blocks of a worker, which caches no less, and not too few."""
    return -(-LEAST_CHUNK // max(1, block_size)) * max(1, block_size)


class Prefix:
    """A prompt's hashes for each width of chunk that somebody asks for. `cache_scope` as in the record."""

    def __init__(self, tokens: Sequence[int], cache_scope: str = "") -> None:
        """Hashes nothing yet."""
        self._tokens, self._scope = tokens, cache_scope
        self._hashes: dict[int, list[bytes]] = {}

    def hashes(self, chunk: int) -> list[bytes]:
        """`prefix_hashes`, made once."""
        if chunk not in self._hashes:
            self._hashes[chunk] = prefix_hashes(self._tokens, self._scope, chunk)
        return self._hashes[chunk]


def prefix_hashes(tokens: Sequence[int], cache_scope: str = "", chunk: int = LEAST_CHUNK) -> list[bytes]:
    """A chained hash for every full chunk. `cache_scope` as in the record: other scopes, other hashes."""
    data = array("I", tokens).tobytes()
    width = len(data) // max(1, len(tokens)) * chunk
    digest = hashlib.blake2b(cache_scope.encode(), digest_size=16).digest() if cache_scope else b""
    hashes = []
    for at in range(0, len(data) - width + 1, width) if width else ():
        digest = hashlib.blake2b(data[at : at + width], key=digest, digest_size=16).digest()
        hashes.append(digest)
    return hashes


class PrefixMemory:
    """A bounded set of prefix hashes, the least recently used leave first."""

    def __init__(self, block_size: int = 0, max_entries: int = MAX_ENTRIES) -> None:
        """Empty. `block_size` is the worker's own; 0 while it is unknown."""
        self._chunk = chunk_for(block_size)
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._max = max_entries

    def remember(self, prefix: Prefix) -> None:
        """The prompt's KV will be there. The tail is entered first, so that it leaves first."""
        for item in reversed(prefix.hashes(self._chunk)):
            self._seen[item] = None
            self._seen.move_to_end(item)
        while len(self._seen) > self._max:
            self._seen.popitem(last=False)

    def expected(self, prefix: Prefix) -> int:
        """Tokens of the longest remembered prefix, in whole blocks of the worker."""
        count = 0
        for item in prefix.hashes(self._chunk):
            if item not in self._seen:
                break
            count += 1
        return count * self._chunk
