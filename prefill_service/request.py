"""One request as the scheduler sees it. Torch-free.

Its life: WAITING -> PREFILLING (blocks for the whole prompt reserved) -> SENT (computed; blocks held for the transfer),
or FAILED from the first two. Whatever its state, its blocks go back only by `Scheduler.release`, and not before the
launched step that names them is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from engine.batch import SampleSpec
from engine.block_table import BlockTable
from tandem.record import Record
from worker.stopping import stop_ids, suppressed


class State(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    SENT = "sent"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Request:
    """Facts; the rest is derived."""

    key: str
    record: Record
    tokens: list[int]
    """What is prefilled: the prompt, and the output so far when there is one output only."""
    hashes: list[bytes]
    """Names of the full blocks of `tokens`; empty when the prefix cache is off."""
    rank: tuple[float, int]
    """Who runs first: lower."""
    table: BlockTable
    state: State = State.WAITING
    computed: int = 0
    """Tokens [0, computed) need no more computing."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    aboard: bool = False
    """A launched step names its blocks."""
    released: bool = False
    """Release came while aboard: free the blocks once the step is over."""
    last_step: int = 0
    """Number of the last step that named it; 0: none."""

    @property
    def remaining(self) -> int:
        """Tokens still to compute."""
        return len(self.tokens) - self.computed


def tokens_to_prefill(record: Record) -> list[int]:
    """The prompt and, with one output, its tokens so far. Several outputs share the prompt only."""
    if len(record.outputs) == 1:
        return [*record.prompt, *record.outputs[0].token_ids]
    return list(record.prompt)


def first_samples(record: Record, eos_token_ids: tuple[int, ...]) -> list[SampleSpec]:
    """One per output whose next token follows the prefilled tokens: the only output, or each without a token."""
    only, stops = len(record.outputs) == 1, stop_ids(record, eos_token_ids)
    return [
        SampleSpec(
            index=index,
            params=record.sampling,
            position=len(output.token_ids),
            prompt=record.prompt,
            output=output.token_ids,
            suppress=suppressed(record, len(output.token_ids), stops),
            logprobs=record.logprobs,
        )
        for index, output in enumerate(record.outputs)
        if output.finish_reason is None and (only or not output.token_ids)
    ]
