"""Checks of a record before it may wait here. Torch-free."""

from __future__ import annotations

from prefill_service.config import SchedulerConfig
from prefill_service.request import tokens_to_prefill
from tandem.errors import InvalidRequestError, OverloadedError
from tandem.record import Record
from worker.admission import check_context, check_ids, check_shape


def check_record(record: Record, config: SchedulerConfig) -> None:
    """Raises InvalidRequestError or IncompatibleError for a record that this engine can't run."""
    check_shape(record, config)
    if all(output.finish_reason is not None for output in record.outputs):
        raise InvalidRequestError("every output of the record is finished", field="record.outputs")
    check_context(len(tokens_to_prefill(record)), config)
    check_ids(record, config)


def check_fits_at_all(tokens: int, num_blocks: int, block_size: int) -> None:
    """Raises OverloadedError (no retry helps) when even an empty pool could not hold the prompt."""
    need = -(-tokens // block_size)
    if need > num_blocks:
        raise OverloadedError(
            f"{tokens} tokens need {need} KV blocks, the pool has {num_blocks}",
            retry_after=None,
            reason="EXCEEDS_POOL",
        )
