"""Names of blocks: what they cover, and that they are the same on every machine."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefix import block_hashes, prefix_root

ROOT = prefix_root("tenant", "scope", "model", "layout", "numerics")
tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_root_is_fixed() -> None:
    """Workers of different versions share prefixes only as long as this holds."""
    parts = (b"tenant", b"scope", b"model", b"layout", b"numerics")
    fields = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    assert hashlib.sha256(b"tandem-prefix-v2" + fields).digest() == ROOT


def test_root_depends_on_each_field_and_on_their_borders() -> None:
    roots = {
        ROOT,
        prefix_root("", "scope", "model", "layout", "numerics"),
        prefix_root("tenant", "scope", "other", "layout", "numerics"),
        prefix_root("tenant", "scope", "model", "other", "numerics"),
        prefix_root("tenant", "scope", "model", "layout", "other"),
        prefix_root("tenants", "cope", "model", "layout", "numerics"),
        prefix_root("tenant", "scope", "modell", "ayout", "numerics"),
        prefix_root("tenant", "other", "model", "layout", "numerics"),
    }
    assert len(roots) == 8


def test_chain_is_fixed() -> None:
    first = hashlib.sha256(ROOT + bytes([1, 0, 0, 0, 2, 1, 0, 0])).digest()
    second = hashlib.sha256(first + bytes([3, 0, 0, 0, 255, 255, 255, 255])).digest()
    assert block_hashes(ROOT, [1, 258, 3, 2**32 - 1, 5], 2) == [first, second]


@given(tokens_lists, st.integers(1, 9), st.data())
def test_incremental_equals_whole(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    whole = block_hashes(ROOT, tokens, block_size)
    assert len(whole) == len(tokens) // block_size
    kept = whole[: data.draw(st.integers(0, len(whole)))]
    copy = list(kept)
    assert block_hashes(ROOT, tokens, block_size, kept) == whole
    assert kept == copy


@given(tokens_lists, tokens_lists, st.integers(1, 5))
def test_equal_names_mean_equal_prefixes(left: list[int], right: list[int], block_size: int) -> None:
    pairs = zip(block_hashes(ROOT, left, block_size), block_hashes(ROOT, right, block_size), strict=False)
    for place, (a, b) in enumerate(pairs, 1):
        assert (a == b) == (left[: place * block_size] == right[: place * block_size])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="fill only 1 blocks"):
        block_hashes(ROOT, [1, 2, 3], 2, [b"a", b"b"])
    for token in (-1, 2**32):
        with pytest.raises(ValueError, match="token ids must be"):
            block_hashes(ROOT, [token], 1)
