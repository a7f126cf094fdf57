"""Streams under cancels, deadlines and drains: nothing leaks, nothing fails that need not."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import urllib.request
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem.client import AsyncClient
from tandem.errors import DeadlineError, TandemError

REQUESTS = 500


def _free_everywhere(stack: Any) -> bool:
    workers = [worker for worker in stack.status()["workers"] if worker["role"] != "gateway"]
    assert {worker["role"] for worker in workers} == {"prefill", "decode"}
    return all(worker["load"]["free_blocks"] == worker["load"]["total_blocks"] for worker in workers) and not any(
        worker["load"]["running_sequences"]
        or worker["load"]["waiting_requests"]
        or worker["load"]["receiving_requests"]
        for worker in workers
    )


def _samples(stack: Any, role: str, name: str) -> list[float]:
    """Values of a metric at the workers of a role; unlike `Stack.metric` it tells 0 from nothing."""
    workers = [worker for worker in stack.status()["workers"] if worker["role"] == role]
    return [value for worker in workers for value in _scrape(worker, name)]


def _scrape(worker: dict[str, Any], name: str) -> list[float]:
    with urllib.request.urlopen(f"http://{worker['metrics']}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    return [sample.value for family in families for sample in family.samples if sample.name == name]


def _running(worker: dict[str, Any]) -> float:
    """Sequences aboard, told in milliseconds: by the time that `tandem status` has started, streams may be over."""
    return sum(_scrape(worker, "tandem_num_requests_running"))


def _workers(stack: Any, role: str) -> list[dict[str, Any]]:
    """The workers of a role that answered with a load."""
    return [worker for worker in stack.status()["workers"] if worker["role"] == role and worker["load"] is not None]


def _resident(stack: Any) -> int:
    return sum(
        psutil.Process(worker["pid"]).memory_info().rss
        for worker in stack.status()["workers"]
        if worker["role"] != "gateway"
    )


async def _storm(gateway: str, requests: int, seed: int) -> dict[str, int]:
    """Random lengths; a third run, a third are cancelled at random moments, a third have deadlines that expire."""
    rng = random.Random(seed)
    counts = {"finished": 0, "cancelled": 0, "expired": 0}
    limit = asyncio.Semaphore(24)
    async with AsyncClient(gateway) as client:

        async def one(number: int) -> None:
            prompt = [rng.randrange(17, 49152) for _ in range(rng.choice([1, 5, 17, 17, 60, 60, 120, 300]))]
            length = rng.randrange(1, 48)
            kind = ("finished", "cancelled", "expired")[number % 3]
            patience = rng.uniform(0.001, 0.6)
            async with limit:
                task = asyncio.ensure_future(
                    client.generate(
                        token_ids=prompt,
                        max_tokens=2000 if kind == "expired" else length,
                        ignore_eos=True,
                        seed=number,
                        n=rng.choice([1, 1, 1, 3]),
                        timeout=patience if kind == "expired" else 300,
                    )
                )
                if kind == "cancelled":
                    await asyncio.wait([task], timeout=patience)
                    task.cancel()
                try:
                    await task
                    counts["finished"] += 1
                except asyncio.CancelledError:
                    counts["cancelled"] += 1
                except DeadlineError:
                    counts["expired"] += 1

        await asyncio.gather(*(one(number) for number in range(requests)))
    return counts


@pytest.mark.timeout(900)
def test_no_leaks(start_stack: Any, eventually: Any) -> None:
    """500 requests, two thirds of them cut off: pools, integrity and memory are as before."""
    stack = start_stack.start("--max-sequences", "16", "--num-blocks", "512")
    try:
        # The first half touches every page of the pools; from then on memory must stay flat.
        counts = asyncio.run(_storm(stack.gateway, REQUESTS // 2, seed=1))
        eventually(lambda: _free_everywhere(stack), 30)
        before = _resident(stack)
        for kind, count in asyncio.run(_storm(stack.gateway, REQUESTS // 2, seed=2)).items():
            counts[kind] += count
        assert counts["expired"] > REQUESTS // 4
        assert counts["finished"] > REQUESTS // 4
        assert counts["cancelled"] > REQUESTS // 10
        eventually(lambda: _free_everywhere(stack), 30)
        assert _resident(stack) - before < 64 << 20
        for role in ("prefill", "decode"):
            eventually(lambda role=role: stack.metric(role, "tandem_integrity_checks_total") > 0, 10)
            assert stack.metric(role, "tandem_requests_cancelled_total") > 0
            for name, most in (("tandem_integrity_failures_total", 0), ("tandem_steps_after_cancel_max", 1)):
                assert _samples(stack, role, name), f"{role} doesn't tell {name}"
                assert max(_samples(stack, role, name)) <= most
        assert stack.stop() == 0
    finally:
        stack.kill()


async def _streams(gateway: str, count: int, max_tokens: int, started: asyncio.Event) -> list[list[int]]:
    """`count` streams of seeded sampling; sets `started` once each has a few tokens."""
    lengths = [0] * count
    async with AsyncClient(gateway) as client:

        async def one(number: int) -> list[int]:
            tokens: list[int] = []
            async for event in client.stream(
                f"Story number {number}:",
                max_tokens=max_tokens,
                temperature=0.8,
                seed=number,
                ignore_eos=True,
                timeout=240,
            ):
                tokens += getattr(event, "token_ids", None) or []
                lengths[number] = len(tokens)
                if min(lengths) >= 3:
                    started.set()
            return tokens

        return list(await asyncio.gather(*(one(number) for number in range(count))))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["drain", "kill"])
def test_losing_a_decode_worker_fails_no_stream(start_stack: Any, signum: int) -> None:
    """One of two decode workers leaves under 8 streams: the clients see the tokens of an undisturbed run."""
    flags = ("--decode", "2", "--compute", "exact", "--drain-grace", "1")
    stack = start_stack.start(*flags)

    async def run(disturb: bool) -> list[list[int]]:
        workers = await asyncio.to_thread(_workers, stack, "decode")
        started = asyncio.Event()
        task = asyncio.ensure_future(_streams(stack.gateway, 8, 160, started))
        if disturb:
            await asyncio.wait_for(started.wait(), 120)
            running = [await asyncio.to_thread(_running, worker) for worker in workers]
            busy = workers[running.index(max(running))]
            assert max(running) > 0
            os.kill(busy["pid"], signum)
        return await task

    try:
        undisturbed = asyncio.run(run(False))
        disturbed = asyncio.run(run(True))
        assert disturbed == undisturbed
        assert stack.stop() == 0
    finally:
        stack.kill()


def _mid_prompt(stack: Any) -> bool:
    """The prefill worker has computed a step or more, and has prompt tokens before it."""
    (worker,) = _workers(stack, "prefill")
    return bool(worker["load"]["queued_prefill_tokens"] > 0 and worker["load"]["steps"] > 0)


@pytest.mark.timeout(300)
def test_losing_the_prefill_worker_fails_no_request(start_stack: Any, eventually: Any) -> None:
    """kill -9 of the only prefill worker in the middle of long prompts: decode takes them over."""
    stack = start_stack.start("--compute", "exact")

    async def run(disturb: bool) -> list[list[int]]:
        async with AsyncClient(stack.gateway) as client:
            prompts = [[(7 * i + j) % 40000 + 17 for i in range(1500)] for j in range(4)]
            tasks = [
                asyncio.ensure_future(client.generate(token_ids=p, max_tokens=8, temperature=0.0, timeout=200))
                for p in prompts
            ]
            if disturb:
                (victim,) = stack.children("-m prefill_service")
                await asyncio.to_thread(eventually, lambda: _mid_prompt(stack), 60)
                victim.kill()
            return [list((await task).token_ids) for task in tasks]

    try:
        disturbed = asyncio.run(run(True))
        assert disturbed == asyncio.run(run(False))
        assert stack.stop() == 0
    finally:
        stack.kill()


def test_errors_are_tandem_errors(shared_stack: Any) -> None:
    """The client speaks the exception tree, not grpc's."""

    async def run() -> None:
        async with AsyncClient(shared_stack.gateway) as client:
            with pytest.raises(TandemError):
                await client.generate("Hello", top_p=7.0)

    asyncio.run(run())
