"""What a gateway decides about its requests and hears of them. See `world`, whose part this is."""

from __future__ import annotations

import asyncio
from typing import Any

from asks import Ask, Plan
from processes import LAYOUT, MODEL, Process
from stepping import Recorder
from wires import ServerContext

from tandem.record import OutputState, Record, SamplingParams, StopRules, TokenDelta
from tandem.service import wire
from tandem.service.status import code_of
from tandem.service.wire import layout_to_pb
from tandem.v1 import decode_pb2, prefill_pb2

REMOTE, LOCAL = decode_pb2.PREFILL_SOURCE_REMOTE, decode_pb2.PREFILL_SOURCE_LOCAL


class Gateway:
    """Decisions are events of their own; what comes from workers is heard in the event that says it."""

    plan: Plan
    recorder: Recorder
    asks: list[Ask]
    at: dict[str, Process]

    def fail(self, message: str) -> None:
        """See `World.fail`."""
        raise NotImplementedError

    # -- decides

    def _due(self, ask: Ask) -> list[str]:
        before = self.asks[: ask.number - 1]
        due = []
        if not ask.started and all(other.over for other in before):
            due.append("decode")
        if ask.prefill_due and not ask.over:
            due.append("prefill")
        due += [f"cancel-{call}" for call in ask.prefills if call in ask.unwanted]
        if ask.unsaid is not None and not ask.over:
            due.append("say-retarget")
        if ask.retry_due and not ask.over:
            due.append("retry")
        if ask.number == 1:
            waiting = ask.admitted is not None and not ask.over and not ask.retargeted
            if self.plan.retarget and waiting:
                due.append("retarget")
            if self.plan.cancel and ask.started and not ask.given_up:
                due.append("give-up")
        return due

    def _decide(self, ask: Ask, what: str) -> None:
        if not what.startswith(("cancel", "say")):
            self.recorder.write(ask.name, "prefill")
            self.recorder.write(ask.name, "decode")
        if what == "decode":
            self._open_decode(ask)
        elif what == "prefill":
            self._open_prefill(ask)
        elif what == "retarget":
            self._retarget(ask, self.plan.retarget)
        elif what == "say-retarget":
            message, ask.unsaid = ask.unsaid, None
            process, _, requests = ask.decode
            process.react(process.main, requests.put_nowait, message)
        elif what == "retry":
            self._retarget(ask, "local" if ask.retargeted else "P1")
        elif what == "give-up":
            self._give_up(ask)
        else:
            process, task = ask.prefills.pop(int(what.removeprefix("cancel-")))
            process.react(process.main, task.cancel)

    def _record(self, ask: Ask) -> Record:
        sampling, stopping = SamplingParams(seed=ask.number), StopRules(ask.max_tokens, ignore_eos=True)
        return Record(ask.name, MODEL, ask.prompt, sampling, stopping, [OutputState(ask.tokens())])

    def _open_decode(self, ask: Ask) -> None:
        process = self.at["D"]
        ask.started, ask.admitted, ask.attempt, ask.prefill_due, ask.streamed = True, None, 0, False, set()
        ask.record = self._record(ask)
        start = decode_pb2.DecodeStart(
            record=wire.record_to_pb(ask.record),
            source=REMOTE if ask.number == 1 else LOCAL,
            incarnation=process.name,
            attempt=0,
        )
        requests: asyncio.Queue[Any] = asyncio.Queue()
        requests.put_nowait(decode_pb2.DecodeRequest(start=start))

        async def received() -> Any:
            while True:
                yield await requests.get()

        def serve() -> None:
            context = ServerContext(lambda message: self._on_decode(ask, process, message))
            task = process.loop.create_task(process.servicer.Decode(received(), context))  # type: ignore[attr-defined]
            ask.decode = (process, task, requests)
            task.add_done_callback(lambda done: self._decode_ended(ask, process, done))

        process.react(process.main, serve)

    def _open_prefill(self, ask: Ask) -> None:
        process, decode = self.at[ask.sender], ask.decode[0]
        ask.prefill_due, admitted = False, ask.admitted
        call = ask.current = ask.calls
        ask.calls += 1
        target = prefill_pb2.TransferTarget(
            lease_id=admitted.lease_id,
            attempt=ask.attempt,
            address="D:1",
            incarnation=decode.name,
            needed_start=admitted.needed_start,
            needed_end=admitted.needed_end,
            layout=layout_to_pb(LAYOUT),
            transports=[self.plan.transport],
        )
        request = prefill_pb2.PrefillRequest(
            record=wire.record_to_pb(self._record(ask)), incarnation=process.name, target=target
        )

        def serve() -> None:
            context = ServerContext(lambda message: self._on_prefill(ask, call, message))
            task = process.loop.create_task(process.servicer.Prefill(request, context))  # type: ignore[attr-defined]
            ask.prefills[call] = (process, task)
            task.add_done_callback(lambda done: self._prefill_ended(ask, call, done))

        process.react(process.main, serve)

    def _retarget(self, ask: Ask, target: str) -> None:
        """The sender is taken for dead, rightly or not: nobody listens to it any more; it and D will be told so."""
        ask.retargeted, ask.retry_due = True, False
        ask.unwanted.add(ask.current)
        ask.current = -1
        ask.attempt += 1
        ask.sender = target
        ask.prefill_due = False
        emitted = [wire.delta_to_pb(TokenDelta(0, 0, ask.tokens()))] if ask.emitted else []
        source = LOCAL if target == "local" else REMOTE
        message = decode_pb2.DecodeRetarget(attempt=ask.attempt, source=source, emitted=emitted)
        ask.unsaid = decode_pb2.DecodeRequest(retarget=message)

    def _give_up(self, ask: Ask) -> None:
        ask.given_up = ask.over = True
        ask.unwanted.update(ask.prefills)
        process, task, _ = ask.decode
        if process.alive:
            process.react(process.main, task.cancel)

    def _lost_sender(self, ask: Ask, call: int) -> None:
        """A Prefill call failed: if it is the present one, another sender is needed, once; then D computes itself."""
        ask.prefills.pop(call, None)
        ask.retry_due = ask.retry_due or call == ask.current

    # -- hears

    def _on_decode(self, ask: Ask, process: Process, message: Any) -> None:
        self.recorder.write(ask.name, "decode")
        if ask.over or ask.decode is None or ask.decode[0] is not process or not process.alive:
            return
        kind = message.WhichOneof("event")
        if kind == "admitted":
            ask.admitted, ask.prefill_due = message.admitted, ask.number == 1
        elif kind == "tokens":
            for delta in message.tokens.deltas:
                self._emit(ask, delta, ask.streamed)
        elif kind == "retargeted":
            accepted = message.retargeted.status == decode_pb2.RETARGET_STATUS_ACCEPTED
            ask.prefill_due = accepted and ask.sender != "local" and message.retargeted.attempt == ask.attempt
        elif kind == "end":
            self._complete(ask)

    def _emit(self, ask: Ask, delta: Any, streamed: set[int] | None) -> None:
        for position, token in enumerate(delta.token_ids, delta.position):
            if streamed is not None:
                if position in streamed:
                    self.fail(f"{ask.name}: token {position} came twice on one stream")
                streamed.add(position)
            if ask.emitted.setdefault(position, token) != token:
                self.fail(f"{ask.name}: token {position} was {ask.emitted[position]} and is {token} now")

    def _complete(self, ask: Ask) -> None:
        ask.over = True
        ask.unwanted.update(ask.prefills)
        if sorted(ask.emitted) != list(range(ask.max_tokens)):
            self.fail(f"{ask.name} ended with the tokens {ask.emitted}")

    def _decode_ended(self, ask: Ask, process: Process, task: asyncio.Task[None]) -> None:
        self.recorder.write(ask.name, "decode")
        if ask.over or task.cancelled() or not process.alive or ask.decode[0] is not process:
            return
        error = task.exception()
        if error is not None and code_of(error).name == "RESOURCE_EXHAUSTED" and ask.number > 1:
            ask.over = True  # refused: there was no room yet
            return
        self.fail(f"{ask.name}: its Decode stream ended with {error!r}")

    def _on_prefill(self, ask: Ask, call: int, message: Any) -> None:
        self.recorder.write(ask.name, "prefill")
        if message.WhichOneof("event") == "first_tokens" and call == ask.current and not ask.over:
            for delta in message.first_tokens.deltas:
                self._emit(ask, delta, None)

    def _prefill_ended(self, ask: Ask, call: int, task: asyncio.Task[None]) -> None:
        self.recorder.write(ask.name, "prefill")
        error = None if task.cancelled() else task.exception()
        if call not in ask.prefills:
            return
        if error is None:
            ask.prefills.pop(call)
        elif code_of(error).name == "INTERNAL":
            self.fail(f"{ask.name}: its Prefill stream ended with {error!r}")
        else:
            self._lost_sender(ask, call)
