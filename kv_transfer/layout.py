"""How the KV blocks of a pool lie in memory, and whether two pools fit together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from tandem.errors import IncompatibleError, InvalidRequestError

DEFAULT_ORDER = "block,layer,kv,head,slot,dim"
PAIRED_ORDER = "block,layer,kv,head,pairs"
"""Keys [head_dim / 2, block_size, 2] and values [block_size / 2, head_dim, 2] in place of [block_size, head_dim]."""
ORDERS = (DEFAULT_ORDER, PAIRED_ORDER)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LIMIT = 1 << 20
_MAX_BLOCK_BYTES = 1 << 31


@dataclass(frozen=True)
class KvLayout:
    """A pool's layout: per block [num_layers, 2, num_kv_heads, block_size, head_dim] elements of `dtype`, contiguous.

    Raises InvalidRequestError for a number outside 1 to 2**20 (or a block over 2 GiB), IncompatibleError for a dtype
    or an order that this version doesn't know.
    """

    block_size: int
    """Tokens a block."""
    dtype: str
    """float32, bfloat16 or float16."""
    num_layers: int
    num_kv_heads: int
    """KV heads on this rank."""
    head_dim: int
    order: str = DEFAULT_ORDER
    """Axes, outermost first: one of `ORDERS`."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not 1 <= value <= _LIMIT:
                raise InvalidRequestError(f"{name} is {value}, allowed are 1 to {_LIMIT}", field=f"layout.{name}")
        if self.dtype not in DTYPE_BYTES:
            raise IncompatibleError(f"KV dtype {self.dtype!r} is unknown; known are {', '.join(DTYPE_BYTES)}")
        if self.order not in ORDERS:
            raise IncompatibleError(f"KV order {self.order!r} is unknown; known are {' and '.join(ORDERS)}")
        if self.block_bytes > _MAX_BLOCK_BYTES:
            raise InvalidRequestError(f"a block of {self.block_bytes} bytes is over {_MAX_BLOCK_BYTES}", field="layout")

    @property
    def block_bytes(self) -> int:
        """Bytes a block: all layers, keys and values."""
        elements = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

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
            f"num_kv_heads={self.num_kv_heads} head_dim={self.head_dim} order={self.order}]"
        )


def check_compatible(source: KvLayout, target: KvLayout) -> None:
    """Raise IncompatibleError unless blocks can go from `source` to `target`: only equal layouts can."""
    if source != target:
        raise IncompatibleError(
            f"KV layouts differ, and only equal ones can be transferred: source {source}, target {target}",
            metadata={"source_layout": str(source), "target_layout": str(target)},
        )
