"""What the GPU kernels use on chips that are not here: `python -m bench.gpu_table --markdown docs/gpu-table.md`.

Compiles every variant of `kernels.triton.variants` ahead of time, without a GPU. Ends with status 1 when one spills
registers or needs more shared memory than the chip has.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it when it is imported

import triton

from kernels.triton.compile import CHIPS, Usage, compile_variant
from kernels.triton.variants import VARIANTS

COMMAND = "python -m bench.gpu_table --markdown docs/gpu-table.md"
HEAD = f"""# What the GPU kernels use

Compiled ahead of time by triton {triton.__version__} on a machine without a GPU: `{COMMAND}`.
Registers are per thread, shared memory (LDS) per program, both as the compiler's output says; spilled bytes per thread.
That a kernel compiles says nothing of its speed: docs/gpu.md has what ran where.

| variant | kernel | chip | warps | registers | shared memory | spilled | wgmma |
| --- | --- | --- | ---: | ---: | ---: | ---: | --- |
"""


@click.command()
@click.option("--only", multiple=True, help="Compile the variants whose names have this in them. Default: all.")
@click.option("--chip", "chips", multiple=True, type=click.Choice(list(CHIPS)), help="Default: all of them.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table to this file.")
def main(only: tuple[str, ...], chips: tuple[str, ...], markdown: Path | None) -> None:
    """Compile the GPU kernels for chips that are not here; one JSON line each."""
    rows = []
    for variant in VARIANTS:
        if not only or any(name in variant for name in only):
            for chip in chips or tuple(CHIPS):
                found = compile_variant(variant, chip)
                print(*(json.dumps({**asdict(row), "fits": row.fits}) for row in found), sep="\n", flush=True)
                rows += found
    if markdown is not None:
        markdown.write_text(HEAD + "".join(map(_line, rows)))
    sys.exit(0 if rows and all(row.fits for row in rows) else 1)


def _line(row: Usage) -> str:
    cells = (row.variant, f"`{row.kernel}`", row.chip, row.warps, row.registers, row.shared, row.spilled)
    return f"| {' | '.join(map(str, cells))} | {'yes' if row.wgmma else ''} |\n"


if __name__ == "__main__":
    main()
