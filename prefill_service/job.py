"""One Prefill call on the event loop: what the engine and the transfer tell about it, for the call's writer to send.

Life cycle: made by `PrefillWorker.open_job` -> `start` (in the engine's queue, transfer begun) -> events come -> the
writer takes news until `result` is there -> `PrefillWorker.close_job`. An error ends it, the first one: the writer
watches `failed`, even while a write is held up by the client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from prefill_service.events import Computed, Event, Sampled, Started
from prefill_service.metrics import StepMetrics
from prefill_service.sender import Transfer, TransferResult
from tandem.errors import InternalError, TandemError
from tandem.record import OutputState, Record, TokenDelta
from tandem.service.logging import get_logger
from worker.events import Failed

_log = get_logger(__name__)


class Job:
    """State of one call."""

    def __init__(self, key: str, record: Record, transfer: Transfer, metrics: StepMetrics | None = None) -> None:
        """`key` is the scheduler's."""
        self.key = key
        self.record = record
        self.news = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception that ends the call."""
        self.computed_tokens = 0
        self.deltas: list[TokenDelta] | None = None
        """First tokens, once they are there."""
        self.result: TransferResult | None = None
        self.prefill_seconds = 0.0
        """From the submission to the first tokens."""
        self._transfer = transfer
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None
        self._submitted = self._started = time.perf_counter()

    def start_transfer(self, time_left: float | None) -> None:
        """Open the way to the decode worker while the request waits for its turn."""
        self._task = asyncio.create_task(self._run_transfer(time_left))

    def on_event(self, event: Event) -> None:
        """News of the engine."""
        if isinstance(event, Started):
            self._on_started(event)
        elif isinstance(event, Computed):
            self.computed_tokens = event.token_end
            self._transfer.ready(event.token_end)
        elif isinstance(event, Sampled):
            self._on_sampled(event)
        elif isinstance(event, Failed):
            self.fail(event.error)

    def _on_started(self, event: Started) -> None:
        self._started = time.perf_counter()
        self.computed_tokens = event.cached_tokens
        self._transfer.reserve(event.blocks)
        self._transfer.ready(event.ready_tokens)
        if self._metrics is not None:
            self._metrics.started(len(self.record.prompt), self._started - self._submitted)

    def _on_sampled(self, event: Sampled) -> None:
        now = time.perf_counter()
        self.prefill_seconds = now - self._submitted
        if self._metrics is not None:
            self._metrics.prefilled(self.prefill_seconds, now - self._started)
        self.deltas = event.deltas
        self._transfer.finish(with_first_tokens(self.record, event.deltas))
        self.news.set()

    def fail(self, error: Exception) -> None:
        """End the call with an error; the first one stays."""
        if not self.failed.done():
            self.failed.set_exception(error)
            self.failed.exception()  # retrieved: a call that ended another way must not log it

    def close(self) -> None:
        """The call is over: give up what is under way."""
        if self._task is not None:
            if not self._task.done() and self._metrics is not None:
                self._metrics.expired()
            self._task.cancel()
        self.failed.cancel()

    async def closed(self) -> None:
        """Wait until nothing of the transfer runs any more."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run_transfer(self, time_left: float | None) -> None:
        try:
            self.result = await self._transfer.run(time_left)
        except TandemError as exc:
            self._transfer_failed(exc)
        except Exception as exc:
            _log.error("the transfer failed", exc_info=exc)
            self._transfer_failed(InternalError(f"the transfer failed: {exc}"))
        else:
            if self._metrics is not None:
                self._metrics.transferred(self.result.bytes_sent, self.result.seconds)
            self.news.set()

    def _transfer_failed(self, error: TandemError) -> None:
        if self._metrics is not None:
            self._metrics.transfer_failed()
        self.fail(error)


def with_first_tokens(record: Record, deltas: Sequence[TokenDelta]) -> Record:
    """A copy of `record` whose outputs have the tokens of `deltas`; the original is left as it is."""
    outputs = [OutputState(list(o.token_ids), list(o.logprobs), o.finish_reason) for o in record.outputs]
    for delta in deltas:
        outputs[delta.index].token_ids.extend(delta.token_ids)
        outputs[delta.index].logprobs.extend(delta.logprobs)
    return replace(record, outputs=outputs)
