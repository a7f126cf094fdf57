"""The decode scheduler: who takes part in the next step, with which blocks. Torch-free; one thread owns it.

A step is `schedule() -> Batch | None`, the runner, `update(batch, output) -> events` (or `fail_step`). Between steps
come the commands: `admit`, `commit`, `start_local`, `force`, `finish`, `cancel`, `release`. Requests are kept in order
of age.

- Everything is computed the same way: a chain computes tokens that it knows (prompt, forced or drawn ones) up to its
  end, and at its end draws the next. So a local prefill, a recompute after a preemption and a migrated record need no
  code of their own, and tokens known already are never drawn again.
- Sequences that decode are aboard every step; chunks of prefill share a budget beside them (`mixed_prefill_tokens`).
- A chain that needs a block when there is none preempts the youngest younger request, and else waits for the next
  step. So the oldest is never preempted, can have everything but what is being received into, and finishes.
- Drafts (`speculation`) ride behind the last token of a chain where blocks are free for them. Nobody is preempted for a
  draft, and after the step everything is as if only the tokens that were kept had ever been there.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode_service import admission, adoption
from decode_service.ahead import AheadPart, can_be_followed, following_parts
from decode_service.config import SchedulerConfig
from decode_service.events import Admission, Counters, Ended, Event, Load
from decode_service.memory import Memory
from decode_service.parts import Part
from decode_service.request import Output, Request, State
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.proposer import Ask, OutputKey
from decode_service.speculation.speculator import Speculator, Want
from engine.batch import Batch, SampledToken, Slice, StepOutput
from engine.block_pool import BlockPool
from engine.prefix import prefix_root
from tandem.errors import InternalError, InvalidRequestError, NotFoundError, TandemError
from tandem.record import FinishReason, Record, TokenDelta
from worker.events import Failed
from worker.stopping import stop_ids


class Scheduler:
    """Continuous batching over one block pool."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, speculator: Speculator | None = None) -> None:
        """The pool and the speculator must be the scheduler's alone; None: no drafts."""
        self.config = config
        self.speculator = speculator or Speculator(SpeculationConfig(), config.vocab_size)
        self.pool = pool
        self.counters = Counters()
        self.steps = 0
        """Steps launched since the start."""
        self._requests: dict[str, Request] = {}
        self._plan: list[Part] = []
        self._ahead: list[AheadPart] = []
        self._next_order = 0
        self._memory = Memory(config, pool, self._requests, self.counters, self._forget)

    # -- commands ----------------------------------------------------------------------------------

    def admit(self, key: str, record: Record, *, local: bool) -> tuple[Admission, list[Event]]:
        """Reserve blocks for a request; `key` is new for each admission. Local ones start at the next step.

        The record becomes the scheduler's. Raises InvalidRequestError, IncompatibleError or OverloadedError, and then
        has changed nothing.
        """
        if key in self._requests:
            raise InvalidRequestError(f"request {key!r} is aboard already", field="record.request_id")
        admission.check_record(record, self.config)
        admission.check_fits_at_all(record, self.config, self.pool)
        admission.check_room_for_sequences(record, self.config, self._requests.values())
        request = self._new_request(key, record)
        adoption.check_ends(request, self.config)
        if not request.live:
            return Admission(key, 0, 0, 0, []), [*adoption.news(request), Ended(key, 0)]
        tokens = 1 + self.speculator.most
        slots = admission.step_slots(self._requests.values(), tokens, self.pool.block_size)
        cached = self._memory.reserve(request, slots=slots, receiving=not local)
        request.state = State.RUNNING if local else State.RECEIVING
        self._requests[key] = request
        self._next_order += 1
        self.counters.prompt_tokens += len(record.prompt)
        self.counters.cached_tokens += cached
        assert request.trunk is not None
        blocks = request.trunk.table.blocks[cached // self.pool.block_size :]
        return Admission(key, cached, cached, request.needed_end, list(blocks)), adoption.news(request)

    def commit(self, key: str, record: Record, token_end: int) -> list[Event]:
        """The transfer is over: tokens below `token_end` have their KV, `record` brings the first token of each output.

        Raises NotFoundError when the request has gone.
        """
        request = self._receiving(key)
        trunk, received = request.trunk, min(token_end, request.needed_end)
        assert trunk is not None
        adoption.adopt_record(request, record, self.config)
        if any(not output.state.token_ids for output in request.live):
            # Somebody draws from the prompt's last row, so it is computed here.
            received = min(received, len(request.record.prompt) - 1)
        elif len(request.live) == 1:
            received = min(received, request.shared_end - 1)
        trunk.computed = max(trunk.computed, received)
        self._start(request)
        return self._settle(request)

    def start_local(self, key: str, emitted: Sequence[TokenDelta] = ()) -> list[Event]:
        """Nothing more will be received: compute what is missing here. `emitted` tokens are forced.

        Only after the copies in flight are over. Raises NotFoundError, InvalidRequestError.
        """
        request = self._receiving(key)
        adoption.force(request, emitted, self.config)
        self._start(request)
        return self._settle(request)

    def force(self, key: str, emitted: Sequence[TokenDelta]) -> None:
        """Another attempt will send: tokens that the client has are kept, and never drawn again.

        Raises as `start_local`.
        """
        adoption.force(self._receiving(key), emitted, self.config)

    def finish(self, key: str, index: int) -> list[Event]:
        """The gateway ends one output (a stop string). Does nothing for one that has ended; unknown keys too."""
        request = self._requests.get(key)
        if request is None or request.state is State.RELEASING:
            return []
        if not 0 <= index < len(request.outputs):
            raise InvalidRequestError(f"no output {index}", field="finish.index")
        output = request.outputs[index]
        if not output.live:
            return []
        output.state.finish_reason = FinishReason.STOP
        return self._settle(request)

    def cancel(self, key: str, posted_step: int | None = None) -> bool:
        """End a request: it takes part in no further step. True when its blocks are held until `release`.

        `posted_step` is `steps` when the cancel was posted, to count what it cost. Unknown keys are ignored.
        """
        request = self._requests.get(key)
        if request is None or request.state is State.RELEASING:
            return request is not None
        self.counters.count_cancel(request.last_step, self.steps if posted_step is None else posted_step)
        if request.state is State.RECEIVING:
            request.state = State.RELEASING
            return True
        self._memory.drop(request)
        return False

    def release(self, key: str) -> None:
        """No copy into the blocks of a cancelled request is in flight any more: free them."""
        request = self._requests.get(key)
        if request is not None and request.state is State.RELEASING:
            self._memory.drop(request)

    # -- a step ------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None when there is nothing to compute now."""
        self._memory.resume()
        copies: list[tuple[int, int]] = []
        self._plan = []
        budget = self._prefill_budget()
        for request in self._running():
            if request.state is not State.RUNNING:
                continue  # preempted by an older one a moment ago
            for share in request.shares():
                count = 1 if share.pending == 1 else min(share.pending, budget)
                if count == 0:
                    continue
                needed = self._memory.grow(request, share.chain, share.chain.computed + count)
                if needed is None:
                    continue
                copies.extend(needed)
                if share.pending > 1:
                    budget -= count
                self._plan.append(Part(request, share, count))
        if not self._plan:
            return None
        self._draft(self._plan)
        self.steps += 1
        for part in self._plan:
            part.request.last_step = self.steps
        return Batch([part.slice() for part in self._plan], copies)

    def schedule_ahead(self) -> Batch | None:
        """The step behind the one that runs, whose tokens it takes on the device; it may be launched at once.

        None when that can't be said before the running step is over: see `decode_service.ahead`. `update` takes in
        both, one after the other.
        """
        requests = [part.request for part in self._plan if part.request.key in self._requests]
        busy = [request for request in self._requests.values() if request.state in (State.RUNNING, State.WAITING)]
        if self._ahead or self.speculator.most or requests != busy or not can_be_followed(self._plan):
            return None
        parts = following_parts(self._plan, self.config)
        parts = [part for part in parts if part.request.key in self._requests]
        if not parts:
            return None
        self._ahead = parts
        self._memory.hold(part.request.key for part in (*self._plan, *parts))
        self.steps += 1
        for part in parts:
            part.request.last_step = self.steps
        return Batch([part.slice() for part in parts])

    def forget_ahead(self) -> None:
        """The step that `schedule_ahead` gave was not launched."""
        self._ahead = []

    def update(self, batch: Batch, output: StepOutput) -> list[Event]:
        """Take in what a step drew. Returns what happened, each request's events in order."""
        events: list[Event] = []
        plan, self._plan, self._ahead = self._plan, [*self._ahead], []
        self._memory.hold(part.request.key for part in self._plan)
        if len(output.samples) != len(batch.slices) or len(plan) != len(batch.slices):
            raise InternalError(f"{len(output.samples)} answers for {len(batch.slices)} slices")
        for number, (part, slice_) in enumerate(zip(plan, batch.slices, strict=True)):
            request = part.request
            if request.key not in self._requests:
                continue  # failed by an earlier slice of this step
            if number in output.errors:
                self._memory.drop(request)
                events.append(Failed(request.key, output.errors[number]))
                continue
            self._take(part, slice_, output.samples[number])
            events += self._settle(request)
        return events

    def timed(self, batch: Batch, seconds: float) -> None:
        """How long the step took that `update` was called for last."""
        decoding = sum(part.num_known == 1 for part in batch.slices)
        drafts = sum(part.drafts for part in batch.slices)
        self.speculator.timed(decoding, drafts, batch.num_tokens - decoding - drafts, seconds)

    def fail_step(self, error: TandemError) -> list[Event]:
        """The steps that were scheduled and not taken in failed: those aboard fail, the others go on."""
        plan = self._finish_steps()
        events: list[Event] = []
        for request in dict.fromkeys(part.request for part in plan):
            if request.key in self._requests:
                self._memory.drop(request)
                events.append(Failed(request.key, error))
        return events

    def fail_all(self, error: TandemError) -> list[Event]:
        """The scheduler's own books are in doubt: everybody fails. Blocks being received into wait for `release`."""
        self._finish_steps()
        events: list[Event] = []
        for request in list(self._requests.values()):
            if request.state is State.RELEASING:
                continue
            events.append(Failed(request.key, error))
            if request.state is State.RECEIVING:
                request.state = State.RELEASING
            else:
                self._memory.drop(request)
        return events

    def _finish_steps(self) -> list[Part]:
        """No step runs any more; what was aboard."""
        plan, self._plan, self._ahead = [*self._plan, *self._ahead], [], []
        self._memory.hold(())
        return plan

    # -- what others may look at -------------------------------------------------------------------

    def load(self) -> Load:
        """How busy it is now."""
        requests = self._requests.values()
        running = [request for request in requests if request.state is State.RUNNING]
        waiting = [request for request in requests if request.state is State.WAITING]
        return Load(
            running_sequences=sum(len(request.live) for request in running),
            waiting_requests=len(waiting),
            receiving_requests=sum(request.state is State.RECEIVING for request in requests),
            free_blocks=self.pool.num_free,
            total_blocks=self.pool.num_blocks,
            queued_prefill_tokens=sum(request.pending_prompt() for request in running)
            + sum(request.total_tokens for request in waiting),
        )

    def __contains__(self, key: str) -> bool:
        """True while the scheduler holds anything for the request."""
        return key in self._requests

    def __len__(self) -> int:
        """Requests that hold anything."""
        return len(self._requests)

    def keys(self) -> list[str]:
        """Requests that hold anything, the oldest first."""
        return list(self._requests)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the pool's references are exactly those of the requests.

        For tests and idle times.
        """
        holding = (*self._requests.values(), *self._memory.leaving)
        self.pool.check_integrity(chain.table.held for request in holding for chain in request.chains())

    # -- inside ------------------------------------------------------------------------------------

    def _new_request(self, key: str, record: Record) -> Request:
        config = self.config
        outputs = [
            Output(index, state, streamed=len(state.token_ids), announced=state.finish_reason is not None)
            for index, state in enumerate(record.outputs)
        ]
        stops = stop_ids(record, config.eos_token_ids)
        root = prefix_root(record.tenant, record.cache_scope, config.model_id, config.layout_id, config.numerics_id)
        return Request(key, record, self._next_order, State.WAITING, stops, root, outputs)

    def _receiving(self, key: str) -> Request:
        request = self._requests.get(key)
        if request is None or request.state is not State.RECEIVING:
            raise NotFoundError(f"request {key!r} is not waiting for a transfer", reason="LEASE_NOT_FOUND")
        return request

    def _running(self) -> list[Request]:
        return [request for request in self._requests.values() if request.state is State.RUNNING]

    def _start(self, request: Request) -> None:
        """From receiving to running. What was received may be shared from now on."""
        assert request.trunk is not None
        request.state = State.RUNNING
        request.received_blocks = 0
        self._memory.register(request, request.trunk, None)

    def _prefill_budget(self) -> int:
        """Prompt tokens that this step may compute: few when somebody decodes, so that no running stream stalls."""
        decoding = any(share.pending == 1 for request in self._running() for share in request.shares())
        limit = self.config.max_step_tokens
        return min(limit, self.config.mixed_prefill_tokens) if decoding else limit

    def _draft(self, plan: list[Part]) -> None:
        """Drafts for the outputs that decode, as far as they pay, and the step has rows and the pool has blocks for
        them: what a step takes is measured with `max_step_tokens` rows.
        """
        wants: list[tuple[Part, Want]] = []
        for part in plan:
            most = self.speculator.limit(part.request.record.speculation)
            limit = min(most, part.draft_limit(self.config)) if most else 0
            if limit > 0 and self.speculator.wants(OutputKey(part.request.key, part.drawing[0].index)):
                wants.append((part, self._want(part, limit)))
        if not wants:
            return
        decoding, rows = sum(part.count == 1 for part in plan), sum(part.count for part in plan)
        drafts = self.speculator.drafts([want for _, want in wants], decoding, rows)
        room = max(0, self.config.max_step_tokens - rows)
        room = room if self.config.max_drafts is None else min(room, self.config.max_drafts)
        for (part, _), draft in zip(wants, drafts, strict=True):
            chain, tokens = part.share.chain, draft[:room]
            if tokens and chain.table.extend(chain.computed + 1 + len(tokens)):
                part.drafts = tokens
                room -= len(tokens)

    @staticmethod
    def _want(part: Part, limit: int) -> Want:
        record, output = part.request.record, part.drawing[0]
        key = OutputKey(part.request.key, output.index)
        tokens, blocks = output.state.token_ids, part.share.chain.table.blocks
        ask = Ask(key, record.prompt, tokens, limit, record.sampling, record.cache_scope, blocks)
        return Want(ask, record.speculation)

    def _take(self, part: Part, slice_: Slice, drawn: list[SampledToken]) -> None:
        """One slice's share of `update`, but for the news."""
        drawing, owner, request = part.drawing, part.owner, part.request
        before = [len(output.state.token_ids) for output in drawing]
        self.counters.generated_tokens += part.take(slice_, drawn, self.config)
        part.share.chain.table.settle()
        self._memory.register(request, part.share.chain, owner)
        for output, start in zip(drawing, before, strict=True):
            key = OutputKey(request.key, output.index)
            output.accepted += self.speculator.saw(key, output.state.token_ids[start:], part.drafts)
            output.drafted += len(part.drafts)

    def _forget(self, request: Request) -> None:
        """The request has left."""
        self.speculator.forget([OutputKey(request.key, output.index) for output in request.outputs])

    def _settle(self, request: Request) -> list[Event]:
        """After tokens or ends came in: say so, split a trunk that is computed, end a request that is over."""
        events = adoption.news(request)
        live = request.live
        if not live:
            if request.state is State.RECEIVING:
                # Copies may be in flight: the blocks are freed by `release`, when the stream has ended.
                request.state = State.RELEASING
            else:
                self._memory.drop(request)
            return [*events, Ended(request.key, request.preemptions)]
        if len(live) > 1 and request.trunk is not None and request.trunk.computed == len(request.record.prompt):
            request.split()
        return events
