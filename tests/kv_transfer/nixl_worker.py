"""A sending worker over NIXL as a process of its own, for test_nixl.py: prints its endpoint, then obeys lines."""

from __future__ import annotations

import sys

from kv_transfer.nixl_source import NixlSource
from kv_transfer.pool import LocalPool

NUM_BLOCKS, BLOCK_BYTES, INCARNATION = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

pool = LocalPool(NUM_BLOCKS, BLOCK_BYTES)
for block in range(NUM_BLOCKS):
    pool.generations[block] = 100 + block
    pool.buffer[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes([block + 1]) * BLOCK_BYTES
source = NixlSource(pool, INCARNATION)
print(source.endpoint().hex(), flush=True)
for line in sys.stdin:
    pool.generations[int(line)] += 1
    print("done", flush=True)
