"""Gateways, prefill and decode workers in this process, with the fake engine: all of it but the arithmetic is real.

A proxy stands on every link: `to_prefill` and `to_decode` from the gateways, `transfers` from prefill to decode.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from chaos_proxy import Proxy

import decode_service.assembly
import decode_service.config
import prefill_service.assembly
import prefill_service.config
from engine.batch import Batch, StepOutput
from engine.fake import SLOT_BYTES, FakeRunner
from gateway.config import GatewayConfig, Patience
from gateway.text import TextService
from gateway.wiring import Bindings, Gateway
from kv_transfer.pool import LocalPool, SharedPool
from tandem.kv_layout import KvLayout
from tandem.service.channel import open_service_channel
from tandem.service.metrics import Metrics
from worker.identity import WorkerIdentity

BLOCK, VOCAB, CONTEXT = 16, 49_152, 8192
LAYOUT = KvLayout(BLOCK, "float32", 1, 1, 2)
PATIENCE = Patience(heartbeat_timeout=1.5, no_worker_grace=5.0, refused_pause=0.05)


class Paced(FakeRunner):
    """The fake engine, `pace` seconds a step."""

    pace = 0.0

    def run(self, batch: Batch) -> StepOutput:
        time.sleep(self.pace)
        return super().run(batch)


def expected(prompt: list[int], seed: int, count: int, index: int = 0) -> list[int]:
    """What the fake engine says to a prompt."""
    runner, tokens = FakeRunner(1, 1, vocab_size=VOCAB), list(prompt)
    for position in range(count):
        tokens.append(runner.expected(tokens, seed, index, position))
    return tokens[len(prompt) :]


class SmallWorker:
    """A prefill or decode worker and what a test looks at."""

    def __init__(self, role: str, number: int, *, blocks: int, transports: tuple[str, ...], sequences: int) -> None:
        block_bytes = BLOCK * SLOT_BYTES
        shared = role == "prefill" and "shm" in transports
        self.memory = SharedPool(blocks, block_bytes) if shared else LocalPool(blocks, block_bytes)
        self.runner = Paced(blocks, BLOCK, vocab_size=VOCAB, buffer=self.memory.buffer)
        self.metrics = Metrics(role)
        identity = WorkerIdentity(
            incarnation=f"{role}-{number}",
            model_id="m" * 64,
            model_name="fake",
            layout=LAYOUT,
            numerics_id="n",
            max_context=CONTEXT,
            vocab_size=VOCAB,
            eos_token_ids=(0,),
            transports=transports,
            total_blocks=blocks,
            max_sequences=sequences,
        )
        limits: dict[str, Any] = {"max_step_tokens": 256, "max_sequences": sequences, "max_context": CONTEXT}
        limits |= {"vocab_size": VOCAB, "model_id": identity.model_id, "numerics_id": "n"}
        if role == "prefill":
            scheduler = prefill_service.config.SchedulerConfig(**limits)
            parts: Any = prefill_service.assembly.Parts(identity, scheduler, self.runner, self.memory)
            self.assembly: Any = prefill_service.assembly.assemble(parts, "127.0.0.1:0", self.metrics)
        else:
            config = decode_service.config.SchedulerConfig(**limits)
            parts = decode_service.assembly.Parts(identity, config, self.runner, self.memory.buffer)
            self.assembly = decode_service.assembly.assemble(parts, "127.0.0.1:0", self.metrics)
        self.proxy = Proxy()

    @property
    def worker(self) -> Any:
        """The worker itself."""
        return self.assembly.worker

    async def start(self) -> None:
        """Serves, behind its proxy."""
        self.proxy.target = await self.assembly.start()
        await self.proxy.start()

    async def close(self) -> None:
        """Ends it."""
        await self.proxy.close()
        await self.assembly.shell.server.stop(0)
        await self.assembly.close()
        self.runner.buffer.release()
        if isinstance(self.memory, SharedPool):
            self.memory.close()

    async def holds_nothing(self) -> bool:
        """All blocks are free, no call is open, and the books are right."""
        await self.worker.engine.call(lambda scheduler: scheduler.check_integrity())
        pool = await self.worker.engine.call(lambda scheduler: scheduler.pool)
        return bool(self.worker.open_calls == 0 and pool.num_free == pool.num_blocks)


class Small:
    """See the module."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        self._text, self._model = tokenizer, model
        self.prefill: list[SmallWorker] = []
        self.decode: list[SmallWorker] = []
        self.gateways: list[Gateway] = []
        self.transfers: dict[str, Proxy] = {}
        """From prefill workers to the decode worker at an address as the gateways know it."""

    @property
    def workers(self) -> list[SmallWorker]:
        """All of them."""
        return [*self.prefill, *self.decode]

    async def settled(self) -> None:
        """Waits until nothing is held anywhere."""
        async with asyncio.timeout(20):
            for each in self.workers:
                while not await each.holds_nothing():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    async def until(self, condition: Callable[[], Any], seconds: float = 10.0) -> None:
        """Waits for a condition."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def small(
    tokenizer: Any,
    model: str,
    patch: pytest.MonkeyPatch,
    *,
    prefill: int = 2,
    decode: int = 2,
    gateways: int = 1,
    blocks: int = 256,
    sequences: int = 16,
    transports: tuple[str, ...] = ("shm", "grpc"),
    **settings: Any,
) -> AsyncIterator[Small]:
    """Starts one and waits until its gateways see all workers."""
    cluster = Small(tokenizer, model)

    def open_transfers(address: str, role: str, tls: Any, **options: Any) -> Any:
        return open_service_channel(cluster.transfers[address].address, role, tls, **options)

    patch.setattr("prefill_service.channels.open_service_channel", open_transfers)
    async with AsyncExitStack() as stack:
        for role, count, places in (("prefill", prefill, cluster.prefill), ("decode", decode, cluster.decode)):
            for number in range(count):
                each = SmallWorker(role, number, blocks=blocks, transports=transports, sequences=sequences)
                await each.start()
                stack.push_async_callback(each.close)
                places.append(each)
        for each in cluster.decode:
            proxy = cluster.transfers[each.proxy.address] = Proxy(each.proxy.target)
            await proxy.start()
            stack.push_async_callback(proxy.close)
        addresses = ([p.proxy.address for p in cluster.prefill], [d.proxy.address for d in cluster.decode])
        for _ in range(gateways):
            bindings = Bindings(model, "127.0.0.1:0", "127.0.0.1:0", prefill=addresses[0], decode=addresses[1])
            config = GatewayConfig(**{"patience": PATIENCE, **settings})
            gateway = Gateway(bindings, config, TextService(tokenizer))
            await gateway.start()
            stack.push_async_callback(gateway.close)
            cluster.gateways.append(gateway)
        for gateway in cluster.gateways:
            pool = gateway.pool
            await cluster.until(lambda pool=pool: all(w.ready for w in (*pool.prefill, *pool.decode)))
        yield cluster
