"""The arena: cut in aligned pieces, larger than the machine, and clear about what can't be had."""

from __future__ import annotations

import os

import pytest

from kernels.memory import ALIGNMENT, Arena
from tandem.errors import ConfigError, InternalError


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
