from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kv_transfer.layout import KvLayout, check_compatible
from tandem.errors import IncompatibleError, InvalidRequestError

LAYOUT = KvLayout(block_size=16, dtype="bfloat16", num_layers=30, num_kv_heads=3, head_dim=64)


def test_block_bytes_and_blocks() -> None:
    assert LAYOUT.block_bytes == 30 * 2 * 3 * 16 * 64 * 2
    assert [LAYOUT.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    "change",
    [{"block_size": 8}, {"dtype": "float16"}, {"num_layers": 1}, {"num_kv_heads": 6}, {"head_dim": 32}],
)
def test_id_and_compatibility_depend_on_every_field(change: dict[str, Any]) -> None:
    other = replace(LAYOUT, **change)
    assert other.layout_id != LAYOUT.layout_id
    with pytest.raises(IncompatibleError) as caught:
        check_compatible(LAYOUT, other)
    assert str(LAYOUT) in caught.value.message
    assert str(other) in caught.value.message


def test_equal_layouts_are_compatible() -> None:
    check_compatible(LAYOUT, replace(LAYOUT))
    assert replace(LAYOUT).layout_id == LAYOUT.layout_id
    assert len(LAYOUT.layout_id) == 32


@pytest.mark.parametrize("name", ["block_size", "num_layers", "num_kv_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, (1 << 20) + 1])
def test_impossible_numbers_name_the_field(name: str, value: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        replace(LAYOUT, **{name: value})
    assert caught.value.field == f"layout.{name}"


def test_huge_block_unknown_dtype_and_order() -> None:
    with pytest.raises(InvalidRequestError):
        replace(LAYOUT, head_dim=1 << 20)
    with pytest.raises(IncompatibleError, match=r"int3.*float32"):
        replace(LAYOUT, dtype="int3")
    with pytest.raises(IncompatibleError, match="order"):
        replace(LAYOUT, order="layer,block")


def test_wire_fields_must_agree() -> None:
    assert LAYOUT.check_wire(LAYOUT.block_bytes, LAYOUT.layout_id) is LAYOUT
    with pytest.raises(IncompatibleError):
        LAYOUT.check_wire(LAYOUT.block_bytes + 1, LAYOUT.layout_id)
    with pytest.raises(IncompatibleError):
        LAYOUT.check_wire(LAYOUT.block_bytes, "")
