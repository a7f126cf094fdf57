"""The engine alone: no gateway, no sockets, one process.

    python -m bench.offline --model default --points pp512,pp8x512,tg1,tg8 --json

ppN is one N-token prompt, ppBxN is B of them, tgB is B sequences of 128 tokens in and 128 out, decode only; tgB@N has
N tokens in. Prompts are random token ids, decoding is greedy, end-of-sequence is ignored and the prefix cache is off.
Prints one JSON object a line; each figure is the median over `--runs` runs after one that is not counted (points with
more than 16,384 prompt tokens: one run). With `--stdin` it loads once and then measures each point whose name comes in
a line, one run each: what `bench.serve --beside-engine` takes turns with.

On a GPU, with random weights and without any file (figures beside floors, see `bench.offline_gpu`):

    python -m bench.offline --device cuda --model random:llama-3-8b --chunk-size 8192 \\
        --points tg1@1024,tg32@1024,tg128@1024,tg256@1024,pp8x2048 --json

Over several ranks on one machine, of which the first prints:

    torchrun --nproc-per-node 3 -m bench.offline --model default --compute exact --threads 1
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence

from bench.points import Point, parse_point, parse_points, run_points
from bench.report import emit
from bench.sequences import BLOCK_SIZE, SequenceDriver, blocks_of, load_bench_engine
from engine.parallel.group import join_ranks
from engine.parallel.world import world_from


def measure(driver: SequenceDriver, point: Point) -> float:
    """Tokens a second at one point."""
    with driver.sequences(point.sequences, point.prompt_tokens) as sequences:
        start = time.perf_counter()
        driver.prefill(sequences)
        if not point.output_tokens:
            return point.sequences * point.prompt_tokens / (time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(point.output_tokens - 1):
            driver.decode(sequences)
        return point.sequences * (point.output_tokens - 1) / (time.perf_counter() - start)


def measure_asked(driver: SequenceDriver) -> Iterator[dict[str, object]]:
    """One run of each point that standard input names."""
    for line in sys.stdin:
        point = parse_point(line.strip())
        yield {"point": point.name, "tokens_per_s": measure(driver, point)}


def blocks_for(points: Sequence[Point], block_size: int) -> int:
    """KV blocks that the largest of `points` needs."""
    return max(blocks_of(point.sequences, point.context_tokens, block_size) for point in points)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default", help="default, a path, or random:SHAPE (bench.random_weights)")
    parser.add_argument("--points", default="pp512,pp8x512,tg1,tg4,tg8,tg16,tg32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-dtype", default="auto", help="of the KV cache: float32, bfloat16, int8 or fp8_e4m3")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--max-context", type=int, default=None, help="longest sequence; default: the model's")
    parser.add_argument(
        "--attention", default="auto", help="GPU: flashinfer, flash-attn-3, flash-attn-2, triton or torch"
    )
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="GPU: captured steps")
    parser.add_argument(
        "--stdin", action="store_true", help="measure what is named line by line; --points: what may come"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line (the default prints a table)")
    arguments = parser.parse_args()
    points = parse_points(arguments.points)
    settings = {
        name: getattr(arguments, name)
        for name in ("device", "compute", "dtype", "kv_dtype", "threads", "max_context", "graphs", "attention")
    }
    if arguments.device == "cuda":
        settings["max_sequences"] = max(point.sequences for point in points)
    num_blocks = blocks_for(points, BLOCK_SIZE)
    world = world_from(os.environ)
    ranks = join_ranks(world, gpu=arguments.device == "cuda") if world is not None else None
    engine = load_bench_engine(arguments.model, settings, arguments.chunk_size, num_blocks, ranks)
    if ranks is not None and not ranks.leads:
        assert engine.follow is not None
        engine.follow()
        ranks.close()
        return
    driver = SequenceDriver(engine, arguments.chunk_size)
    if arguments.stdin:
        emit(measure_asked(driver), as_json=True)
    elif arguments.device == "cuda":
        from bench.offline_gpu import measure_points

        emit(measure_points(driver, points, arguments.runs), as_json=arguments.json)
    else:
        emit(run_points(functools.partial(measure, driver), points, arguments.runs), as_json=arguments.json)
    if ranks is not None:
        ranks.close()


if __name__ == "__main__":
    main()
