"""The arena: cut in aligned pieces, larger than the machine, and clear about what can't be had."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.memory import ALIGNMENT, Arena
from tandem.errors import ConfigError, InternalError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")


def test_pieces_are_zeroed_aligned_and_apart() -> None:
    arena = Arena(1000)
    pieces = [arena.take(size) for size in (1, 64, 0, 100)]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % ALIGNMENT == 0
        assert not bool(piece.any())
        piece.fill_(number + 1)
    assert [set(piece.tolist()) for piece in pieces] == [{1}, {2}, set(), {4}]
    with pytest.raises(InternalError, match="do not fit"):
        arena.take(1 << 20)


def test_capacity_is_address_space_only() -> None:
    """Panels of 4 bits take half of what is reserved: a model that fits must load."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert bool((Arena(2 * machine).take(10) == 0).all())


@pytest.mark.parametrize("capacity", [1 << 62, 1 << 70])
def test_what_can_not_be_had(capacity: int) -> None:
    with pytest.raises(ConfigError, match=f"{capacity} bytes for weights"):
        Arena(capacity)


@linux_only
def test_two_regions_over_one_memory() -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 16)
    one = Arena(1 << 16, fd)
    one.take(1)
    piece = one.take(100)
    other = Arena(1 << 16, fd, filled=True)
    os.close(fd)
    piece.fill_(7)
    assert other.at(piece.storage_offset(), 100).tolist() == [7] * 100
    for offset, nbytes in ((32, 8), (-64, 8), (64, -1), (64, 1 << 16)):
        with pytest.raises(InternalError, match="were taken"):
            other.at(offset, nbytes)
    with pytest.raises(InternalError, match="do not fit"):
        other.take(1)
    with pytest.raises(InternalError, match="were taken"):
        one.at(64, 101)


@linux_only
def test_memory_that_is_too_small_can_not_be_mapped(tmp_path: Path) -> None:
    with (tmp_path / "small").open("w+b") as file, pytest.raises(ConfigError, match="65536 bytes for weights"):
        Arena(1 << 16, file.fileno())


@linux_only
@pytest.mark.parametrize("how", ["Arena(64, fd, filled=True).at(0, 64).fill_(1)", "a.freeze(); a.take(64).fill_(1)"])
def test_what_is_frozen_can_not_be_written(how: str) -> None:
    """The process ends at the stray write, before it harms others."""
    start = "import os; from kernels.memory import Arena; fd = os.memfd_create('t'); os.ftruncate(fd, 4096)"
    code = f"{start}; a = Arena(64, fd); {how}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGSEGV


def test_told_when_the_last_piece_is_gone() -> None:
    freed: list[bool] = []
    arena = Arena(1000)
    arena.when_freed(lambda: freed.append(True))
    piece = arena.take(100)[10:20]
    del arena
    gc.collect()
    assert freed == []
    del piece
    gc.collect()
    assert freed == [True]
