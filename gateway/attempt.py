"""A request aboard one decode worker, with as many prefill workers as it takes.

Life cycle: `Attempt(...)` -> `run()`: Decode is opened -> Admitted -> Prefill (or local) -> tokens from both, ordered
by `Outputs` -> all choices done, or `DecodeLost`. A prefill worker that fails before the commit is replaced
(`Retarget`). However `run` ends, both RPCs are closed and the credit is given back.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.calls import Call, DecodeCall, Inbox, Lease, PrefillCall
from gateway.config import Patience
from gateway.dispatch import Ticket
from gateway.ended import Ended, FeedLostError
from gateway.outputs import Outputs
from gateway.pairing import Need, Pairing
from gateway.plain import Counted, Delta, Finished, Job
from gateway.workers import Worker
from tandem.errors import (
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from tandem.record import FinishReason, TokenDelta
from tandem.service import wire
from tandem.service.logging import get_logger
from tandem.v1 import decode_pb2, prefill_pb2

_log = get_logger(__name__)

LAST_WORDS_SECONDS = 0.5
"""How long a stream may take to end behind its worker's feed, or to go on without it."""
REMOTE, LOCAL = decode_pb2.PREFILL_SOURCE_REMOTE, decode_pb2.PREFILL_SOURCE_LOCAL


@dataclass(frozen=True)
class _Fed:
    """What tokens of the feed leave to the request's own task: `choices` ended with them, or `error` with it all."""

    choices: list[int] = field(default_factory=list)
    error: Exception | None = None


class DecodeLost(Exception):  # noqa: N818  # not an error for the client
    """The decode worker ended the stream before the request was done."""

    def __init__(self, ended: Ended, worker: Worker, *, heard: bool, admitted: bool) -> None:
        """`heard`: it had answered, so the request was aboard. `admitted`: it had reserved blocks."""
        super().__init__(str(ended.error))
        self.ended, self.worker, self.heard, self.admitted = ended, worker, heard, admitted


class Attempt:
    """See the module's life cycle."""

    def __init__(
        self,
        job: Job,
        ticket: Ticket,
        outputs: Outputs,
        need: Need,
        *,
        pairing: Pairing,
        patience: Patience,
        counted: Counted,
        publish: Callable[[Delta | Finished], None],
        admitted: Callable[[Worker], None],
        prefill_died: Callable[[Worker], None],
    ) -> None:
        """`publish` gets events in order, `admitted` is called once D has taken the request."""
        self._job, self._ticket, self._outputs, self._need = job, ticket, outputs, need
        self._pairing, self._patience, self._counted = pairing, patience, counted
        self._publish, self._admitted, self._prefill_died = publish, admitted, prefill_died
        self._inbox: Inbox = asyncio.Queue()
        self._decode = DecodeCall(ticket.decode, self._inbox, self._on_feed, **self._call_options)
        self._context = contextvars.copy_context()
        self._overtook: list[Any] = []
        """Tokens on the feed that were faster than Admitted on the stream: they wait for it."""
        self._prefill: PrefillCall | None = None
        self._lease = Lease("", 1, 0, 0)
        self._aboard = False
        """D has reserved blocks. The lease doesn't tell: without a transfer there is none."""
        self._committed = False
        self._late = False
        """The stream has ended well, and the feed's last tokens are on their way."""
        self._bound: tuple[float, Ended] | None = None
        """When (the loop's clock) to stop waiting for what should come soon, and how the worker was lost then."""
        self._failed_prefills: set[str] = set()
        self._tries = 0

    @property
    def _call_options(self) -> dict[str, float]:
        return {"deadline": self._job.deadline, "silence": self._patience.heartbeat_timeout}

    async def run(self) -> None:
        """Returns when all choices are done. Raises DecodeLost, or a TandemError that is the client's to know."""
        try:
            self._outputs.restart()
            record = self._outputs.record(self._ticket.decode.info.model_id)
            await self._decode.start(record, REMOTE if self._ticket.prefill else LOCAL)
            over = False
            while not over:
                call, message = await self._next()
                over = await self._handle(call, message)
            self._decode.worker.served()
        finally:
            self._decode.close()
            if self._prefill is not None:
                self._prefill.close()
            self._ticket.release()

    async def _next(self) -> tuple[Call, Any]:
        """What comes next. Of a stream and a feed, when one has ended the other is not awaited for long."""
        if self._bound is None:
            return await self._inbox.get()
        limit, ended = self._bound
        try:
            async with asyncio.timeout_at(limit):
                return await self._inbox.get()
        except TimeoutError:
            raise self._lost(ended) from None

    def _lost(self, ended: Ended) -> DecodeLost:
        return DecodeLost(ended, self._decode.worker, heard=self._decode.heard, admitted=self._aboard)

    def _wait_at_most(self, seconds: float, ended: Ended) -> None:
        self._bound = asyncio.get_running_loop().time() + seconds, ended

    async def _handle(self, call: Call, message: Any) -> bool:
        """True when the request needs this worker no more."""
        if call is self._decode:
            if isinstance(message, _Fed):
                return await self._on_fed(message)
            if isinstance(message, Ended):
                lost_feed = isinstance(message.error, FeedLostError)
                return self._feed_ended(message) if lost_feed else self._decode_ended(message)
            return await self._on_decode(message)
        if call is self._prefill:
            if isinstance(message, Ended):
                await self._prefill_ended(message)
            else:
                return await self._on_prefill(message)
        return False

    async def _on_decode(self, response: decode_pb2.DecodeResponse) -> bool:
        kind = response.WhichOneof("event")
        if kind == "tokens":
            self._commit()
            return await self._take(response.tokens.deltas)
        if kind == "admitted":
            self._on_admitted(response.admitted)
        elif kind == "retargeted":
            self._on_retargeted(response.retargeted)
        elif kind == "finished":
            self._commit()
            finished = response.finished
            reason = wire.finish_reason_from_pb(finished.finish_reason) or FinishReason.STOP
            self._publish_all(self._outputs.finish(finished.index, reason, finished.num_tokens))
        elif kind == "end":
            self._counted.preemptions += response.end.preemptions
            return self._decode_ended(Ended())
        return False

    async def _take(self, deltas: Any) -> bool:
        """Publishes new tokens; ends at D what a stop string ended here. True when nothing is left to do."""
        return await self._finish(self._accept(deltas))

    def _accept(self, deltas: Any) -> list[int]:
        """Publishes new tokens; returns the choices that ended with them."""
        ended = []
        for delta in _plain(deltas):
            self._counted.draft_tokens += delta.drafted
            self._counted.accepted_draft_tokens += delta.accepted
            events = self._outputs.accept(delta)
            self._publish_all(events)
            if any(isinstance(event, Finished) for event in events):
                ended.append(delta.index)
        return ended

    async def _finish(self, choices: list[int]) -> bool:
        """Ends choices at D that D didn't end itself. True when nothing is left to do."""
        if self._outputs.done:
            return True
        for index in choices:
            if not self._outputs.choices[index].told:
                await self._decode.finish(index)
        return False

    def _on_feed(self, deltas: Any) -> None:
        """Called by the reader of the feed for each message: the way of nearly all tokens, so it wakes no task but the
        writer's unless there is more to do.
        """
        if not self._aboard:
            self._overtook.append(deltas)
            return
        try:
            choices = self._context.run(self._accept, deltas)
        except Exception as exc:  # it belongs to this request, not to the feed
            self._inbox.put_nowait((self._decode, _Fed(error=exc)))
            return
        if choices or not self._committed:
            self._inbox.put_nowait((self._decode, _Fed(choices)))

    async def _on_fed(self, fed: _Fed) -> bool:
        if fed.error is not None:
            raise fed.error
        self._commit()
        # A worker that ended everything itself says one thing more: End, with what is counted.
        return await self._finish(fed.choices) and (self._late or not self._outputs.ended_by_worker)

    def _publish_all(self, events: list[Delta | Finished]) -> None:
        for event in events:
            self._publish(event)

    def _decode_ended(self, ended: Ended) -> bool:
        """The end is good when every choice was done, even if the worker died right after."""
        if self._outputs.done:
            return True
        if ended.error is None and self._late:
            return False  # End, and then the end of the stream
        if ended.error is None and self._bound is None and self._decode.fed and self._outputs.complete_soon:
            self._late = True
            lost = Ended(FeedLostError("the last tokens did not come on the token feed"))
            self._wait_at_most(self._patience.heartbeat_timeout, lost)
            return False
        if ended.error is None and self._bound is not None:
            ended = self._bound[1]
        if ended.error is None:
            ended = Ended(InternalError("a decode worker ended a stream before its outputs"))
        raise self._lost(ended)

    def _feed_ended(self, ended: Ended) -> bool:
        """Tokens may be missing. Whether the worker itself is gone its stream tells, at about the same time."""
        if self._outputs.done:
            return True
        if self._late:
            raise self._lost(ended)
        self._wait_at_most(LAST_WORDS_SECONDS, ended)
        return False

    def _on_admitted(self, admitted: decode_pb2.DecodeAdmitted) -> None:
        self._aboard = True
        self._lease = Lease(admitted.lease_id, admitted.attempt, admitted.needed_start, admitted.needed_end)
        if self._ticket.prefill is not None:
            self._start_prefill(self._ticket.prefill)  # before the client is told: it waits for the first token
        self._admitted(self._decode.worker)
        self._count_cached(admitted.cached_tokens)
        overtook, self._overtook = self._overtook, []
        for deltas in overtook:
            self._on_feed(deltas)

    def _count_cached(self, tokens: int) -> None:
        # Once tokens were given out, a worker's hits are those of a recomputed record.
        if not self._outputs.started:
            self._counted.cached_tokens = min(len(self._job.prompt), max(self._counted.cached_tokens, tokens))

    def _start_prefill(self, worker: Worker) -> None:
        self._tries += 1
        self._prefill = PrefillCall(worker, self._inbox, **self._call_options)
        self._prefill.start(self._outputs.record(worker.info.model_id), self._decode.worker, self._lease)

    async def _on_prefill(self, response: prefill_pb2.PrefillResponse) -> bool:
        kind = response.WhichOneof("event")
        if kind == "accepted":
            self._count_cached(response.accepted.cached_tokens)
        elif kind == "first_tokens":
            return await self._take(response.first_tokens.deltas)
        elif kind == "done":
            self._commit()
        return False

    def _commit(self) -> None:
        """D owns the sequence; what becomes of the prefill worker matters no more."""
        if not self._committed:
            self._committed = True
            self._decode.worker.settled()
            if self._prefill is not None:
                self._prefill.worker.served()
            self._ticket.give_prefill()

    async def _prefill_ended(self, ended: Ended) -> None:
        """Without a commit another attempt is needed, on another worker or on D itself."""
        assert self._prefill is not None
        worker, heard = self._prefill.worker, self._prefill.heard
        self._prefill = None
        if self._committed:
            return
        if isinstance(ended.error, DeadlineError) and asyncio.get_running_loop().time() >= self._job.deadline:
            raise DeadlineError("the deadline passed while the prompt was computed")
        _log.warning("prefill failed", address=worker.address, error=str(ended.error), died=ended.died)
        self._ticket.give_prefill()
        self._judge(worker, ended, heard)
        await self._retarget()

    def _judge(self, worker: Worker, ended: Ended, heard: bool) -> None:
        """What the failure means for the worker, and for the request's own record of dead workers."""
        self._failed_prefills.add(worker.info.incarnation)
        error = ended.error
        if error is not None and error.metadata.get("side") == "target":
            return  # D's fault, or the way's: what it is worth D's own stream tells
        if isinstance(error, DrainingError):
            worker.draining = True
        elif isinstance(error, OverloadedError):
            worker.refused(asyncio.get_running_loop().time() + self._patience.refused_pause)
        elif isinstance(error, (UnavailableError, InternalError)) or ended.died:
            worker.fault(str(error), died=ended.died)
            if ended.died or not isinstance(error, InternalError):
                worker.failed()
        if ended.died and heard:
            self._prefill_died(worker)

    async def _retarget(self) -> None:
        loop = asyncio.get_running_loop()
        need = replace(self._need, avoid=self._need.avoid | self._failed_prefills)
        worker = None
        if self._tries <= self._patience.max_migrations:
            worker = self._pairing.prefill_for(self._decode.worker, need, loop.time())
        self._counted.migrations += 1
        self._ticket.prefill = None
        if worker is not None:
            self._ticket.take_prefill(worker)
        self._lease = replace(self._lease, attempt=self._lease.attempt + 1)
        await self._decode.retarget(self._lease.attempt, REMOTE if worker else LOCAL, self._outputs.emitted())

    def _on_retargeted(self, answer: decode_pb2.DecodeRetargeted) -> None:
        if answer.attempt != self._lease.attempt:
            return
        if answer.status == decode_pb2.RETARGET_STATUS_COMMITTED:
            self._commit()
        elif self._ticket.prefill is not None and not self._committed:
            self._lease = replace(self._lease, needed_start=answer.needed_start, needed_end=answer.needed_end)
            self._start_prefill(self._ticket.prefill)


def _plain(deltas: Any) -> list[TokenDelta]:
    try:
        return wire.deltas_from_pb(deltas)
    except InvalidRequestError as exc:  # the worker's fault, not the client's
        raise InternalError(f"a worker sent tokens that can't be: {exc}") from exc
