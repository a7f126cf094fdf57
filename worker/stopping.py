"""Which ids end an output, and which are banned for now. Torch-free."""

from __future__ import annotations

from tandem.record import Record


def stop_ids(record: Record, eos_token_ids: tuple[int, ...]) -> frozenset[int]:
    """The ids that end an output of `record`."""
    eos = () if record.stopping.ignore_eos else eos_token_ids
    return frozenset((*record.stopping.stop_token_ids, *eos))


def suppressed(record: Record, count: int, stops: frozenset[int]) -> tuple[int, ...]:
    """Ids that must not be drawn after the first `count` tokens of an output: all that would stop it before
    `min_tokens`."""
    return tuple(sorted(stops)) if count < record.stopping.min_tokens else ()
