"""Which prompt tokens are computed next. Torch-free; owned by one thread.

The life of a request: `submit` (WAITING) -> `schedule` reserves blocks for its whole prompt (PREFILLING, Started) ->
each step computes a chunk (`update`: Computed) -> the last chunk draws the first tokens (Sampled, SENT) -> `release`,
at any moment. One step: `events, batch = schedule()`, run the batch, `update(batch, output)` or `fail_step(error)`.

Order: priority, then arrival. Waiting `aging_seconds` makes up for one step of priority, so that nothing starves: a
rank is the arrival shifted by the priority, and only finitely many later requests rank lower. A prompt starts only when
all its blocks are there, and who ranks behind one that can't start doesn't start either: no deadlock, and short prompts
don't keep a long one waiting.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence

from engine.batch import Batch, SampledToken, Slice, StepOutput
from engine.block_pool import BlockPool
from engine.block_table import BlockTable
from engine.prefix import block_hashes, prefix_root
from prefill_service.admission import check_fits_at_all, check_record
from prefill_service.config import MOST_PRIORITY, SchedulerConfig
from prefill_service.events import Admission, Computed, Counters, Event, Load, Sampled, Started
from prefill_service.request import Request, State, first_samples, tokens_to_prefill
from tandem.errors import InternalError, OverloadedError, TandemError
from tandem.record import Record, TokenDelta
from worker.events import Failed


class Scheduler:
    """Requests by key; the key is the caller's and names one RPC."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds, for aging."""
        self.config = config
        self.pool = pool
        self.counters = Counters()
        self.steps = 0
        """Steps launched since the start."""
        self._clock = clock
        self._arrivals = 0
        self._requests: dict[str, Request] = {}
        self._queue: list[Request] = []  # WAITING and PREFILLING, by rank
        self._launched: list[Request] = []  # parallel to the slices of the launched batch
        self._queued_tokens = 0

    def __len__(self) -> int:
        """Requests that are not released yet."""
        return len(self._requests)

    def submit(self, key: str, record: Record) -> Admission:
        """Put a request into the queue. The record is only read.

        Raises InvalidRequestError, IncompatibleError (wrong model), OverloadedError (queue full, or can never fit),
        and then has changed nothing.
        """
        if key in self._requests:
            raise InternalError(f"request {key} is here already")
        check_record(record, self.config)
        tokens = tokens_to_prefill(record)
        check_fits_at_all(len(tokens), self.pool.num_blocks, self.pool.block_size)
        waiting = sum(request.state is State.WAITING for request in self._queue)
        if waiting >= self.config.max_waiting:
            raise OverloadedError(f"{waiting} requests wait already", reason="QUEUE_FULL")
        request = Request(key, record, tokens, self._hashes(record, tokens), self._rank(record), BlockTable(self.pool))
        self._requests[key] = request
        insort(self._queue, request, key=lambda item: item.rank)
        self._queued_tokens += len(tokens)
        self.counters.prompt_tokens += len(tokens)
        cached = self.pool.peek(request.hashes) * self.pool.block_size
        return Admission(min(cached, len(tokens) - 1), waiting + 1)

    def _hashes(self, record: Record, tokens: Sequence[int]) -> list[bytes]:
        if not self.pool.prefix_cache:
            return []
        config = self.config
        root = prefix_root(record.tenant, record.cache_scope, config.model_id, config.layout_id, config.numerics_id)
        return block_hashes(root, tokens, self.pool.block_size)

    def _rank(self, record: Record) -> tuple[float, int]:
        self._arrivals += 1
        priority = max(-MOST_PRIORITY, min(MOST_PRIORITY, record.priority))
        return self._clock() + priority * self.config.aging_seconds, self._arrivals

    def schedule(self) -> tuple[list[Event], Batch | None]:
        """The next step, and who starts in it. None: nothing can be computed now."""
        if self._launched:
            raise InternalError("a step is under way")
        budget, may_start = self.config.max_step_tokens, self._has_room()
        events: list[Event] = []
        slices: list[Slice] = []
        copies: list[tuple[int, int]] = []
        for request in self._queue:
            if budget == 0:
                break
            if request.state is State.WAITING:
                may_start = may_start and self._start(request)
                if not may_start:
                    continue
                events.append(self._started(request))
                copies += request.copies
                request.copies = []
                may_start = self._has_room()
            part = self._slice(request, budget)
            budget -= len(part.token_ids)
            slices.append(part)
            self._launched.append(request)
        return events, self._launch(slices, copies)

    def _has_room(self) -> bool:
        """True when one more may prefill."""
        return sum(request.state is State.PREFILLING for request in self._queue) < self.config.max_sequences

    def _launch(self, slices: list[Slice], copies: list[tuple[int, int]]) -> Batch | None:
        if not slices:
            return None
        self.steps += 1
        for request in self._launched:
            request.aboard = True
            request.last_step = self.steps
        return Batch(slices, copies)

    def _slice(self, request: Request, budget: int) -> Slice:
        count = min(budget, request.remaining)
        last = count == request.remaining
        return Slice(
            request_id=request.key,
            token_ids=request.tokens[request.computed : request.computed + count],
            start=request.computed,
            block_table=request.table.blocks,
            samples=first_samples(request.record, self.config.eos_token_ids) if last else [],
        )

    def _start(self, request: Request) -> bool:
        """Reserve blocks for the whole prompt, cached ones first. False, nothing changed, when there are not enough."""
        matched = self.pool.match(request.hashes)
        if self._reserve(request, matched):
            return True
        if matched:
            # With the whole prompt cached, the last token needs a private copy of the last block. When there is no
            # block for it, the last block is computed anew: else a prompt as large as the pool would wait for ever.
            self.pool.release([matched.pop()])
            if self._reserve(request, matched):
                return True
        self.pool.release(matched)
        return False

    def _reserve(self, request: Request, matched: list[int]) -> bool:
        size, total = self.pool.block_size, len(request.tokens)
        cached = min(len(matched) * size, total - 1)
        copied = [block for block in matched[cached // size :] if self.pool.is_shared(block)]
        if not self.pool.can_allocate(-(-total // size) - len(matched) + len(copied)):
            return False
        if matched:
            request.table.adopt(matched)
        request.copies = request.table.ensure(total, start=cached)
        request.computed = cached
        request.state = State.PREFILLING
        return True

    def _started(self, request: Request) -> Started:
        self._queued_tokens -= request.computed
        self.counters.queried_tokens += len(request.hashes) * self.pool.block_size
        self.counters.cached_tokens += request.computed
        ready = request.computed // self.pool.block_size * self.pool.block_size
        return Started(request.key, request.computed, ready, tuple(request.table.blocks))

    def update(self, batch: Batch, output: StepOutput) -> list[Event]:
        """Take in what the step of `batch` computed and drew."""
        if len(self._launched) != len(batch.slices):
            raise InternalError("update of a batch that wasn't launched last")
        launched = self._settle()
        events: list[Event] = []
        for number, (request, part) in enumerate(zip(launched, batch.slices, strict=True)):
            if request.released:
                continue
            if error := output.errors.get(number):
                events.append(self._fail(request, error))
            else:
                events += self._advance(request, part, output.samples[number])
        return events

    def _settle(self) -> list[Request]:
        """The launched step is over: nothing names its blocks any more."""
        launched, self._launched = self._launched, []
        for request in launched:
            request.aboard = False
            request.table.settle()
            if request.released:
                request.table.free()
        return launched

    def _advance(self, request: Request, part: Slice, drawn: Sequence[SampledToken]) -> list[Event]:
        deltas = [
            TokenDelta(spec.index, spec.position, [token.token_id], [token.logprobs] if token.logprobs else [])
            for spec, token in zip(part.samples, drawn, strict=True)
        ]
        self._queued_tokens -= len(part.token_ids)
        request.computed = part.end
        request.table.register_full(request.hashes, request.computed)
        computed = Computed(request.key, request.computed)
        if request.remaining:
            return [computed]
        request.state = State.SENT
        self._queue.remove(request)
        self.counters.generated_tokens += len(deltas)
        return [computed, Sampled(request.key, deltas)]

    def fail_step(self, error: TandemError) -> list[Event]:
        """The launched step failed: those aboard fail, everybody else goes on."""
        return [self._fail(request, error) for request in self._settle() if not request.released]

    def fail_all(self, error: TandemError) -> list[Event]:
        """The scheduler itself failed: nobody who still needs a step may hang on it."""
        events = self.fail_step(error)
        return events + [self._fail(request, error) for request in list(self._queue)]

    def _fail(self, request: Request, error: TandemError) -> Failed:
        self._dequeue(request)
        request.state = State.FAILED
        return Failed(request.key, error)

    def _dequeue(self, request: Request) -> None:
        """Take a request that is not computed to its end out of the queue."""
        self._queue.remove(request)
        self._queued_tokens -= request.remaining

    def release(self, key: str, posted_step: int | None = None) -> None:
        """The request is over, however it ended: free its blocks, now or when the step that names them is over.

        An unknown key is ignored. `posted_step`: `steps` when it was asked for, to count what the request cost after.
        """
        request = self._requests.pop(key, None)
        if request is None:
            return
        if request.state in (State.WAITING, State.PREFILLING):
            self.counters.count_cancel(request.last_step, self.steps if posted_step is None else posted_step)
            self._dequeue(request)
        if request.aboard:
            request.released = True
        else:
            request.table.free()

    def load(self) -> Load:
        """A snapshot."""
        states = [request.state for request in self._requests.values()]
        return Load(
            running_requests=states.count(State.PREFILLING),
            waiting_requests=states.count(State.WAITING),
            sending_requests=states.count(State.SENT),
            free_blocks=self.pool.num_free,
            total_blocks=self.pool.num_blocks,
            queued_prefill_tokens=self._queued_tokens,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when the books are wrong: our own bug."""
        leaving = [request for request in self._launched if request.released]
        holders = [request.table.held for request in (*self._requests.values(), *leaving)]
        self.pool.check_integrity(holders)
        queued = [r for r in self._requests.values() if r.state in (State.WAITING, State.PREFILLING)]
        assert sorted(queued, key=lambda r: r.rank) == self._queue, "the queue and the requests' states differ"
        assert self._queued_tokens == sum(r.remaining for r in queued), "queued tokens are miscounted"
        assert all(not r.table.blocks for r in queued if r.state is State.WAITING), "a waiting request holds blocks"
