"""Linear layers: float32 rows times packed weights.

Two kinds of product, chosen when the weights are packed:

"exact"  weights kept as they come (float32 or bf16), expanded to float32 in registers; every output element is one
         chain of float32 fused multiply-adds in the order of k. A row's bits depend on that row and the weights only.
         C++ (linear.cpp).
"bf16"   activations rounded to bf16, products by torch (oneDNN), which uses the CPU's bf16 instructions. Not
         row-invariant.

Source: the register-blocked outer product is Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
(2008); the panel layout follows from it. Without C++ both kinds run through torch on plain [N, K] weights.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels import build, check, dispatch
from kernels.memory import Arena
from tandem.errors import ConfigError, InternalError

PANEL = 64
COMPUTES = ("exact", "bf16")


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """Weights ready for `linear`: n outputs, k inputs, held once.

    `data` is flat panels [ceil(n/64) * k * 64] when `panels`, else plain [n, k]. `dtype` is the stored one. `nbytes`
    counts `data`.
    """

    n: int
    k: int
    dtype: torch.dtype
    compute: str
    panels: bool
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.nbytes


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("linear.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.tandem_linear_pack.argtypes = [pointer, pointer, i64, i64, i64, i32, i32]
    lib.tandem_linear_pack.restype = None
    lib.tandem_linear.argtypes = [pointer, pointer, pointer, pointer, i64, i64, i64, i32, i32]
    lib.tandem_linear.restype = None
    return lib


def panel_bytes(n: int, k: int) -> int:
    """Most bytes that the panels of a weight [N, K] take: those of float32."""
    return -(-n // PANEL) * k * PANEL * 4


def pack_linear(
    weight: torch.Tensor | Sequence[torch.Tensor], compute: str, arena: Arena | None = None
) -> PackedLinear:
    """Pack weight [N, K], or several [Ni, K] that are fused along N (q, k, v; gate, up), for `linear`.

    All parts have one dtype, float32 or bfloat16, and one K. `compute` is "exact" (weights keep their dtype) or "bf16"
    (weights are rounded to bf16). `arena`: where panels are put. The parts may be freed afterwards.

    Raises ConfigError for an unknown `compute`, InternalError for bad shapes.
    """
    if compute not in COMPUTES:
        raise ConfigError(f"compute={compute!r} is unknown; allowed: {', '.join(COMPUTES)}")
    parts = [weight] if isinstance(weight, torch.Tensor) else list(weight)
    _check_parts(parts)
    n, k = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if compute == "exact" and dispatch.select().name == "cpp":
        return PackedLinear(n, k, parts[0].dtype, compute, True, _pack_panels(parts, n, k, arena))
    dtype = torch.bfloat16 if compute == "bf16" else parts[0].dtype
    data = torch.empty((n, k), dtype=dtype)
    torch.cat([part.to(dtype) for part in parts], out=data)
    return PackedLinear(n, k, dtype, compute, False, data)


def _check_parts(parts: list[torch.Tensor]) -> None:
    if not parts:
        raise InternalError("pack_linear needs at least one weight")
    first = parts[0]
    for part in parts:
        if part.dim() != 2 or part.dtype not in check.FLOATS or part.dtype != first.dtype or not part.is_cpu:
            raise check.fail("weight", part, "float32 or bfloat16 [N, K] on the CPU, one dtype for all parts")
        if part.shape[1] != first.shape[1] or part.shape[1] == 0:
            raise check.fail("weight", part, f"[N, {first.shape[1]}], K at least 1")


def _pack_panels(parts: list[torch.Tensor], n: int, k: int, arena: Arena | None) -> torch.Tensor:
    lib, dtype = _library(), parts[0].dtype
    size = -(-n // PANEL) * k * PANEL
    packed = torch.empty(size, dtype=dtype) if arena is None else arena.take(size * dtype.itemsize).view(dtype)
    packed[n // PANEL * k * PANEL :].zero_()  # columns beyond N, in the last panel only
    first = 0
    for part in parts:
        rows = part.contiguous()
        lib.tandem_linear_pack(
            rows.data_ptr(),
            packed.data_ptr(),
            first,
            rows.shape[0],
            k,
            dtype is torch.bfloat16,
            torch.get_num_threads(),
        )
        first += rows.shape[0]
    return packed


def linear(
    x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x [M, K] float32 times the packed weights, plus bias [N] float32: [M, N] float32, into `out` if given.

    M may be 0. `out` must not overlap `x`. Raises InternalError for wrong shapes or dtypes.
    """
    n, k = packed.n, packed.k
    check.rows("x", x, k)
    m = x.shape[0]
    if bias is not None:
        check.dense("bias", bias, (n,))
    if out is None:
        out = torch.empty((m, n), dtype=torch.float32)
    else:
        check.dense("out", out, (m, n))
    if not packed.panels:
        return _linear_torch(x, packed, bias, out)
    data, bias_data = packed.data.data_ptr(), None if bias is None else bias.data_ptr()
    bf16 = packed.dtype is torch.bfloat16
    _library().tandem_linear(x.data_ptr(), data, bias_data, out.data_ptr(), m, n, k, bf16, torch.get_num_threads())
    return out


def _linear_torch(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    if packed.compute == "bf16":
        out.copy_(functional.linear(x.to(torch.bfloat16), packed.data))
        return out if bias is None else out.add_(bias)
    return out.copy_(linear_reference(x, packed.data, bias))


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [M, K] times weight [N, K] transposed, plus bias [N], in float32 by torch."""
    return functional.linear(x, weight.to(torch.float32), bias)


def weight_rows(packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` int64 [T] of the weight as it was before packing, float32 [T, K]; for a tied LM head as embedding.

    A panel holds 64 rows side by side, so a row is gathered with a stride: a few microseconds each.
    Raises InternalError for an id outside [0, n).
    """
    check.vector("ids", ids, torch.int64)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < packed.n:
        raise InternalError(f"ids must be within [0, {packed.n})")
    if not packed.panels:
        return packed.data[ids].float()
    places = ids % PANEL
    if packed.dtype is torch.bfloat16:
        places = torch.tensor(_bf16_places())[places]
    panels = packed.data.view(-1, packed.k, PANEL)
    return panels[ids // PANEL, :, places].to(torch.float32).contiguous()


@functools.cache
def _bf16_places() -> list[int]:
    """Where each column of a bf16 panel lies (linear.cpp pairs them)."""
    place = _library().tandem_bf16_place
    place.argtypes, place.restype = [ctypes.c_int64], ctypes.c_int64
    return [place(column) for column in range(PANEL)]
