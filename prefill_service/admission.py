"""Checks of a record before it may wait here. Torch-free."""

from __future__ import annotations

from prefill_service.config import SchedulerConfig
from prefill_service.request import tokens_to_prefill
from tandem.errors import IncompatibleError, InvalidRequestError, OverloadedError
from tandem.record import Record


def check_record(record: Record, config: SchedulerConfig) -> None:
    """Raises InvalidRequestError or IncompatibleError for a record that this engine can't run."""
    if config.model_id and record.model_id != config.model_id:
        raise IncompatibleError(
            f"the record is for model {record.model_id!r}, this worker serves {config.model_id!r}",
            reason="MODEL_MISMATCH",
        )
    if not record.prompt:
        raise InvalidRequestError("a record needs at least one prompt token", field="record.prompt_token_ids")
    if len(record.outputs) != record.sampling.n or record.sampling.n < 1:
        raise InvalidRequestError(f"{len(record.outputs)} outputs for n={record.sampling.n}", field="record.outputs")
    if all(output.finish_reason is not None for output in record.outputs):
        raise InvalidRequestError("every output of the record is finished", field="record.outputs")
    tokens = tokens_to_prefill(record)
    if len(tokens) >= config.max_context:
        raise InvalidRequestError(
            f"{len(tokens)} tokens leave no room in a context of {config.max_context}", field="record.prompt_token_ids"
        )
    for output in record.outputs:
        _check_tokens(output.token_ids, config, "record.outputs")
    _check_tokens(record.prompt, config, "record.prompt_token_ids")


def _check_tokens(tokens: list[int], config: SchedulerConfig, field: str) -> None:
    """An id outside the vocabulary would take a whole step down."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < config.vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < config.vocab_size)
        raise InvalidRequestError(f"token id {wrong} is not in 0 .. {config.vocab_size - 1}", field=field)


def check_fits_at_all(tokens: int, num_blocks: int, block_size: int) -> None:
    """Raises OverloadedError (no retry helps) when even an empty pool could not hold the prompt."""
    need = -(-tokens // block_size)
    if need > num_blocks:
        raise OverloadedError(
            f"{tokens} tokens need {need} KV blocks, the pool has {num_blocks}",
            retry_after=None,
            reason="EXCEEDS_POOL",
        )
