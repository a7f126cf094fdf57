"""A sending worker as a process of its own, for test_shm.py: prints its endpoint, then obeys lines on stdin."""

from __future__ import annotations

import sys

from kv_transfer.pool import SharedPool
from kv_transfer.shm import ShmSource

NUM_BLOCKS, BLOCK_BYTES = int(sys.argv[1]), int(sys.argv[2])

pool = SharedPool(NUM_BLOCKS, BLOCK_BYTES)
for block in range(NUM_BLOCKS):
    pool.generations[block] = 100 + block
    pool.buffer[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes([block + 1]) * BLOCK_BYTES
source = ShmSource(pool, "child-1")
print(source.endpoint().decode(), flush=True)
for line in sys.stdin:
    match line.split():
        case ["reuse", block]:
            pool.generations[int(block)] += 1
            pool.buffer[int(block) * BLOCK_BYTES] = 255
        case ["churn", count]:
            # An owner in full swing: blocks 1 and up go to somebody else again and again; their bytes say whose they
            # are. Each is offered, once written, in block 0's generation as generation * NUM_BLOCKS + block.
            for turn in range(int(count)):
                block = 1 + turn % (NUM_BLOCKS - 1)
                generation = pool.generations[block] + 1
                pool.generations[block] = generation
                pool.buffer[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes([generation % 251]) * BLOCK_BYTES
                pool.generations[0] = generation * NUM_BLOCKS + block
        case ["close"]:
            source.close()
    print("done", flush=True)
