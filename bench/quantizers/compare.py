"""How near Tandem is to quantising tools on their own checkpoints: a table.

    python -m bench.quantizers.compare FOLDER...    # within Tandem's environment

Each FOLDER has an `expected.safetensors` (`python -m bench.quantizers ... --expect`): tokens, and what the tool's own
inference says of them in float32. Distances are those of all logits, relative, by the Euclidean norm.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.report import emit
from bench.sequences import BLOCK_SIZE, load_bench_engine
from engine.batch import Slice
from engine.loading import Engine
from engine.runner import build_meta


def open_engine(folder: Path, compute: str, count: int) -> Engine:
    """An engine on the CPU for `count` tokens."""
    return load_bench_engine(str(folder), {"compute": compute, "device": "cpu"}, count, -(-count // BLOCK_SIZE))


def logits_of(engine: Engine, model: Any, ids: list[int]) -> Tensor:
    """What `model` over the engine's cache says of all of `ids`: float32 [T, V]."""
    blocks = list(range(-(-len(ids) // BLOCK_SIZE)))
    rows, meta = build_meta([Slice("compared", ids, 0, blocks)], BLOCK_SIZE)
    with torch.no_grad():
        logits: Tensor = model.step(rows, meta, engine.kv_cache, torch.arange(len(ids))).logits
    return logits


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, by the Euclidean norm."""
    return float((one - other).norm() / other.norm())


def compare(folder: Path) -> dict[str, object]:
    """One row of the table."""
    expected = load_file(folder / "expected.safetensors")
    ids = torch.cat([expected["prompt"], expected["continuation"]])[:-1].tolist()
    found: dict[str, Tensor] = {}
    holds = ""
    for compute in ("exact", "bf16"):
        engine = open_engine(folder, compute, len(ids))
        found[compute] = logits_of(engine, engine.runner.model, ids)
        holds = engine.model_config.quantization
    greedy = found["exact"][len(expected["prompt"]) - 1 :].argmax(-1)
    return {
        "folder": folder.name,
        "holds": holds,
        "float32": f"{distance(found['exact'], expected['logits']):.1e}",
        "bf16": f"{distance(found['bf16'], expected['logits']):.1e}",
        "greedy tokens equal": f"{int((greedy == expected['continuation']).sum())} of {len(greedy)}",
    }


def rows(folders: list[Path]) -> Iterator[dict[str, object]]:
    """All rows."""
    for folder in folders:
        yield compare(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantizers.compare", description="see the module's text")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    emit(rows(arguments.folders), as_json=arguments.json)


if __name__ == "__main__":
    main()
