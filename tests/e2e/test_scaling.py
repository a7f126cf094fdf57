"""Pools that grow and shrink under load: `tandem scale` and the watched file, real processes, no failed request."""

from __future__ import annotations

import asyncio
import itertools
import json
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tandem.client import AsyncClient

CLIENTS = 4
TOKENS = 40
PROMPTS = [[400 + 37 * number + at for at in range(20 + 30 * number)] for number in range(6)]
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.8}


_salts = itertools.count()


class Load:
    """Clients that ask without pause, each answer compared with the undisturbed one. `served` counts them."""

    def __init__(self, client: AsyncClient, calm: list[list[int]]) -> None:
        self._client, self._calm = client, calm
        self._over = False
        self.served = 0
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(CLIENTS)]

    async def _ask(self, number: int) -> None:
        while not self._over:
            await self._one(number)
            number += 1

    async def _one(self, number: int) -> None:
        which = number % len(PROMPTS)
        assert await answer(self._client, which) == self._calm[which]
        self.served += 1

    async def burst(self, requests: int) -> None:
        """So many at once: more than one worker would take."""
        await asyncio.gather(*(self._one(number) for number in range(requests)))

    async def while_waiting(self, work: Callable[[], Any]) -> Any:
        """`work` in a thread; the first client that fails ends it."""
        job = asyncio.ensure_future(asyncio.to_thread(work))
        await asyncio.wait({job, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        self.check()
        return await job

    async def serve(self, more: int) -> None:
        """Until so many more requests were answered."""
        wanted = self.served + more
        while self.served < wanted:
            self.check()
            await asyncio.sleep(0.02)

    def check(self) -> None:
        """Raises what a client got that it should not have got."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def end(self) -> None:
        """Lets the clients finish."""
        self._over = True
        await asyncio.gather(*self._tasks)


async def answer(client: AsyncClient, which: int) -> list[int]:
    """Sampled, with a seed of its own for each prompt; the salt sees to it that nobody has the prompt cached."""
    salt = str(next(_salts))
    result = await client.generate(token_ids=PROMPTS[which], seed=which, cache_salt=salt, **OPTIONS)
    return list(result.token_ids)


def listed(stack: Any) -> tuple[int, int]:
    """Ready prefill and decode workers, as the gateway sees them."""
    with urllib.request.urlopen(f"http://{stack.http}/workers", timeout=10) as response:
        models = json.load(response)["models"]
    return sum(model["prefill_workers"] for model in models), sum(model["decode_workers"] for model in models)


def all_worked(stack: Any, role: str) -> bool:
    """Every worker of a role has computed something."""
    loads = [worker["load"] for worker in stack.status()["workers"] if worker["role"] == role]
    return all(load is not None and load["steps"] > 0 for load in loads)


def all_free(stack: Any) -> bool:
    workers = [worker["load"] for worker in stack.status()["workers"] if worker["role"] != "gateway"]
    return all(load and load["free_blocks"] == load["total_blocks"] for load in workers)


async def scaled(stack: Any, load: Load, role: str, count: int, seen: tuple[int, int]) -> None:
    """`tandem scale` under load, until the gateway lists what was asked for and new workers take part."""
    command = ("scale", role, str(count), "--gateway", stack.gateway)
    await load.while_waiting(lambda: stack.tandem(*command, timeout=120))
    async with asyncio.timeout(30):
        while await asyncio.to_thread(listed, stack) != seen:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await load.serve(CLIENTS)
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(all_worked, stack, role):
            await load.burst(12)


async def test_pools_grow_and_shrink_under_load(start_stack: Any, eventually: Any, pytestconfig: pytest.Config) -> None:
    """1 -> 3 -> 1 of each pool: every answer has the tokens that it has undisturbed, and nothing is held at the end.

    The grace is shorter than a stream, so workers that leave hand streams over, too.
    """
    stack = start_stack.start("--num-blocks", "256", "--threads", "1", "--drain-grace", "0.1")
    try:
        async with AsyncClient(stack.gateway) as client:
            calm = [await answer(client, which) for which in range(len(PROMPTS))]
            for _ in range(pytestconfig.getoption("--scaling-rounds")):
                load = Load(client, calm)
                await scaled(stack, load, "decode", 3, (1, 3))
                await scaled(stack, load, "prefill", 3, (3, 3))
                await scaled(stack, load, "decode", 1, (3, 1))
                await scaled(stack, load, "prefill", 1, (1, 1))
                await load.end()
        assert load.served >= 4 * CLIENTS
        eventually(lambda: all_free(stack))
        assert stack.metric("gateway", "tandem_worker_ejections_total") == 0
        assert stack.metric("gateway", "tandem_workers") == 2
        assert stack.stop() == 0
    finally:
        stack.kill()
