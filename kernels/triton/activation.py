"""The gated activations of MLPs on a GPU: SiLU, and GeLU exact or by tanh.

Source: Shazeer, "GLU Variants Improve Transformer" (2020). Element by element in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

from kernels.triton.launch import FLOATS, Launch, require, require_dense
from tandem.errors import InternalError

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
BLOCK = 1024


@triton.jit
def _gated(
    gate_up_ptr: tl.tensor, out_ptr: tl.tensor, width: tl.tensor, KIND: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    raw = tl.load(gate_up_ptr + row * (2 * width) + at, mask=mask, other=0.0)
    gate = raw.to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * width) + width + at, mask=mask, other=0.0).to(tl.float32)
    if KIND == 0:
        gate = gate / (1.0 + tl.exp(-gate))
    elif KIND == 1:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(y)) = sigmoid(2 * y), which no exp can make NaN.
        gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    tl.store(out_ptr + row * width + at, (gate * up).to(raw.dtype), mask=mask)


def gated_launch(gate_up: torch.Tensor, out: torch.Tensor, kind: str) -> Launch:
    """The launch of one gated activation."""
    rows, width = out.shape
    block = min(BLOCK, max(16, int(triton.next_power_of_2(width))))
    args = {"gate_up_ptr": gate_up, "out_ptr": out, "width": width}
    return Launch(_gated, (rows, -(-width // block)), args, {"KIND": KINDS[kind], "BLOCK": block}, num_warps=4)


def gated(gate_up: torch.Tensor, kind: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return activation(gate) * up: gate_up [T, 2 * I] (16 bits or float32) holds the gates first; the result is
    [T, I], in `out` if given.

    `kind` is "silu", "gelu" or "gelu_tanh". `out` must not overlap `gate_up`. Raises InternalError for another kind,
    wrong shapes or dtypes.
    """
    if kind not in KINDS:
        raise InternalError(f"activation {kind!r} is unknown; allowed: {', '.join(KINDS)}")
    good = gate_up.dim() == 2 and gate_up.dtype in FLOATS and gate_up.is_contiguous() and gate_up.shape[1] % 2 == 0
    require(good, "gate_up", gate_up, "contiguous [rows, even width]")
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    if out is None:
        out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    else:
        require_dense("out", out, shape, (gate_up.dtype,), gate_up)
    gated_launch(gate_up, out, kind).run()
    return out


def gated_reference(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """Do what `gated` does, by torch in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if kind == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up
