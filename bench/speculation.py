"""What speculation brings: the same requests with drafts and without, in alternation on one running stack.

    python -m bench.speculation                                  # all workloads, about 5 minutes
    python -m bench.speculation --only "rewrite code" --rounds 2
    python -m bench.speculation --shift                          # a workload that changes in its middle, with a chart

Each round runs a workload once with `speculation: off` and once with the default, in turn. At batch 1 a rate is output
tokens a second from the first token to the last; else it is output tokens a second of the whole group. Medians over
rounds; the first round is not counted: it teaches the worker what drafts are worth here. Each round of each way has a
cache salt of its own: else drafts from past outputs would be the answers of the round before.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.report import emit
from bench.speculation_page import chart, table
from bench.speculation_work import Task, Workload, shifting, workloads
from bench.stack import Stack
from tandem.client import AsyncClient
from tandem.client.types import GenerateResult
from tandem.errors import ConfigError, TandemError

WAYS = ("off", "auto")


@dataclass(slots=True)
class Round:
    """One pass over a workload."""

    seconds: float
    results: list[GenerateResult]

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return sum(result.usage.completion_tokens for result in self.results)

    def rate(self, at_once: int) -> float:
        """Output tokens a second, see the module's text."""
        if at_once > 1:
            return self.tokens / self.seconds
        decoding = sum(result.timings.decode_seconds for result in self.results)
        return (self.tokens - len(self.results)) / decoding


@dataclass(slots=True)
class Measured:
    """All rounds of a workload, by way."""

    workload: Workload
    rounds: dict[str, list[Round]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def row(self) -> dict[str, object]:
        """One line of the table."""
        at_once = self.workload.at_once
        rates = {way: [each.rate(at_once) for each in rounds] for way, rounds in self.rounds.items()}
        off, auto = (statistics.median(rates[way]) for way in WAYS)
        pairs = [b / a for a, b in zip(rates["off"], rates["auto"], strict=True)]
        usages = [result.usage for each in self.rounds["auto"] for result in each.results]
        drafted, kept = (sum(getattr(u, key) for u in usages) for key in ("draft_tokens", "accepted_draft_tokens"))
        tokens = sum(usage.completion_tokens for usage in usages)
        return {
            "workload": self.workload.name,
            "off, tokens/s": round(off, 1),
            "auto, tokens/s": round(auto, 1),
            "auto / off": round(statistics.median(pairs), 2),
            "least": round(min(pairs), 2),
            "drafts kept": f"{kept / drafted:.0%}" if drafted else "-",
            "tokens a step": round(tokens / max(1, tokens - kept), 2),
        }


async def run_once(client: AsyncClient, workload: Workload, way: str, number: int = 0) -> Round:
    """All tasks, `at_once` of them at a time; `number` is the round's."""
    limit = asyncio.Semaphore(workload.at_once)

    async def one(task: Task) -> GenerateResult:
        """One request, once there is room for it. Its cache is its own: each way computes all of it."""
        async with limit:
            source = {"messages": [{"role": "user", "content": task.prompt}]} if task.chat else {"prompt": task.prompt}
            return await client.generate(
                **source,
                temperature=task.temperature,
                seed=task.seed,
                max_tokens=workload.max_tokens,
                speculation=way,
                cache_salt=f"{way} {number}",
            )

    began = time.perf_counter()
    results = await asyncio.gather(*(one(task) for task in workload.tasks))
    return Round(time.perf_counter() - began, list(results))


def check_equal(rounds: Mapping[str, Sequence[Round]]) -> None:
    """Both ways must have given the same tokens. Raises TandemError."""
    answers = {way: [result.token_ids for result in each[-1].results] for way, each in rounds.items()}
    if answers["off"] != answers["auto"]:
        raise TandemError("speculation changed a token: this must not be")


async def measure(gateway: str, chosen: Sequence[Workload], rounds: int) -> list[Measured]:
    """`rounds` of each workload, and one before that isn't counted."""
    done = []
    async with AsyncClient(gateway) as client:
        for workload in chosen:
            measured = Measured(workload)
            for number in range(rounds + 1):
                for way in WAYS if number % 2 else reversed(WAYS):
                    result = await run_once(client, workload, way, number)
                    if number:
                        measured.rounds[way].append(result)
            check_equal(measured.rounds)
            done.append(measured)
            print(f"{workload.name}: {measured.row()}", file=sys.stderr)
    return done


async def measure_shift(gateway: str, workload: Workload) -> list[dict[str, object]]:
    """Task after task, each both ways: how drafts follow what is asked. After a round that isn't counted of `off`."""
    rows: list[dict[str, object]] = []
    async with AsyncClient(gateway) as client:
        await run_once(client, workload, "off")
        for number, task in enumerate(workload.tasks):
            single = Workload(workload.name, (task,), 1, workload.max_tokens)
            rounds = {way: [await run_once(client, single, way)] for way in WAYS}
            check_equal(rounds)
            usage = rounds["auto"][0].results[0].usage
            rows.append(
                {
                    "task": number + 1,
                    "off, tokens/s": round(rounds["off"][0].rate(1), 1),
                    "auto, tokens/s": round(rounds["auto"][0].rate(1), 1),
                    "drafted": usage.draft_tokens,
                    "kept": usage.accepted_draft_tokens,
                }
            )
    return rows


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--batch", type=int, default=32, help="requests at once of the last workloads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="the workload of that name alone")
    parser.add_argument("--shift", action="store_true", help="the workload that changes in its middle")
    parser.add_argument("--markdown", action="store_true", help="print a table, or a chart, for a page")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    arguments = _parse_arguments()
    chosen = [each for each in workloads(arguments.batch) if arguments.only in (None, each.name)]
    if not chosen or arguments.rounds < 1:
        names = ", ".join(each.name for each in workloads(arguments.batch))
        raise ConfigError(f"--only: one of {names}; --rounds: 1 or more")
    with Stack(["--model", arguments.model]) as stack:
        if arguments.shift:
            rows = asyncio.run(measure_shift(stack.gateway, shifting()))
        else:
            rows = [each.row() for each in asyncio.run(measure(stack.gateway, chosen, arguments.rounds))]
    if arguments.markdown:
        print(chart(rows) if arguments.shift else table(rows))
    else:
        emit(rows, as_json=arguments.json)


if __name__ == "__main__":
    try:
        main()
    except TandemError as error:
        sys.exit(f"error: {error}")
