"""Fixtures of the kernel tests: each implementation forced in turn, thread counts restored, bits compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from kernels import dispatch

NATIVE = ("cpp", "tiles") if dispatch.has_tiles() else ("cpp",)
"""What C++ can be on this CPU: "tiles" is with AMX tiles, "cpp" without."""


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Force an implementation: torch, or one of `NATIVE`."""
    with dispatch.forced("torch" if name == "torch" else "cpp"), dispatch.tiles(name == "tiles"):
        yield


@pytest.fixture(params=("torch", *NATIVE))
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each implementation."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=NATIVE)
def cpp(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the C++ kernels: they carry the exact promise."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the test with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded random numbers."""
    return torch.Generator().manual_seed(1234)


@pytest.fixture
def same_bits() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Compare float32 tensors bit by bit: -0 differs from 0, and a NaN equals itself."""

    def compare(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))

    return compare
