"""The services on a machine's GPUs: TTFT and ITL through gateway, prefill and decode, and whose tokens they give.

    python3 -m bench.gpu_services --shape llama-3-8b --points tg1@1024,tg32@1024,tg128@1024 -- --device cuda

What follows `--` are flags of `tandem up`. The model has random weights and is written to a folder first
(`bench.random_weights`). Prints JSON lines: the start, each point as `bench.serve` does, and how many sequences have
the tokens that one decode worker alone gives (`--beside-one`).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.points import parse_points
from bench.report import emit
from bench.serve import bench_point
from bench.stack import Stack
from tandem.client import AsyncClient
from tandem.client.types import Options
from tandem.service import server

SEQUENCES, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 777, 64
"""Of the comparison of tokens: not whole blocks."""
GREEDY: Options = {"temperature": 0.0, "ignore_eos": True, "speculation": "off"}
Tokens = list[list[int]]


async def measure(gateway: str, points: str, runs: int) -> int:
    """Print rows as `bench.serve` does, each as it comes; 0."""
    async with AsyncClient(gateway) as client:
        vocabulary = (await client.models())[0].vocab_size
        for seed, point in enumerate(parse_points(points)):
            emit([await bench_point(client, point, vocabulary, runs, seed)], as_json=True)
    return 0


async def greedy(gateway: str) -> Tokens:
    """Greedy tokens of the same random prompts, one after another, so that no batch differs."""
    rng = random.Random(7)
    found: Tokens = []
    async with AsyncClient(gateway) as client:
        vocabulary = (await client.models())[0].vocab_size
        for _ in range(SEQUENCES):
            prompt = [rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)]
            options: Options = {**GREEDY, "max_tokens": OUTPUT_TOKENS}
            tokens: list[int] = []
            async for event in client.stream(token_ids=prompt, **options):
                tokens += getattr(event, "token_ids", None) or ()
            found.append(tokens)
    return found


def compared(ours: Tokens, theirs: Tokens) -> dict[str, object]:
    """How many sequences are the same, and where the others part."""
    parts = [
        next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return {
        "sequences": len(parts),
        "same_tokens": parts.count(None),
        "parted_at": [at for at in parts if at is not None],
    }


def served(model: Path, flags: Sequence[str], points: str, runs: int, *, tokens: bool) -> Tokens:
    """One `tandem up`: its points are printed; its tokens if wanted."""
    began = time.monotonic()
    with Stack(["--model", str(model), *flags]) as stack:
        emit([{"flags": " ".join(flags), "ready_s": round(time.monotonic() - began, 1)}], as_json=True)
        gateway = stack.gateway
        found = asyncio.run(greedy(gateway)) if tokens else []
        server.run(lambda: measure(gateway, points, runs))
        return found


def gpus() -> Iterator[dict[str, object]]:
    """A row for each."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines():
        name, driver = line.split(", ")
        yield {"gpu": name, "driver": driver}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_services", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--model", type=Path, help="a folder or file in place of --shape")
    parser.add_argument("--points", default="tg1@1024,tg32@1024,tg128@1024")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--beside-one", action="store_true", help="the same with one decode worker alone")
    parser.add_argument("flags", nargs="*", help="of tandem up, behind --")
    arguments = parser.parse_args()
    emit(gpus(), as_json=True)
    with TemporaryDirectory() as scratch:
        model = arguments.model
        if model is None:
            model = Path(scratch) / arguments.shape
            write = [sys.executable, "-m", "bench.random_weights", arguments.shape, str(model), "--device", "cuda"]
            subprocess.run(write, check=True)
        points, runs, flags = arguments.points, arguments.runs, arguments.flags
        ours = served(model, flags, points, runs, tokens=arguments.beside_one)
        if arguments.beside_one:
            theirs = served(model, [*flags, "--prefill", "0"], points, runs, tokens=True)
            emit([compared(ours, theirs)], as_json=True)


if __name__ == "__main__":
    main()
