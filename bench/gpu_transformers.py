"""transformers' `generate` with random weights of a shape, on a GPU: the floor that whole steps are compared with.

    PYTHONPATH=. python3 -m bench.gpu_transformers --shape llama-3-8b --points tg1@1024,tg32@1024

Weights in bfloat16, attention by torch, greedy, keys and values as `generate` keeps them by itself. A step's time is
what more tokens take: of two runs that differ in nothing else. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from typing import Any

import torch

from bench.points import Point, parse_points
from bench.random_weights import SHAPES, SPREAD, hf_config
from bench.report import emit

MORE_TOKENS = 64
"""Steps that are measured, behind the prompt and the first."""


def load(shape: str) -> Any:
    """A model of random weights, made on the GPU."""
    transformers: Any = importlib.import_module("transformers")
    given: dict[str, Any] = {**hf_config(SHAPES[shape])}
    del given["model_type"], given["torch_dtype"]
    config = transformers.LlamaConfig(**given, initializer_range=SPREAD, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def seconds(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Of one call that gives `tokens` new ones."""
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: Any, point: Point, runs: int) -> dict[str, object]:
    """Medians over `runs` runs after one that isn't counted."""
    ids = torch.randint(0, model.config.vocab_size, (point.sequences, point.prompt_tokens), device="cuda")
    firsts, steps = [], []
    for _ in range(runs + 1):
        first = seconds(model, ids, 1)
        steps.append((seconds(model, ids, 1 + MORE_TOKENS) - first) / MORE_TOKENS)
        firsts.append(first)
    step = statistics.median(steps[1:])
    first_ms = round(statistics.median(firsts[1:]) * 1e3, 2)
    rate = {"tokens_per_s": round(point.sequences / step, 1), "step_ms": round(step * 1e3, 3), "first_ms": first_ms}
    return {"point": point.name, **rate, "runs": runs}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_transformers", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--points", default="tg1@1024,tg32@1024")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    emit([{"gpu": torch.cuda.get_device_name(), **versions}], as_json=True)
    model = load(arguments.shape)
    with torch.inference_mode():
        emit((measure(model, point, arguments.runs) for point in parse_points(arguments.points)), as_json=True)


if __name__ == "__main__":
    main()
