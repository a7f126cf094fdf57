from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tandem.errors import IncompatibleError, InvalidRequestError
from tandem.kv_layout import (
    PAIRED_ORDER,
    STAGING_SLOT_BYTES,
    KvLayout,
    can_pair,
    check_pair,
    same_numerics,
    staged_bytes,
)

LAYOUT = KvLayout(block_size=16, dtype="bfloat16", num_layers=30, num_kv_heads=3, head_dim=64)


def test_block_bytes_and_blocks() -> None:
    assert LAYOUT.block_bytes == LAYOUT.data_bytes == 30 * 2 * 3 * 16 * 64 * 2
    assert [LAYOUT.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_scales_are_part_of_a_quantized_block() -> None:
    layout = KvLayout(block_size=3, dtype="int8", num_layers=1, num_kv_heads=1, head_dim=1)
    assert (layout.data_bytes, layout.scales_at, layout.block_bytes) == (6, 8, 8 + 4 * 2 * 3)
    assert replace(layout, dtype="float16").block_bytes == 12


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 8},
        {"dtype": "float16"},
        {"num_layers": 1},
        {"num_kv_heads": 6},
        {"head_dim": 32},
        {"order": PAIRED_ORDER},
        {"tp_size": 2},
    ],
)
def test_id_depends_on_every_field(change: dict[str, Any]) -> None:
    assert replace(LAYOUT, **change).layout_id != LAYOUT.layout_id


def test_equal_layouts_are_compatible() -> None:
    check_pair(LAYOUT, replace(LAYOUT))
    assert replace(LAYOUT).layout_id == LAYOUT.layout_id
    assert len(LAYOUT.layout_id) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 32},
        {"block_size": 24},
        {"block_size": 1},
        {"order": PAIRED_ORDER},
        {"tp_size": 3, "num_kv_heads": 1},
        {"block_size": 64, "order": PAIRED_ORDER, "tp_size": 3, "num_kv_heads": 1},
    ],
)
def test_what_changes_no_bit_is_always_allowed(change: dict[str, Any]) -> None:
    other = replace(LAYOUT, **change)
    assert can_pair(LAYOUT, other) is None
    assert can_pair(other, LAYOUT) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_layers": 29}, "num_layers is 30 and 29"),
        ({"num_kv_heads": 4}, "total_kv_heads is 3 and 4"),
        ({"tp_size": 3}, "total_kv_heads is 3 and 9"),
        ({"head_dim": 128}, "head_dim is 64 and 128"),
    ],
)
def test_another_models_blocks_are_refused_with_both_layouts(change: dict[str, Any], why: str) -> None:
    other = replace(LAYOUT, **change)
    for convert in (False, True):
        with pytest.raises(IncompatibleError, match=why) as caught:
            check_pair(LAYOUT, other, convert_dtype=convert)
        assert str(LAYOUT) in caught.value.message
        assert str(other) in caught.value.message
        assert caught.value.metadata["target_layout"] == str(other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3", "int8"])
def test_another_dtype_needs_the_flag(dtype: str) -> None:
    other = replace(LAYOUT, dtype=dtype, block_size=32)
    for pair in ((LAYOUT, other), (other, LAYOUT)):
        assert "--convert-kv-dtype" in (can_pair(*pair) or "")
        assert can_pair(*pair, convert_dtype=True) is None


@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 32), (24, 16)])
def test_quantized_blocks_of_other_sizes_need_no_flag(sizes: tuple[int, int]) -> None:
    """Scales belong to positions, so they go along."""
    source, target = (replace(LAYOUT, dtype="int8", block_size=size) for size in sizes)
    assert can_pair(source, target) is None


@pytest.mark.parametrize(
    ("size", "step", "blocks"), [(16, 16, 1), (32, 16, 1), (16, 32, 2), (16, 24, 2), (24, 16, 2), (5, 7, 3), (7, 1, 1)]
)
def test_most_source_blocks_of_one_target_block(size: int, step: int, blocks: int) -> None:
    source, target = replace(LAYOUT, block_size=size), replace(LAYOUT, block_size=step)
    assert staged_bytes(source, target) == blocks * source.block_bytes
    most = max(-(-(at + step) // size) - at // size for at in range(0, size * step, step))
    assert most == blocks


def test_blocks_that_cannot_be_staged_are_refused() -> None:
    small = KvLayout(block_size=1, dtype="float32", num_layers=100, num_kv_heads=8, head_dim=128)
    large = replace(small, block_size=256)
    assert staged_bytes(small, large) > STAGING_SLOT_BYTES
    assert "at once" in (can_pair(small, large) or "")
    assert can_pair(large, large) is None


def test_numerics_may_differ_in_the_kv_dtype_alone() -> None:
    first, second, third = "v1/exact/kv-float32/x", "v1/exact/kv-bfloat16/x", "v1/int8/kv-bfloat16/x"
    assert same_numerics(first, first)
    assert not same_numerics(first, second)
    assert same_numerics(first, second, convert_dtype=True)
    assert not same_numerics(first, third, convert_dtype=True)


def test_numerics_of_several_ranks_are_paired_where_rounding_is_allowed() -> None:
    one, three = "v1/exact/kv-float32/x", "v1/exact/kv-float32/x/tp-3"
    assert not same_numerics(one, three)
    assert same_numerics(one, three, convert_dtype=True)


def test_attention_by_another_package_is_paired_where_rounding_is_allowed() -> None:
    """Codes of 8 bits are read by fewer packages than what they are made of."""
    wide = "v1/native/kv-bfloat16/triton-3-cuda90/attention-flashinfer-0.6/t"
    narrow = "v1/native/kv-int8/triton-3-cuda90/attention-triton/t"
    assert not same_numerics(wide, narrow)
    assert same_numerics(wide, narrow, convert_dtype=True)
    assert not same_numerics(wide, narrow.replace("native", "fp8"), convert_dtype=True)


@pytest.mark.parametrize("name", ["block_size", "num_layers", "num_kv_heads", "head_dim", "tp_size"])
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


@pytest.mark.parametrize("change", [{"block_size": 15}, {"head_dim": 63}, {"dtype": "float32"}])
def test_pairs_need_even_sizes_and_two_bytes_at_most(change: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="pairs"):
        replace(LAYOUT, order=PAIRED_ORDER, **change)


def test_wire_fields_must_agree() -> None:
    assert LAYOUT.check_wire(LAYOUT.block_bytes, LAYOUT.layout_id) is LAYOUT
    with pytest.raises(IncompatibleError):
        LAYOUT.check_wire(LAYOUT.block_bytes + 1, LAYOUT.layout_id)
    with pytest.raises(IncompatibleError):
        LAYOUT.check_wire(LAYOUT.block_bytes, "")
