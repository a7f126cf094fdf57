"""How the KV blocks of a pool lie in memory, and which pools can be paired. Torch-free: gateways and workers share it.

A block holds [num_layers, 2, num_kv_heads, block_size, head_dim] elements of `dtype`, contiguous, keys before values.
A quantized dtype has scales, float32 [num_layers, 2, num_kv_heads, block_size], behind the elements (from the next
multiple of 4 bytes on): one for each position and head, so that a value is its code times its position's scale. They
are part of the block: whatever carries, checks or frees the block does so with its scales. `QUANTIZED` says how they
are found.

A worker with tensor parallelism has one pool a rank, all with one `KvLayout`: rank r holds the heads from
r * num_kv_heads on, and one block id means the same tokens in every rank's pool.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd

from tandem.errors import IncompatibleError, InvalidRequestError

DEFAULT_ORDER = "block,layer,kv,head,slot,dim"
PAIRED_ORDER = "block,layer,kv,head,pairs"
"""Keys [head_dim / 2, block_size, 2] and values [block_size / 2, head_dim, 2] in place of [block_size, head_dim];
scales stay where they are."""
ORDERS = (DEFAULT_ORDER, PAIRED_ORDER)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1, "int8": 1}
QUANTIZED = ("float8_e4m3", "int8")
"""With a scale for each position and head.

How a row of `head_dim` values is written, the same everywhere: its scale is its largest magnitude divided by 127
(int8) or 448 (float8_e4m3), in float32; 1 where that quotient is below the smallest normal number. Its codes are the
values divided by the scale, clamped to 127 or 448, rounded to nearest, ties to even. A row that holds an infinity or a
NaN gets NaN as its scale and zeros as its codes, so that it stays visible. A writer may use a scale of its own (a
checkpoint's); readers always take the one that stands in the block.
"""
STAGING_SLOT_BYTES = 64 << 20
"""What the reader has for the sender's blocks that one of its own is made of."""
KV_NUMERICS = "kv-"
"""Begins the part of a numerics id that names the KV dtype; the parts are joined by "/"."""
RANK_NUMERICS = "tp-"
"""Begins the part that says over how many ranks sums are taken, where that decides bits and is more than 1."""
ATTENTION_NUMERICS = "attention-"
"""Begins the part that names a GPU's attention: which one that is hangs on the KV dtype, too."""
_LIMIT = 1 << 20
_MAX_BLOCK_BYTES = 1 << 31


@dataclass(frozen=True)
class KvLayout:
    """One pool's layout.

    Raises InvalidRequestError for a number outside 1 to 2**20 (or a block over 2 GiB), IncompatibleError for a dtype
    or an order that this version doesn't know or that the rest doesn't allow.
    """

    block_size: int
    """Tokens a block."""
    dtype: str
    """A key of `DTYPE_BYTES`."""
    num_layers: int
    num_kv_heads: int
    """KV heads on this rank."""
    head_dim: int
    order: str = DEFAULT_ORDER
    """Axes, outermost first: one of `ORDERS`."""
    tp_size: int = 1
    """Ranks that share the model's KV heads, each with as many."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim", "tp_size"):
            value = getattr(self, name)
            if not 1 <= value <= _LIMIT:
                raise InvalidRequestError(f"{name} is {value}, allowed are 1 to {_LIMIT}", field=f"layout.{name}")
        if self.dtype not in DTYPE_BYTES:
            raise IncompatibleError(f"KV dtype {self.dtype!r} is unknown; known are {', '.join(DTYPE_BYTES)}")
        if self.order not in ORDERS:
            raise IncompatibleError(f"KV order {self.order!r} is unknown; known are {' and '.join(ORDERS)}")
        if self.order == PAIRED_ORDER and (self.block_size % 2 or self.head_dim % 2 or DTYPE_BYTES[self.dtype] > 2):
            raise IncompatibleError(f"KV order {self.order!r} needs even sizes and at most 2 bytes an element: {self}")
        if self.block_bytes > _MAX_BLOCK_BYTES:
            raise InvalidRequestError(f"a block of {self.block_bytes} bytes is over {_MAX_BLOCK_BYTES}", field="layout")

    @property
    def data_bytes(self) -> int:
        """Bytes of a block's elements: all layers, keys and values."""
        elements = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def scales_at(self) -> int:
        """Where the scales begin in a block, in bytes."""
        return -(-self.data_bytes // 4) * 4

    @property
    def block_bytes(self) -> int:
        """Bytes a block, scales included."""
        if not self.quantized:
            return self.data_bytes
        return self.scales_at + 4 * self.num_layers * 2 * self.num_kv_heads * self.block_size

    @property
    def quantized(self) -> bool:
        """True when the blocks have scales."""
        return self.dtype in QUANTIZED

    @property
    def total_kv_heads(self) -> int:
        """KV heads of the model, over all ranks."""
        return self.num_kv_heads * self.tp_size

    @cached_property
    def layout_id(self) -> str:
        """32 hex digits: the start of the SHA-256 of the fields."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:32]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens, the last perhaps in part."""
        return -(-tokens // self.block_size)

    def check_wire(self, block_bytes: int, layout_id: str) -> KvLayout:
        """Return self if a message's derived fields agree; raises IncompatibleError (another version's arithmetic)."""
        if (block_bytes, layout_id) != (self.block_bytes, self.layout_id):
            raise IncompatibleError(
                f"layout {self} has {self.block_bytes} bytes a block and id {self.layout_id} here, "
                f"{block_bytes} and {layout_id!r} at the peer"
            )
        return self

    def __str__(self) -> str:
        """One line for messages; `layout_id` digests it, so it holds every field."""
        return (
            f"[block_size={self.block_size} dtype={self.dtype} num_layers={self.num_layers} "
            f"num_kv_heads={self.num_kv_heads} head_dim={self.head_dim} order={self.order} tp_size={self.tp_size}]"
        )


def check_pair(prefill: KvLayout, decode: KvLayout, *, convert_dtype: bool = False) -> None:
    """Raise IncompatibleError when `can_pair` has a reason."""
    if (reason := can_pair(prefill, decode, convert_dtype=convert_dtype)) is not None:
        metadata = {"source_layout": str(prefill), "target_layout": str(decode)}
        raise IncompatibleError(reason, metadata=metadata)


@lru_cache(maxsize=1024)
def can_pair(prefill: KvLayout, decode: KvLayout, *, convert_dtype: bool = False) -> str | None:
    """None when blocks can go from the one to the other; else why not, with both layouts.

    Block sizes, orders and tensor-parallel degrees may differ: that changes no bit. `convert_dtype` (the decode
    worker's --convert-kv-dtype) allows what does.
    """
    why = _why_not(prefill, decode, convert_dtype)
    return f"KV layouts don't fit: {why}; prefill has {prefill}, decode {decode}" if why else None


def staged_bytes(source: KvLayout, target: KvLayout) -> int:
    """Bytes of the most source blocks that one target block is made of."""
    size, step = source.block_size, target.block_size
    most_before = size - gcd(size, step)  # tokens of the first source block that come before the target block
    return source.block_bytes * source.blocks_for(most_before + step)


def same_numerics(prefill: str, decode: str, *, convert_dtype: bool = False) -> bool:
    """True when KV that one numerics id names is as good as the other's; `convert_dtype`: in whatever KV dtype, by
    whatever attention of a GPU, and whatever the order of sums over ranks: all change what is rounded.
    """
    if prefill == decode or not convert_dtype:
        return prefill == decode
    return _but_for_rounding(prefill) == _but_for_rounding(decode)


def _but_for_rounding(numerics_id: str) -> list[str]:
    rounding = (KV_NUMERICS, RANK_NUMERICS, ATTENTION_NUMERICS)
    return [part for part in numerics_id.split("/") if not part.startswith(rounding)]


def _why_not(prefill: KvLayout, decode: KvLayout, convert_dtype: bool) -> str:
    """Empty when nothing is in the way."""
    for name in ("num_layers", "total_kv_heads", "head_dim"):
        theirs, ours = getattr(prefill, name), getattr(decode, name)
        if theirs != ours:
            return f"{name} is {theirs} and {ours}"
    if prefill.dtype != decode.dtype and not convert_dtype:
        return "dtypes differ, and the decode worker runs without --convert-kv-dtype"
    if prefill != decode and (needed := staged_bytes(prefill, decode)) > STAGING_SLOT_BYTES:
        return f"one decode block needs {needed} bytes of prefill blocks at once, more than {STAGING_SLOT_BYTES}"
    return ""
