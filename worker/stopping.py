"""Which ids end an output, and which are banned for now. Torch-free."""

from __future__ import annotations

from tandem.record import OutputState, Record


def stop_ids(record: Record, eos_token_ids: tuple[int, ...]) -> frozenset[int]:
    """The ids that end an output of `record`."""
    eos = () if record.stopping.ignore_eos else eos_token_ids
    return frozenset((*record.stopping.stop_token_ids, *eos))


def suppressed(record: Record, output: OutputState, stops: frozenset[int]) -> tuple[int, ...]:
    """Ids that must not be drawn next: everything that would stop the output before `min_tokens`."""
    return tuple(sorted(stops)) if len(output.token_ids) < record.stopping.min_tokens else ()
