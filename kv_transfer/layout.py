"""Which pools a transfer can go between. The layouts themselves are everybody's: `tandem.kv_layout`."""

from __future__ import annotations

from tandem.errors import IncompatibleError
from tandem.kv_layout import DEFAULT_ORDER, PAIRED_ORDER, KvLayout

__all__ = ["DEFAULT_ORDER", "PAIRED_ORDER", "KvLayout", "check_compatible"]


def check_compatible(source: KvLayout, target: KvLayout) -> None:
    """Raise IncompatibleError unless blocks can go from `source` to `target`: only equal layouts can."""
    if source != target:
        raise IncompatibleError(
            f"KV layouts differ, and only equal ones can be transferred: source {source}, target {target}",
            metadata={"source_layout": str(source), "target_layout": str(target)},
        )
