"""What a way of computing costs in quality: perplexity and greedy agreement on real text, beside a reference.

    python -m bench.quality --json                       # int8 and bf16 beside exact, 20,480 tokens

The text is on every machine: the licences in the system's common-licenses folder, and the standard library's own
documentation. It is cut into windows of 1,024 tokens. Perplexity is e to the mean negative log likelihood of every
token but a window's first; agreement is the share of positions where the likeliest token is the reference's. A KV cache
has the type that its way of computing has by default; `int8/fp8_e4m3` names compute and KV dtype.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.report import emit
from engine.batch import Slice
from engine.loading import Engine, load_engine, resolve
from engine.runner import build_meta
from engine.weights.checkpoint import read_config
from gateway.tokenizer import load_tokenizer
from tandem.errors import ConfigError
from tandem.models import resolve_model

WINDOW = 1024
CHUNK = 512
LICENCES = Path("/usr/share/common-licenses")
MODULES = (
    *("argparse", "asyncio", "collections", "decimal", "email", "http.client", "inspect", "json"),
    *("logging", "pathlib", "subprocess", "threading", "typing", "unittest"),
)


def text_tokens(model: str, count: int) -> list[list[int]]:
    """Windows of token ids, half licences and half documentation. Raises ConfigError when there is too little text."""
    encode = load_tokenizer(model).encode
    windows = -(-count // WINDOW)
    halves = [encode(_licences()), encode(_documentation())]
    wanted = [(windows + 1) // 2 * WINDOW, windows // 2 * WINDOW]
    for ids, need in zip(halves, wanted, strict=True):
        if len(ids) < need:
            raise ConfigError(f"the text on this machine has {len(ids)} tokens where {need} are needed; ask for fewer")
    tokens = halves[0][: wanted[0]] + halves[1][: wanted[1]]
    return [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]


def _licences() -> str:
    files = sorted(path for path in LICENCES.glob("*") if path.is_file() and not path.is_symlink())
    return "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)


def _documentation() -> str:
    members = (member for name in MODULES for _, member in sorted(inspect.getmembers(importlib.import_module(name))))
    return "\n".join(inspect.getdoc(m) or "" for m in members if inspect.isclass(m) or inspect.isfunction(m))


def logits_of(engine: Engine, window: Sequence[int]) -> Iterator[Tensor]:
    """Logits float32 [rows, V] of a window, chunk by chunk; each is valid until the next."""
    blocks = list(range(-(-len(window) // engine.engine_config.block_size)))
    for start in range(0, len(window), CHUNK):
        part = Slice("quality", window[start : start + CHUNK], start, blocks)
        ids, meta = build_meta([part], engine.engine_config.block_size)
        with torch.inference_mode():
            yield engine.runner.model.step(ids, meta, engine.kv_cache, torch.arange(len(ids))).logits


def score(engine: Engine, windows: Sequence[Sequence[int]]) -> tuple[float, Tensor]:
    """Perplexity, and the likeliest next token at every position."""
    loss, count, likeliest = 0.0, 0, []
    for window in windows:
        start = 0
        for logits in logits_of(engine, window):
            targets = torch.tensor(window[start + 1 : start + 1 + len(logits)])
            loss += float(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
            count += len(targets)
            likeliest.append(logits.argmax(-1))
            start += len(logits)
    return math.exp(loss / count), torch.cat(likeliest)


def measure(model: str, ways: Sequence[str], tokens: int) -> Iterator[dict[str, object]]:
    """A row for each way of computing; the first is the reference."""
    windows = text_tokens(model, tokens)
    reference: tuple[float, Tensor] | None = None
    for way in ways:
        compute, _, kv_dtype = way.partition("/")
        settings = {"model": model, "compute": compute, "num_blocks": -(-WINDOW // 16), "block_size": 16}
        settings |= {"kv_dtype": kv_dtype or "auto", "device": "cpu"}
        engine = load_engine(resolve(settings, read_config(model)))
        perplexity, likeliest = score(engine, windows)
        reference = reference or (perplexity, likeliest)
        yield {
            "compute": way,
            "tokens": sum(map(len, windows)),
            "perplexity": round(perplexity, 5),
            "change_percent": round((perplexity / reference[0] - 1) * 100, 3),
            "greedy_agreement_percent": round(float((likeliest == reference[1]).float().mean()) * 100, 2),
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default", help="default, or a path to a GGUF file or Hugging Face folder")
    parser.add_argument("--computes", default="exact,bf16,int8", help="each COMPUTE or COMPUTE/KV_DTYPE")
    parser.add_argument("--tokens", type=int, default=20 * WINDOW)
    parser.add_argument("--json", action="store_true", help="one JSON object a line (the default prints a table)")
    arguments = parser.parse_args()
    rows = measure(str(resolve_model(arguments.model)), arguments.computes.split(","), arguments.tokens)
    emit(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
