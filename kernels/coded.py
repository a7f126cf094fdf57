"""Linear layers over weights that stay as the codes a file holds: float32 rows times (code - zero) * scale.

A weight is never expanded as a whole: a block of 64 outputs and 64 inputs at a time becomes float32 within the cache.
Every output element is one chain of float32 fused multiply-adds in the order of k, so the bits are those that
`kernels.linear` with compute "exact" gives for the same weight as float32, and a row's bits depend on that row and the
weights only. C++ (coded.cpp).

Codes are integers of 2, 3, 4 or 8 bits, or FP8 (e4m3: Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
Formats that quantise activations too say so in `Rounding`: rows are rounded as the format says, then multiplied as
float32, which is what the integer or FP8 product is but for the rounding of its sum.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kernels import build, check, dispatch
from tandem.errors import InternalError

PANEL = 64
BITS = (2, 3, 4, 8)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the rows of a product are quantised before it: symmetric, to `kind`.

    `group`: inputs that share a scale; None: a whole row. `scale`: one for everything, from the file; None: each scale
    is the largest magnitude over `steps`.
    """

    kind: Literal["int8", "fp8"]
    group: int | None = None
    scale: float | None = None
    by_inverse: bool = False
    """Rows are multiplied by the inverse of their scale, not divided by it, which decides ties (torchao)."""

    @property
    def steps(self) -> float:
        """What the largest magnitude becomes: half of the codes' range."""
        return 127.5 if self.kind == "int8" else FP8_MAX


@dataclass(frozen=True, eq=False)
class CodedWeights:
    """A weight [N, K]: uint8 codes [N, K] with scales [N, G] and zeros uint8 [N, G], each for `group` inputs."""

    codes: torch.Tensor
    scales: torch.Tensor
    """One of `SCALE_DTYPES`."""
    group: int
    bits: int = 8
    fp8: bool = False
    """Codes are e4m3 numbers: 8 bits, no zeros."""
    zeros: torch.Tensor | None = None
    """None: 2 ** (bits - 1), or 0 where there are minima."""
    minima: torch.Tensor | None = None
    """[N, G] of the scales' type, added to each weight after scaling (GGUF's Q4_1); None: nothing is."""
    table: torch.Tensor | None = None
    """float32 [16]: what a 4-bit code stands for before scaling (NF4, FP4), in place of code - zero."""
    order: torch.Tensor | None = None
    """int32 [K]: the group of each input (`g_idx`); None: input k is of group k // `group`."""
    rounding: Rounding | None = None

    def groups(self) -> torch.Tensor:
        """int64 [K]: the group of each input."""
        return torch.arange(self.codes.shape[1]) // self.group if self.order is None else self.order.long()

    def chosen(self, ids: torch.Tensor) -> CodedWeights:
        """Rows `ids` int64 of it."""
        zeros, minima = (None if part is None else part[ids] for part in (self.zeros, self.minima))
        return replace(self, codes=self.codes[ids], scales=self.scales[ids], zeros=zeros, minima=minima)

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]."""
        groups = self.groups()
        if self.fp8:
            return self.codes.view(FP8).float() * self.scales.float()[:, groups]
        if self.table is not None:
            return self.table[self.codes.long()] * self.scales.float()[:, groups]
        middle = float(1 << self.bits >> 1) if self.minima is None else 0.0
        zeros = middle if self.zeros is None else self.zeros.float()[:, groups]
        scaled = (self.codes.float() - zeros) * self.scales.float()[:, groups]
        return scaled if self.minima is None else scaled + self.minima.float()[:, groups]


class CodedArgs(ctypes.Structure):
    """`struct Coded` of coded.cpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("minima", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
    )


@dataclass(frozen=True, eq=False)
class CodedLinear:
    """Weights ready for `coded_linear`: n outputs, k inputs. The torch path keeps `weights`; C++ keeps panels."""

    n: int
    k: int
    group: int
    bits: int
    """0: FP8."""
    scales: torch.Tensor
    rounding: Rounding | None
    panels: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    table: torch.Tensor | None = None
    order: torch.Tensor | None = None
    weights: CodedWeights | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        codes = self.panels if self.weights is None else self.weights.codes
        held = (codes, self.scales, self.zeros, self.minima, self.table, self.order)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def args(self, bias: torch.Tensor | None) -> CodedArgs:
        """For C++; holds pointers only."""
        tensors = (self.panels, self.scales, self.zeros, self.minima, self.table, self.order, bias)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        scale_type = SCALE_DTYPES.index(self.scales.dtype)
        return CodedArgs(*pointers, self.n, self.k, self.scales.shape[1], self.group, self.bits, scale_type)


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("coded.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.tandem_coded_bytes.argtypes, lib.tandem_coded_bytes.restype = [i64, i64, i32], i64
    lib.tandem_coded_pack.argtypes, lib.tandem_coded_pack.restype = [pointer, pointer, i64, i64, i32, i32], None
    lib.tandem_coded_linear.argtypes = [pointer, ctypes.POINTER(CodedArgs), pointer, i64, i64, i32]
    lib.tandem_coded_linear.restype = None
    lib.tandem_coded_columns.argtypes = [ctypes.POINTER(CodedArgs), pointer, pointer, i64]
    lib.tandem_coded_columns.restype = None
    return lib


def pack_coded(weights: CodedWeights) -> CodedLinear:
    """Pack a weight for `coded_linear`, at the bits that its codes have. The parts may be freed afterwards.

    Raises InternalError for shapes, types or groups that don't fit each other.
    """
    _check(weights)
    (n, k), bits = weights.codes.shape, 0 if weights.fp8 else weights.bits
    table, order = (None if part is None else part.clone() for part in (weights.table, weights.order))
    if dispatch.select().name != "cpp":
        held = (None, weights.zeros, weights.minima, table, order, weights)
        return CodedLinear(n, k, weights.group, bits, weights.scales, weights.rounding, *held)
    lib = _library()
    panels = torch.zeros(lib.tandem_coded_bytes(n, k, bits), dtype=torch.uint8)
    lib.tandem_coded_pack(weights.codes.data_ptr(), panels.data_ptr(), n, k, bits, torch.get_num_threads())
    zeros, minima = (None if part is None else _by_panel(part) for part in (weights.zeros, weights.minima))
    scales = _by_panel(weights.scales)
    return CodedLinear(n, k, weights.group, bits, scales, weights.rounding, panels, zeros, minima, table, order)


def _by_panel(rows: torch.Tensor) -> torch.Tensor:
    """[N, G] -> [ceil(N / 64), G, 64], zeros beyond N."""
    n, groups = rows.shape
    padded = torch.zeros(-(-n // PANEL) * PANEL, groups, dtype=rows.dtype)
    padded[:n] = rows
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def _check(weights: CodedWeights) -> None:
    codes, scales = weights.codes, weights.scales
    if codes.dim() != 2 or codes.dtype is not torch.uint8 or not codes.is_contiguous() or codes.shape[1] == 0:
        raise check.fail("codes", codes, "contiguous uint8 [N, K], K at least 1")
    n, k = codes.shape
    if weights.bits not in BITS or weights.group < 1 or (weights.fp8 and weights.bits != 8):
        raise InternalError(f"{weights.bits} bits in groups of {weights.group} are no codes")
    if scales.dim() != 2 or scales.dtype not in SCALE_DTYPES or scales.shape[0] != n:
        raise check.fail("scales", scales, f"float32, bfloat16 or float16 [{n}, groups]")
    if weights.zeros is not None and (weights.zeros.dtype is not torch.uint8 or weights.zeros.shape != scales.shape):
        raise check.fail("zeros", weights.zeros, f"uint8 {tuple(scales.shape)}")
    minima = weights.minima
    if minima is not None and (minima.dtype is not scales.dtype or minima.shape != scales.shape or weights.fp8):
        raise check.fail("minima", minima, f"{scales.dtype} {tuple(scales.shape)}, of integer codes")
    if weights.table is not None:
        check.dense("table", weights.table, (16,))
        if weights.bits != 4 or weights.fp8 or weights.zeros is not None or minima is not None:
            raise InternalError("a table is of 4-bit codes without zeros or minima")
    if weights.order is None:
        if scales.shape[1] != -(-k // weights.group):
            raise check.fail("scales", scales, f"[{n}, {-(-k // weights.group)}]")
        return
    check.vector("order", weights.order, torch.int32, k)
    if not 0 <= int(weights.order.min()) <= int(weights.order.max()) < scales.shape[1]:
        raise InternalError(f"order names groups outside [0, {scales.shape[1]})")


def coded_linear(
    x: torch.Tensor, packed: CodedLinear, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x [M, K] float32 times the packed weights, plus bias [N] float32: [M, N] float32, into `out` if given.

    `x` comes rounded already (`round_rows`). `out` may be columns of a wider tensor; it must not overlap `x`. M may be
    0. Raises InternalError for wrong shapes or dtypes.
    """
    check.rows("x", x, packed.k)
    m = x.shape[0]
    if bias is not None:
        check.dense("bias", bias, (packed.n,))
    if out is None:
        out = torch.empty((m, packed.n), dtype=torch.float32)
    elif out.shape != (m, packed.n) or out.dtype is not torch.float32 or out.stride(1) != 1 or not out.is_cpu:
        raise check.fail("out", out, f"float32 ({m}, {packed.n}) with dense rows on the CPU")
    if packed.panels is None:
        assert packed.weights is not None
        return out.copy_(coded_linear_reference(x, packed.weights, bias))
    stride = out.stride(0) if m > 1 else packed.n
    _library().tandem_coded_linear(x.data_ptr(), packed.args(bias), out.data_ptr(), m, stride, torch.get_num_threads())
    return out


def coded_rows(packed: CodedLinear, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` int64 [T] of the weight [N, K] as float32 [T, K]: for an LM head that is the embedding table too.

    Raises InternalError for an id outside [0, n).
    """
    check.vector("ids", ids, torch.int64)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < packed.n:
        raise InternalError(f"ids must be within [0, {packed.n})")
    if packed.panels is None:
        assert packed.weights is not None
        return packed.weights.chosen(ids).dequantized()
    out = torch.empty(ids.numel(), packed.k)
    _library().tandem_coded_columns(packed.args(None), ids.data_ptr(), out.data_ptr(), ids.numel())
    return out


def coded_linear_reference(x: torch.Tensor, weights: CodedWeights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Do what `coded_linear` does, by torch."""
    return torch.nn.functional.linear(x, weights.dequantized(), bias)


def round_rows(x: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Rows [M, K] float32 as a format that quantises them sees them: float32, each element alone or by its scale's.

    Raises InternalError when K isn't a multiple of the rounding's group.
    """
    if rounding.scale is not None:
        return _rounded(x, torch.tensor(rounding.scale), rounding)
    if rounding.group is None:
        return _rounded(x, _scales(x, rounding), rounding)
    if x.shape[1] % rounding.group:
        raise check.fail("x", x, f"[rows, a multiple of {rounding.group}]")
    groups = x.view(x.shape[0], x.shape[1] // rounding.group, rounding.group)
    return _rounded(groups, _scales(groups, rounding), rounding).view(x.shape)


def _scales(x: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    if x.numel() == 0:
        return torch.ones(*x.shape[:-1], 1)
    scales = x.abs().amax(-1, keepdim=True) / rounding.steps
    return torch.where(scales == 0, torch.finfo(torch.float32).eps, scales)


def _rounded(x: torch.Tensor, scales: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    scaled = x * (1 / scales) if rounding.by_inverse else x / scales
    if rounding.kind == "int8":
        return scaled.clamp_(-128, 127).round_() * scales
    return scaled.clamp_(-FP8_MAX, FP8_MAX).to(FP8).float() * scales
