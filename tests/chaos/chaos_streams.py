"""The requests of a chaos run, what an undisturbed run says to each, and clients that compare.

Life cycle: `cases(seed)` -> `reference(client, case)` for each, once, while all is quiet -> `Clients.run(...)`, which
keeps a number of streams going, each compared with its reference.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos_outages import Outages

from tandem.client import AsyncClient, Delta, End, Finished, PromptAccepted
from tandem.errors import TandemError

DEADLINE = 120.0
TRIES = 1000
"""No bound but the deadline."""
FAILED_PAUSE = 0.2
STORY = "Once upon a time there was a lighthouse keeper who counted ships. "
Answer = dict[str, Any]


def cases(seed: int) -> list[dict[str, Any]]:
    """Keywords of `stream`: greedy and sampled, penalties, stop strings, several outputs, characters of many tokens."""
    rng = random.Random(seed)
    words = [rng.randrange(300, 40_000) for _ in range(600)]
    return [
        {"prompt": STORY, "temperature": 0.0, "max_tokens": 64, "ignore_eos": True},
        {"prompt": STORY * 8, "seed": seed + 1, "max_tokens": 48, "ignore_eos": True},
        {"prompt": STORY * 8 + "One day", "temperature": 0.0, "max_tokens": 96, "ignore_eos": True},
        {
            "prompt": "A list of colours: red,",
            "seed": seed + 2,
            "temperature": 0.9,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.4,
            "max_tokens": 64,
            "ignore_eos": True,
        },
        {
            "prompt": "Tell me a story.",
            "temperature": 0.0,
            "max_tokens": 64,
            "stop": [" was a", "xyz"],
            "min_tokens": 24,
        },
        {"prompt": "Three wishes:", "seed": seed + 3, "n": 3, "max_tokens": 24, "ignore_eos": True},
        {"token_ids": words, "temperature": 0.0, "max_tokens": 24, "ignore_eos": True},
        {"token_ids": words[:5], "seed": seed + 4, "top_p": 0.9, "max_tokens": 80, "ignore_eos": True},
        {"prompt": "🦜🦉🦜🦉🦜🦉🦜🦉", "temperature": 0.0, "max_tokens": 48, "ignore_eos": True},
        {"messages": [{"role": "user", "content": "Name three birds."}], "seed": seed + 5, "max_tokens": 40},
        {"prompt": "The sea is", "temperature": 0.0, "logprobs": 2, "max_tokens": 32, "ignore_eos": True},
    ]


async def answer_of(client: AsyncClient, case: dict[str, Any]) -> Answer:
    """Everything that a stream said and that may not differ. Raises TandemErrors."""
    outputs: list[dict[str, Any]] = [
        {"tokens": [], "text": "", "logprobs": [], "end": None} for _ in range(case.get("n", 1))
    ]
    counts: Counter[str] = Counter()
    usage: Any = None
    async with client.stream(**case, timeout=DEADLINE) as events:
        async for event in events:
            counts[type(event).__name__] += 1
            if isinstance(event, Delta):
                output = outputs[event.index]
                assert output["end"] is None, "a token behind the end"
                output["tokens"] += event.token_ids
                output["text"] += event.text
                output["logprobs"] += event.logprobs
            elif isinstance(event, Finished):
                assert outputs[event.index]["end"] is None, "a second end"
                outputs[event.index]["end"] = (str(event.finish_reason), event.stop_match)
            elif isinstance(event, End):
                usage = (event.usage.prompt_tokens, event.usage.completion_tokens)
    assert (counts[PromptAccepted.__name__], counts[End.__name__]) == (1, 1), f"events: {counts}"
    return {"outputs": outputs, "usage": usage}


def difference(got: Answer, wanted: Answer) -> str:
    """What differs, for people; empty when nothing does."""
    if got == wanted:
        return ""
    for index, (one, other) in enumerate(zip(got["outputs"], wanted["outputs"], strict=True)):
        for name, value in one.items():
            if value != other[name]:
                return f"output {index}: {name} is {value!r}, undisturbed {other[name]!r}"
    return f"usage is {got['usage']}, undisturbed {wanted['usage']}"


@dataclass
class Clients:
    """Streams that come and go, `width` at a time."""

    addresses: Sequence[str]
    cases: list[dict[str, Any]]
    wanted: list[Answer]
    seed: int
    width: int = 16
    completed: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    outages: Outages | None = None
    excused: int = 0
    """Streams that failed as they may: see `chaos_outages`."""
    paused: bool = False
    stopping: bool = False
    running: int = 0

    async def run(self) -> None:
        """Until `stopping`; each stream is ended in full."""
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for turn in range(4):  # each begins at another gateway, so that all are used
                ordered = [*self.addresses[turn % len(self.addresses) :], *self.addresses[: turn % len(self.addresses)]]
                clients.append(await stack.enter_async_context(AsyncClient(addresses=ordered, tries=TRIES)))
            await asyncio.gather(*(self._one_after_another(i, clients[i % len(clients)]) for i in range(self.width)))

    async def _one_after_another(self, lane: int, client: AsyncClient) -> None:
        rng = random.Random(f"{self.seed}/lane-{lane}")
        while not self.stopping:
            if self.paused:
                await asyncio.sleep(0.05)
                continue
            self.running += 1
            try:
                await self._compare(client, rng.randrange(len(self.cases)))
            finally:
                self.running -= 1

    async def _compare(self, client: AsyncClient, number: int) -> None:
        began = self.outages.clock() if self.outages is not None else 0.0
        try:
            got = await answer_of(client, self.cases[number])
        except (TandemError, AssertionError) as exc:
            if self.outages is not None and self.outages.excuse(exc, began, DEADLINE):
                self.excused += 1
                return
            self.failures.append(f"case {number}: {type(exc).__name__}: {exc}")
            await asyncio.sleep(FAILED_PAUSE)
            return
        if problem := difference(got, self.wanted[number]):
            self.failures.append(f"case {number}: {problem}")
        self.completed += 1
        self.tokens += got["usage"][1]
