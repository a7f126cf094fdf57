"""One launch of one kernel: what runs it on a GPU also says how to compile it without one.

Every operation builds its `Launch` in one function, from tensors. With tensors on the "meta" device nothing can run,
but `source()` names the very specialisation that the same call would compile on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from tandem.errors import InternalError

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALIGNED = 16
"""Triton compiles pointers and integers that are multiples of this apart from others."""


@dataclass(frozen=True)
class Target:
    """What kernels are tuned for: `backend` is "cuda", "hip" or "interpreter"; `arch` is 80, 90, ... with CUDA."""

    backend: str
    arch: int = 0

    @property
    def has_fp8(self) -> bool:
        """Whether the chip converts and multiplies the float8_e4m3fn of torch; elsewhere its bits are decoded."""
        return self.backend == "cuda" and self.arch >= 89


_forced: Target | None = None


def target() -> Target:
    """The target of this process, or of `compiling_for`."""
    return _forced or _found()


@functools.cache
def _found() -> Target:
    if triton.knobs.runtime.interpret:
        return Target("interpreter")
    if torch.version.hip:
        return Target("hip")
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", 10 * major + minor)


@contextlib.contextmanager
def compiling_for(wanted: Target) -> Iterator[None]:
    """Build launches for another target inside the block: for compiling ahead of time."""
    global _forced
    before, _forced = _forced, wanted
    try:
        yield
    finally:
        _forced = before


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, in the kernel's order; constexprs come last in every kernel here."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch, unless the grid is empty."""
        if min(self.grid) > 0:
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[self.grid](**self.args, **self.constexprs, **options)

    def source(self) -> ASTSource:
        """What `triton.compile` takes: the specialisation that `run` would compile on a GPU."""
        names = list(self.kernel.arg_names)
        signature: dict[str, str] = {}
        constants = dict(self.constexprs)
        attrs: dict[tuple[int, ...], list[list[Any]]] = {}
        for name, value in self.args.items():
            if value is None or (isinstance(value, int) and value == 1):
                constants[name] = value
                continue
            signature[name] = _type(value)
            if _aligned(value):
                attrs[(names.index(name),)] = [["tt.divisibility", ALIGNED]]
        signature |= dict.fromkeys(constants, "constexpr")
        return ASTSource(self.kernel, {name: signature[name] for name in names}, constants, attrs)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_meta or value.data_ptr() % ALIGNED == 0
    return isinstance(value, int) and value % ALIGNED == 0


def require(good: bool, name: str, tensor: torch.Tensor, expected: str) -> None:
    """Raise InternalError, saying what was expected and what came, unless `good`."""
    if not good:
        raise InternalError(
            f"{name} must be {expected}; got {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, "
            f"on {tensor.device}"
        )


def require_dense(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: torch.Tensor
) -> None:
    """Require a contiguous tensor of this shape and one of these dtypes on the device of `like`."""
    good = tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous() and tensor.device == like.device
    require(good, name, tensor, f"contiguous {' or '.join(map(str, dtypes))} {shape} on {like.device}")
