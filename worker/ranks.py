"""Several processes as one worker: rank 0 serves, the others compute with it. Imports torch.

Each is started with the same command and told its rank by the environment (`engine.parallel.world`), as torchrun does.
Signals are rank 0's: the others need to live for as long as it drains, and end when it does.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.loading import found_device
from engine.parallel.group import Ranks, join_ranks
from engine.parallel.world import world_from
from worker import loading
from worker.flags import Flags
from worker.pools import Pools


@asynccontextmanager
async def joined(flags: Flags) -> AsyncIterator[Ranks | None]:
    """The ranks that this process is one of, until it is over; None for a process alone. Raises ConfigError."""
    world = world_from(os.environ)
    if world is None:
        yield None
        return
    ranks = await asyncio.to_thread(join_ranks, world, gpu=found_device(flags.engine) == "cuda")
    if not world.leads:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    try:
        yield ranks
    finally:
        ranks.close()


def follow(flags: Flags, ranks: Ranks, *, sends: bool) -> int:
    """The life of another rank than 0, after it has joined; its exit code. `sends`: what steps write is for transfers.
    Raises ConfigError while it loads.
    """
    engine = loading.load_part(flags, Pools(ranks).make, ranks, sends=sends)
    assert engine.follow is not None
    engine.follow()
    return 0
