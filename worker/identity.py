"""What a worker is."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import StaleError
from tandem.kv_layout import KvLayout


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """For the info RPC and for checks. Fixed for the life of its process."""

    incarnation: str
    model_id: str
    model_name: str
    layout: KvLayout
    numerics_id: str
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    transports: tuple[str, ...]
    """By which it can send or receive, best first."""
    total_blocks: int
    max_sequences: int
    architecture: str = ""
    quantization: str = ""
    metrics_address: str = ""
    convert_kv_dtype: bool = False
    """Of a decode worker: it takes KV of another dtype and rounds it."""
    proposers: tuple[str, ...] = ()
    """Of a decode worker: who proposes drafts there."""
    host_id: str = ""
    """See `kv_transfer.registry.host_id`."""

    def check_incarnation(self, meant: str) -> None:
        """Raises StaleError for a message to an earlier life of this address."""
        if meant != self.incarnation:
            raise StaleError(
                f"meant for incarnation {meant[:64]!r}, this is {self.incarnation!r}", reason="STALE_INCARNATION"
            )
