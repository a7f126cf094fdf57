"""The gated activation of Llama-like MLPs.

Source: Shazeer, "GLU Variants Improve Transformer" (2020). C++: activation.cpp; element by element, so bits depend on
that element only.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch.nn import functional

from kernels import build, check, dispatch


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("activation.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    lib.tandem_silu_mul.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    lib.tandem_silu_mul.restype = None
    return lib


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) * up: gate_up [T, 2 * I] float32 holds the gates first; the result is [T, I] float32, in `out`
    if given.

    `out` must not overlap `gate_up`. Raises InternalError for wrong shapes or dtypes.
    """
    check.rows("gate_up", gate_up)
    rows, double = gate_up.shape
    width = double // 2
    if width * 2 != double:
        raise check.fail("gate_up", gate_up, "of even width")
    if out is None:
        out = torch.empty((rows, width), dtype=torch.float32)
    else:
        check.dense("out", out, (rows, width))
    if dispatch.select().name != "cpp":
        return out.copy_(silu_mul_reference(gate_up))
    _library().tandem_silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
    return out


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Do what `silu_mul` does, by torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
