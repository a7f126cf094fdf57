"""Linear layers with int8 activations and 4-bit or 8-bit weights in groups of 32.

A weight is d * (code - zero) + m: 4-bit codes have zero 8 and a minimum m per group (what GGUF's Q4_0 and Q4_1 hold, in
other words), 8-bit codes have zero 128 and no minimum (Q8_0, and whatever is quantised here). d is float16, m is
bfloat16. Activations are quantised row by row, group by group, to codes of -127..127 with a float32 scale; "fine" ones
are quantised once more on what that left over, and both parts are multiplied (15 bits).

Products within a group are exact in int32; across groups each output element is one chain of float32 operations in the
order of k. So a row's bits depend on that row and the weights only: not on other rows, tiles or threads.

Where the CPU has AMX tiles (`dispatch.has_tiles`), int8 means something else: weights are packed as int8 with one scale
an output column, rows are taken in 15 bits with one scale each, "fine" or not, and sums over the whole of k are exact
in int32. The same holds of a row's bits, which are others than without tiles.

Sources: integer products of blocks with scales as in llama.cpp's Q4_1 x Q8_1; VNNI panels as in oneDNN's documentation
of int8 primitives.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import build, check, dispatch
from kernels.memory import Arena
from tandem.errors import InternalError

GROUP = 32
ZEROS = {4: 8, 8: 128}
"""Bits to the code that stands for 0."""


@dataclass(frozen=True, eq=False)
class GroupWeights:
    """A weight [N, K] as codes: uint8 [N, K], `scales` and `minima` float32 [N, ceil(K / 32)] (minima with 4 bits)."""

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None

    def rounded(self) -> GroupWeights:
        """The same with scales and minima as the packed form holds them: float16 and bfloat16."""
        minima = None if self.minima is None else self.minima.bfloat16().float()
        return GroupWeights(self.bits, self.codes, self.scales.half().float(), minima)

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]."""
        groups = torch.arange(self.codes.shape[1]) // GROUP
        weight = (self.codes.float() - ZEROS[self.bits]) * self.scales[:, groups]
        return weight if self.minima is None else weight + self.minima[:, groups]


class MatrixArgs(ctypes.Structure):
    """`struct Matrix` of int8.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


@dataclass(frozen=True, eq=False)
class Int8Linear:
    """Weights ready for `int8_linear`: n outputs, k inputs. `weights` holds them for the torch path, else `panels`."""

    n: int
    k: int
    bits: int
    panels: torch.Tensor | None
    weights: GroupWeights | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        if self.panels is not None:
            return self.panels.nbytes
        assert self.weights is not None
        minima = 0 if self.weights.minima is None else self.weights.minima.nbytes
        return self.weights.codes.nbytes + self.weights.scales.nbytes + minima

    def args(self, bias: torch.Tensor | None = None) -> MatrixArgs:
        """For C++; holds pointers only."""
        assert self.panels is not None
        return MatrixArgs(self.panels.data_ptr(), None if bias is None else bias.data_ptr(), self.n, self.k, self.bits)


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("int8.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    matrix = ctypes.POINTER(MatrixArgs)
    lib.tandem_int8_packed_bytes.argtypes, lib.tandem_int8_packed_bytes.restype = [i64, i64, i32], i64
    lib.tandem_int8_work_bytes.argtypes, lib.tandem_int8_work_bytes.restype = [i64, i64], i64
    lib.tandem_int8_pack.argtypes = [pointer] * 5 + [i64, i64, i32, i32]
    lib.tandem_int8_pack.restype = None
    lib.tandem_int8_quantise_weight.argtypes = [pointer, pointer, pointer, i64, i64, i32]
    lib.tandem_int8_quantise_weight.restype = None
    lib.tandem_int8_linear.argtypes = [pointer, matrix, pointer, pointer, i64, i32, i32]
    lib.tandem_int8_linear.restype = None
    lib.tandem_int8_columns.argtypes = [matrix, pointer, pointer, i64]
    lib.tandem_int8_columns.restype = None
    return lib


def quantize_weight(weight: torch.Tensor) -> GroupWeights:
    """Quantise a weight [N, K], float32 or bfloat16, to 8 bits: round to nearest, scale = largest magnitude / 127.

    A NaN or an infinity is not hidden: the scale of its group is one too.
    """
    if weight.dim() != 2 or weight.dtype not in check.FLOATS or not weight.is_cpu or weight.shape[1] == 0:
        raise check.fail("weight", weight, "float32 or bfloat16 [N, K] on the CPU, K at least 1")
    if dispatch.select().name != "cpp":
        return quantize_weight_reference(weight)
    weight = weight.float().contiguous()
    rows, k = weight.shape
    codes = torch.empty(rows, k, dtype=torch.uint8)
    scales = torch.empty(rows, -(-k // GROUP))
    _library().tandem_int8_quantise_weight(
        weight.data_ptr(), codes.data_ptr(), scales.data_ptr(), rows, k, torch.get_num_threads()
    )
    return GroupWeights(8, codes, scales)


def quantize_weight_reference(weight: torch.Tensor) -> GroupWeights:
    """Do what `quantize_weight` does, by torch."""
    rows, k = weight.shape
    groups = -(-k // GROUP)
    padded = torch.zeros(rows, groups * GROUP)
    padded[:, :k] = weight.float()
    blocks = padded.view(rows, groups, GROUP)
    scales = (blocks.abs().amax(-1) / 127).half().float()
    inverse = torch.where(scales > 0, torch.ones_like(scales) / scales, 0.0)
    codes = (blocks * inverse[..., None]).round().nan_to_num().clamp(-127, 127) + 128
    return GroupWeights(8, codes.to(torch.uint8).view(rows, -1)[:, :k].contiguous(), scales)


def packed_bytes(n: int, k: int, bits: int = 8) -> int:
    """Bytes of the panels of a weight [N, K]."""
    return int(_library().tandem_int8_packed_bytes(n, k, bits)) if dispatch.select().name == "cpp" else 0


def pack_int8(
    parts: Sequence[GroupWeights], order: torch.Tensor | None = None, arena: Arena | None = None
) -> Int8Linear:
    """Pack weights [Ni, K] that are fused along N (q, k, v; gate, up) for `int8_linear`.

    `order` int64 [N]: where each row of the parts, one after another, becomes an output column; None: as they come.
    `arena`: where the panels are put. The parts may be freed afterwards.

    Raises InternalError when shapes or bits differ.
    """
    first = parts[0]
    k, bits = first.codes.shape[1], first.bits
    n = sum(part.codes.shape[0] for part in parts)
    for part in parts:
        check.dense("codes", part.codes, (part.codes.shape[0], k), torch.uint8)
        check.dense("scales", part.scales, (part.codes.shape[0], -(-k // GROUP)))
        if part.bits != bits or (part.minima is None) != (first.minima is None):
            raise InternalError("fused parts must have the same bits, and all minima or none")
    columns = torch.arange(n) if order is None else order
    check.vector("order", columns, torch.int64, n)
    if dispatch.select().name != "cpp":
        return Int8Linear(n, k, bits, None, _fused(parts, columns))
    lib, size = _library(), packed_bytes(n, k, bits)
    panels = torch.zeros(size, dtype=torch.uint8) if arena is None else arena.take(size)
    done = 0
    for part in parts:
        rows = part.codes.shape[0]
        lib.tandem_int8_pack(
            part.codes.data_ptr(),
            part.scales.data_ptr(),
            None if part.minima is None else part.minima.data_ptr(),
            panels.data_ptr(),
            columns[done:].data_ptr(),
            rows,
            k,
            bits,
            torch.get_num_threads(),
        )
        done += rows
    return Int8Linear(n, k, bits, panels)


def _fused(parts: Sequence[GroupWeights], columns: torch.Tensor) -> GroupWeights:
    place = torch.argsort(columns)
    minima = [part.minima for part in parts if part.minima is not None]
    return GroupWeights(
        parts[0].bits,
        torch.cat([part.codes for part in parts])[place],
        torch.cat([part.scales for part in parts])[place],
        torch.cat(minima)[place] if minima else None,
    ).rounded()


def int8_linear(
    x: torch.Tensor, packed: Int8Linear, bias: torch.Tensor | None = None, *, fine: bool = False
) -> torch.Tensor:
    """Return x [M, K] float32, quantised, times the packed weights, plus bias [N] float32: [M, N] float32.

    `fine` takes 15 bits of x. A row with a NaN or an infinity gives results that are not finite. M may be 0. Raises
    InternalError for wrong shapes or dtypes.
    """
    check.rows("x", x, packed.k)
    if bias is not None:
        check.dense("bias", bias, (packed.n,))
    if packed.panels is None:
        assert packed.weights is not None
        return int8_linear_reference(x, packed.weights, bias, fine=fine)
    m = x.shape[0]
    out = torch.empty(m, packed.n)
    lib = _library()
    work = torch.empty((1 + fine) * lib.tandem_int8_work_bytes(m, packed.k), dtype=torch.uint8)
    args = packed.args(bias)
    lib.tandem_int8_linear(x.data_ptr(), args, out.data_ptr(), work.data_ptr(), m, fine, torch.get_num_threads())
    return out


def int8_linear_reference(
    x: torch.Tensor, weights: GroupWeights, bias: torch.Tensor | None = None, *, fine: bool = False
) -> torch.Tensor:
    """Do what `int8_linear` does, by torch in float64: exact but for the last rounding."""
    m, k = x.shape
    groups = -(-k // GROUP)
    blocks = torch.zeros(m, groups, GROUP)
    blocks.view(m, groups * GROUP)[:, :k] = x
    total = torch.zeros(m, weights.codes.shape[0], dtype=torch.float64)
    centred = torch.zeros(weights.codes.shape[0], groups, GROUP, dtype=torch.float64)
    centred.view(-1, groups * GROUP)[:, :k] = weights.codes.double() - ZEROS[weights.bits]
    for _ in range(2 if fine else 1):
        codes, scales = _quantize_rows(blocks)
        products = torch.einsum("mgi,ngi->mng", codes.double(), centred)
        total += torch.einsum("mng,mg,ng->mn", products, scales.double(), weights.scales.double())
        if weights.minima is not None:
            sums = (scales * codes.sum(-1)).bfloat16().double()
            total += sums @ weights.minima.double().T
        blocks = blocks - scales[..., None] * codes
    return total.float() if bias is None else total.float() + bias


def tiled_linear_reference(x: torch.Tensor, weights: GroupWeights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Do what `int8_linear` does with AMX tiles, by torch in float64: exact but for the last roundings."""
    codes, scales = tile_weight(weights.dequantized())
    largest = x.abs().amax(-1, keepdim=True)
    used = largest >= 1e-30
    scaled = x * torch.where(used, torch.full_like(largest, 127.0) / largest, 0.0)
    first = scaled.round()
    rest = ((scaled - first) * 254).round()
    rows = (first.double() + rest.double() / 254) * torch.where(used, largest / 127, 0.0).double()
    total = rows @ (codes.double() * scales.double()).T
    return total.float() if bias is None else total.float() + bias


def tile_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] as AMX tiles take it: codes float32 [N, K] of -127..127, and scales float32 [N, 1]."""
    largest = weight.abs().amax(-1, keepdim=True)
    used = largest > 1e-30
    inverse = torch.where(used, torch.full_like(largest, 127.0) / largest, 0.0)
    return (weight * inverse).round(), torch.where(used, largest / 127, 0.0)


def _quantize_rows(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float32 [M, G, 32] of -127..127, and scales float32 [M, G]."""
    largest = blocks.abs().amax(-1)
    used = largest >= 1e-30
    scales = torch.where(used, largest / 127, 0.0)
    # A true division: `127 / largest` would be a product with the reciprocal, and round some ties the other way.
    inverse = torch.where(used, torch.full_like(largest, 127.0) / largest, 0.0)
    return (blocks * inverse[..., None]).round(), scales


def int8_rows(packed: Int8Linear, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` int64 [T] of the weight, dequantised: float32 [T, K]; for a tied LM head as embedding.

    Raises InternalError for an id outside [0, n).
    """
    check.vector("ids", ids, torch.int64)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < packed.n:
        raise InternalError(f"ids must be within [0, {packed.n})")
    if packed.panels is None:
        assert packed.weights is not None
        minima = None if packed.weights.minima is None else packed.weights.minima[ids]
        chosen = GroupWeights(packed.bits, packed.weights.codes[ids], packed.weights.scales[ids], minima)
        return chosen.dequantized()
    out = torch.empty(ids.numel(), packed.k)
    _library().tandem_int8_columns(packed.args(), ids.data_ptr(), out.data_ptr(), ids.numel())
    return out
