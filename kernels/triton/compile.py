"""Compile launches for chips that are not here, and read what they use: registers, shared memory, spills.

Needs triton without TRITON_INTERPRET, and no GPU. NVIDIA's figures come from the cubin, by the cuobjdump that triton
brings; AMD's from the metadata in the assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from kernels.triton.launch import Launch, Target, compiling_for
from kernels.triton.variants import VARIANTS
from tandem.errors import InternalError

CHIPS = {
    "sm_80": (Target("cuda", 80), GPUTarget("cuda", 80, 32)),
    "sm_90": (Target("cuda", 90), GPUTarget("cuda", 90, 32)),
    "gfx942": (Target("hip", 942), GPUTarget("hip", "gfx942", 64)),
}
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
"""Bytes that one program may have."""


@dataclass(frozen=True)
class Usage:
    """What one kernel uses on one chip: registers a thread, bytes of shared a program, bytes spilled a thread."""

    variant: str
    kernel: str
    chip: str
    warps: int
    registers: int
    shared: int
    spilled: int
    wgmma: bool

    @property
    def fits(self) -> bool:
        """Nothing is spilled, and the chip has that much shared memory."""
        return self.spilled == 0 and self.shared <= SHARED_LIMITS[self.chip]


def compile_variant(variant: str, chip: str) -> list[Usage]:
    """Compile every launch of VARIANTS[variant] for `chip`, a key of CHIPS. Errors are triton's own."""
    wanted, _ = CHIPS[chip]
    with compiling_for(wanted):
        launches = VARIANTS[variant]()
    return [_compile(variant, launch, chip) for launch in launches]


def _compile(variant: str, launch: Launch, chip: str) -> Usage:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(launch.source(), target=CHIPS[chip][1], options=options)
    registers, spilled = _hip(compiled) if chip.startswith("gfx") else _cuda(compiled)
    wgmma = "wgmma" in compiled.asm.get("ptx", "")
    shared = int(compiled.metadata.shared)
    return Usage(variant, launch.kernel.__name__, chip, launch.num_warps, registers, shared, spilled, wgmma)


def _hip(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    return _number(r"\.vgpr_count:\s+(\d+)", text), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)


def _cuda(compiled: Any) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise InternalError(f"the compiled kernel says nothing of {pattern!r}")
    return int(found[1])
