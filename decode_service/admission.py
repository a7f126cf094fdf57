"""Who may come aboard: checks of a record and the arithmetic of reservation. Torch-free.

A request is refused for good when it could never finish here (OverloadedError without a retry, InvalidRequestError),
and for now when its prompt, the tail of each output and one step's slots of everybody aboard don't fit.
"""

from __future__ import annotations

from collections.abc import Iterable

from decode_service.config import RECEIVING_SHARE, SchedulerConfig
from decode_service.request import Request, State, blocks_for, most_blocks
from decode_service.stopping import max_output_tokens
from engine.block_pool import BlockPool
from tandem.errors import InvalidRequestError, OverloadedError
from tandem.record import Record
from worker.admission import check_context, check_ids, check_shape


def check_record(record: Record, config: SchedulerConfig) -> None:
    """Raises InvalidRequestError, IncompatibleError or OverloadedError for a record that this engine can't run."""
    check_shape(record, config)
    check_context(len(record.prompt), config)
    if record.stopping.max_tokens < 1:
        raise InvalidRequestError("max_tokens must be at least 1", field="record.stopping.max_tokens")
    if record.sampling.n > config.max_sequences:
        raise OverloadedError(
            f"n={record.sampling.n} exceeds the {config.max_sequences} sequences of a step", retry_after=None
        )
    limit = max_output_tokens(record, config.max_context)
    if any(len(output.token_ids) > limit for output in record.outputs):
        raise InvalidRequestError(f"an output of the record has more than {limit} tokens", field="record.outputs")
    check_ids(record, config)


def check_fits_at_all(record: Record, config: SchedulerConfig, pool: BlockPool) -> None:
    """Raises OverloadedError (no retry helps) when even an empty pool could not take the request to its end."""
    limit = max_output_tokens(record, config.max_context)
    need = most_blocks(pool, len(record.prompt), record.sampling.n, limit)
    if need > pool.num_blocks:
        raise OverloadedError(
            f"{len(record.prompt)} prompt tokens and {record.sampling.n} x {limit} tokens need {need} KV blocks, "
            f"the pool has {pool.num_blocks}",
            retry_after=None,
            reason="EXCEEDS_POOL",
        )


def check_room_for_sequences(record: Record, config: SchedulerConfig, requests: Iterable[Request]) -> None:
    """Raises OverloadedError when the step's sequences are taken, or when somebody aboard waits for blocks."""
    aboard = 0
    for request in requests:
        if request.state is State.WAITING:
            raise OverloadedError(
                "a preempted request waits for KV blocks; nothing new is admitted", reason="KV_PRESSURE"
            )
        aboard += len(request.live)
    if aboard + record.sampling.n > config.max_sequences:
        raise OverloadedError(f"{aboard} of {config.max_sequences} sequences are taken", reason="MAX_SEQUENCES")


def step_slots(requests: Iterable[Request], tokens: int, block_size: int) -> int:
    """Blocks that the next step could want: those of `tokens` tokens for each live output of everybody running."""
    outputs = sum(len(request.live) for request in requests if request.state is State.RUNNING)
    return outputs * blocks_for(tokens, block_size)


def blocks_to_hold(request: Request, block_size: int) -> int:
    """Blocks that hold everything known of a request and the next token of each live output."""
    prompt = len(request.record.prompt)
    live = request.live
    if len(live) == 1:
        return blocks_for(prompt + len(live[0].state.token_ids) + 1, block_size)
    rest = prompt % block_size
    return prompt // block_size + sum(blocks_for(rest + len(output.state.token_ids) + 1, block_size) for output in live)


def check_receiving_cap(fresh: int, pool: BlockPool, requests: Iterable[Request]) -> None:
    """Raises OverloadedError when too much of the pool would wait for transfers. One request may always receive."""
    held = [request.received_blocks for request in requests if request.state in (State.RECEIVING, State.RELEASING)]
    if held and sum(held) + fresh > RECEIVING_SHARE * pool.num_blocks:
        raise OverloadedError(
            f"{sum(held)} of {pool.num_blocks} KV blocks are being received into already", reason="RECEIVING_CAP"
        )
