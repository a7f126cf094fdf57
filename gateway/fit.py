"""Which prefill and which decode worker can work together, from what they say of themselves.

Another model or other numerics: never. Another KV layout: where the blocks can be converted (`tandem.kv_layout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tandem.errors import TandemError
from tandem.kv_layout import KvLayout, can_pair, same_numerics
from tandem.service import wire
from tandem.v1 import types_pb2


@dataclass(frozen=True, eq=False)
class Traits:
    """What pairing looks at of one incarnation of a worker. Compared as an object: a pair is looked at once."""

    model_id: str
    numerics_id: str
    layout: KvLayout | None
    """None: this version can't read it."""
    problem: str
    """Why not."""
    convert_kv_dtype: bool


def traits_of(info: types_pb2.WorkerInfo) -> Traits:
    """Never raises: a worker whose layout is unknown here can still run alone."""
    layout, problem = None, ""
    try:
        layout = wire.layout_from_pb(info.layout)
    except TandemError as exc:
        problem = exc.message
    return Traits(info.model_id, info.numerics_id, layout, problem, info.convert_kv_dtype)


@lru_cache(maxsize=4096)
def mismatch(prefill: Traits, decode: Traits) -> str | None:
    """None when a prefill worker's blocks can go to a decode worker; else why not."""
    convert = decode.convert_kv_dtype
    if prefill.model_id != decode.model_id:
        return f"models differ: {prefill.model_id[:12]!r} and {decode.model_id[:12]!r}"
    if prefill.layout is None or decode.layout is None:
        return prefill.problem or decode.problem
    if (reason := can_pair(prefill.layout, decode.layout, convert_dtype=convert)) is not None:
        return reason
    if not same_numerics(prefill.numerics_id, decode.numerics_id, convert_dtype=convert):
        return f"numerics differ: {prefill.numerics_id!r} and {decode.numerics_id!r}"
    return None
