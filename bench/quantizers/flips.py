"""What rounding rows makes of a last bit: a tool beside itself, its input disturbed by that much, and Tandem beside it.

    python -m bench.quantizers.flips tool FOLDER FILE    # within llm-compressor's environment: its logits
    python -m bench.quantizers.flips ours FOLDER FILE    # within Tandem's: a table

FOLDER is a checkpoint with an `expected.safetensors` (`python -m bench.quantizers ... --expect`), whose tokens are
used. Logits are those of the model's first layers alone, then normed and multiplied by the LM head. "Disturbed" is the
tool with embeddings whose last bit is another; "double" is the tool with float64 sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NEAR = 1e-4
"""Of formats that round no rows, every row is nearer."""


def depths(layers: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({*(1 << i for i in range(layers.bit_length()) if 1 << i <= layers), layers})


def tokens(folder: Path) -> Tensor:
    """The prompt and what followed it, but for the last: int64 [T]."""
    expected = load_file(folder / "expected.safetensors")
    return torch.cat([expected["prompt"], expected["continuation"]])[:-1]


def tool_logits(folder: Path) -> dict[str, Tensor]:
    """`plain.1`, `disturbed.1`, `double.1`, ... -> logits float32 [T, V]."""
    from bench.quantizers.compressed import load

    model, ids = load(folder).eval(), tokens(folder)[None]
    layers, embedding, found = model.model.layers, model.model.embed_tokens, {}

    def run(way: str) -> None:
        for depth in depths(len(layers)):
            model.model.layers = layers[:depth]
            with torch.no_grad():
                found[f"{way}.{depth}"] = model(ids, use_cache=False).logits[0].float()

    with torch.no_grad():
        model(ids)  # the first step turns codes into weights: of all layers, while they are all there
    run("plain")
    handle = embedding.register_forward_hook(_disturb)
    run("disturbed")
    handle.remove()
    model.double()
    run("double")
    return found


def _disturb(module: Any, inputs: Any, output: Tensor) -> Tensor:
    signs = torch.randint(-1, 2, output.shape, generator=torch.Generator().manual_seed(1))
    return output * (1 + signs * 2.0**-23)


def our_logits(folder: Path) -> Iterator[tuple[int, Tensor]]:
    """Depth, and logits [T, V] of the engine with that many layers."""
    from bench.quantizers.compare import logits_of, open_engine
    from engine.models.skipping import keep_layers

    ids = tokens(folder).tolist()
    engine = open_engine(folder, "exact", len(ids))
    for depth in depths(engine.model_config.num_layers):
        yield depth, logits_of(engine, keep_layers(engine.runner.model, range(depth)), ids)


def compare(one: Tensor, other: Tensor) -> str:
    """Relative distance, and how many rows are nearer than `NEAR`."""
    rows = (one - other).norm(dim=1) / other.norm(dim=1)
    return f"{float((one - other).norm() / other.norm()):.1e}, {int((rows < NEAR).sum())} of {len(rows)}"


def table(folder: Path, file: Path) -> str:
    """Markdown."""
    found = load_file(file)
    lines = ["| layers | Tandem | disturbed | double |", "|---|---|---|---|"]
    for depth, logits in our_logits(folder):
        ways = (logits, found[f"disturbed.{depth}"], found[f"double.{depth}"])
        cells = " | ".join(compare(way, found[f"plain.{depth}"]) for way in ways)
        lines.append(f"| {depth} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantizers.flips", description="see the module's text")
    parser.add_argument("part", choices=["tool", "ours"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "tool":
        save_file(tool_logits(arguments.folder), arguments.file)
    else:
        print(table(arguments.folder, arguments.file))


if __name__ == "__main__":
    main()
