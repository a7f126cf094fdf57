"""When an output ends, as far as a worker decides it. Torch-free.

Stop strings are the gateway's (`Scheduler.finish`).
"""

from __future__ import annotations

from tandem.record import FinishReason, OutputState, Record


def max_output_tokens(record: Record, max_context: int) -> int:
    """Most tokens that one output may get."""
    return min(record.stopping.max_tokens, max_context - len(record.prompt))


def finish_reason(record: Record, output: OutputState, stops: frozenset[int], max_context: int) -> FinishReason | None:
    """Why `output` ends after its last token, or None when it goes on. A stop wins over a length."""
    count = len(output.token_ids)
    if count and count > record.stopping.min_tokens and output.token_ids[-1] in stops:
        return FinishReason.STOP
    return FinishReason.LENGTH if count >= max_output_tokens(record, max_context) else None
