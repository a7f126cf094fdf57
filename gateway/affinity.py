"""Which prompt prefixes a worker has probably cached, as the gateway itself remembers.

Life cycle: one `PrefixMemory` per worker incarnation; `remember` when a prompt is sent there, `expected` when a pair
is chosen. A guess: the worker decides what is cached, and a wrong guess costs time only.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

CHUNK = 32
MAX_ENTRIES = 65_536


def prefix_hashes(tokens: Sequence[int], cache_scope: str = "") -> list[bytes]:
    """A chained hash for every full chunk of 32 tokens. `cache_scope` as in the record: other scopes, other hashes."""
    data = array("I", tokens).tobytes()
    width = len(data) // max(1, len(tokens)) * CHUNK
    digest = hashlib.blake2b(cache_scope.encode(), digest_size=16).digest() if cache_scope else b""
    hashes = []
    for at in range(0, len(data) - width + 1, width) if width else ():
        digest = hashlib.blake2b(data[at : at + width], key=digest, digest_size=16).digest()
        hashes.append(digest)
    return hashes


class PrefixMemory:
    """A bounded set of prefix hashes, the least recently used leave first."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        """Empty."""
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._max = max_entries

    def remember(self, hashes: Sequence[bytes]) -> None:
        """The prompt's KV will be there. The tail is entered first, so that it leaves first."""
        for item in reversed(hashes):
            self._seen[item] = None
            self._seen.move_to_end(item)
        while len(self._seen) > self._max:
            self._seen.popitem(last=False)

    def expected(self, hashes: Sequence[bytes]) -> int:
        """Tokens of the longest remembered prefix."""
        count = 0
        for item in hashes:
            if item not in self._seen:
                break
            count += 1
        return count * CHUNK
