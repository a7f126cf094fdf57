"""Checks of a record that every worker makes before the record comes aboard. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.errors import IncompatibleError, InvalidRequestError
from tandem.record import Record
from worker.limits import EngineLimits


def check_shape(record: Record, limits: EngineLimits) -> None:
    """Raises IncompatibleError for another model, InvalidRequestError without a prompt or with outputs unlike `n`."""
    if limits.model_id and record.model_id != limits.model_id:
        raise IncompatibleError(
            f"the record is for model {record.model_id!r}, this worker serves {limits.model_id!r}",
            reason="MODEL_MISMATCH",
        )
    if not record.prompt:
        raise InvalidRequestError("a record needs at least one prompt token", field="record.prompt_token_ids")
    if len(record.outputs) != record.sampling.n or record.sampling.n < 1:
        raise InvalidRequestError(f"{len(record.outputs)} outputs for n={record.sampling.n}", field="record.outputs")


def check_context(tokens: int, limits: EngineLimits) -> None:
    """Raises InvalidRequestError when `tokens` tokens leave no room for another."""
    if tokens >= limits.max_context:
        raise InvalidRequestError(
            f"{tokens} tokens leave no room in a context of {limits.max_context}", field="record.prompt_token_ids"
        )


def check_ids(record: Record, limits: EngineLimits) -> None:
    """Raises InvalidRequestError for a token of the prompt or of an output that is none."""
    check_tokens(record.prompt, limits, "record.prompt_token_ids")
    for output in record.outputs:
        check_tokens(output.token_ids, limits, "record.outputs")


def check_tokens(tokens: Sequence[int], limits: EngineLimits, field: str) -> None:
    """Raises InvalidRequestError for an id outside the vocabulary: it would take a whole step down."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < limits.vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < limits.vocab_size)
        raise InvalidRequestError(f"token id {wrong} is not in 0 .. {limits.vocab_size - 1}", field=field)
