"""What quantised forms of one model cost and give: size, load, memory, quality, speed, each beside its bfloat16 folder.

    python -m bench.quantized bf16=FOLDER int4=FOLDER gptq=FOLDER@int8 --markdown

A name, the folder, and after @ the way of computing (exact where nothing is said). Each is loaded in a process of its
own: resident memory and its peak are what loading added; perplexity is that of `bench.quality`; tg1 and tg32 are the
points of `bench.offline`.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.offline import blocks_for, measure
from bench.points import parse_points
from bench.quality import WINDOW, score, text_tokens
from bench.report import emit
from bench.sequences import BLOCK_SIZE, SequenceDriver, load_bench_engine
from engine.weights.checkpoint import open_checkpoint
from tandem.models import resolve_model

POINTS = "tg1,tg32"
CHUNK = 512
MEGABYTE = 1 << 20


def memory(field: str) -> int:
    """VmRSS (resident now) or VmHWM (most ever) of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def measure_one(folder: str, compute: str, tokens: int, runs: int, tokenizer: str) -> dict[str, object]:
    """All figures of one model, in this process."""
    windows = text_tokens(str(resolve_model(tokenizer)), tokens) if tokens else []
    checkpoint = open_checkpoint(folder)
    size = sum(path.stat().st_size for path in checkpoint.files if path.suffix in (".safetensors", ".gguf"))
    checkpoint.close()
    before, start = memory("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    points = parse_points(POINTS)
    engine = load_bench_engine(folder, {"compute": compute}, CHUNK, blocks_for(points, BLOCK_SIZE))
    took, peak, resident = time.perf_counter() - start, memory("VmHWM") - before, memory("VmRSS") - before
    driver = SequenceDriver(engine, CHUNK)
    measure(driver, points[0])  # not counted
    speeds = {p.name: statistics.median(measure(driver, p) for _ in range(runs)) for p in points}
    perplexity = score(engine, windows)[0] if windows else None
    return {
        "holds": engine.model_config.quantization,
        "compute": engine.engine_config.compute,
        "file_mb": round(size / MEGABYTE, 1),
        "load_s": round(took, 2),
        "resident_mb": round(resident / MEGABYTE, 1),
        "peak_mb": round(peak / MEGABYTE, 1),
        "perplexity": None if perplexity is None else round(perplexity, 3),
        **{name: round(speed, 1) for name, speed in speeds.items()},
    }


def rows(models: Sequence[str], arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row a model, speeds beside the first one's."""
    first: Mapping[str, object] | None = None
    for model in models:
        name, _, rest = model.partition("=")
        folder, _, compute = rest.partition("@")
        words = [sys.executable, "-m", "bench.quantized", "--one", folder, "--compute", compute or "exact"]
        words += ["--tokens", str(arguments.tokens), "--runs", str(arguments.runs), "--tokenizer", arguments.tokenizer]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        ratios = {f"{p}_ratio": round(float(str(found[p])) / float(str(first[p])), 2) for p in POINTS.split(",")}
        yield {"name": name, **found, **ratios}


def markdown(found: Sequence[Mapping[str, object]]) -> str:
    """The rows as docs/quantization.md has them."""
    keys = list(found[0])
    lines = [keys, ["---"] * len(keys), *([str(value) for value in row.values()] for row in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantized", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER[@COMPUTE]")
    parser.add_argument("--one", help="measure this folder in this process and print one JSON object")
    parser.add_argument("--compute", default="exact", help="for --one")
    parser.add_argument(
        "--tokens", type=int, default=4 * WINDOW, help="of the text that perplexity is measured on; 0: none is"
    )
    parser.add_argument("--tokenizer", default="default", help="the model whose tokenizer cuts the text")
    parser.add_argument("--runs", type=int, default=1, help="of each point, after one that is not counted")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    one = functools.partial(measure_one, arguments.one, arguments.compute, arguments.tokens, arguments.runs)
    if arguments.one:
        print(json.dumps(one(arguments.tokenizer)))
    elif arguments.markdown:
        print(markdown(list(rows(arguments.models, arguments))))
    else:
        emit(rows(arguments.models, arguments), as_json=arguments.json)


if __name__ == "__main__":
    main()
