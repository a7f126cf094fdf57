"""A small world: prefill workers, one decode worker, a gateway's decisions about one or two requests, and one trouble.

The workers are real (`processes`), the gateway is what its requests do here: it opens Decode, then Prefill, and once
each, at any moment, whatever a `Plan` says: gives a request up, retargets it (a sender that hangs, and comes back),
loses a worker and starts it again. What the gateway hears it hears at once; what it says arrives when its event comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import watch
from asks import Ask, Plan
from explorer import Source, Violation
from processes import LAYOUT, MODEL, Decode, Prefill, Process
from stepping import Accesses
from wires import DOWN, UP, ServerContext, Wire

from engine.batch import SampleSpec
from kv_transfer.leases import Lease
from tandem.record import OutputState, Record, SamplingParams, StopRules, TokenDelta
from tandem.service import wire
from tandem.service.status import code_of
from tandem.service.wire import layout_to_pb
from tandem.v1 import decode_pb2, prefill_pb2

REMOTE, LOCAL = decode_pb2.PREFILL_SOURCE_REMOTE, decode_pb2.PREFILL_SOURCE_LOCAL


class World:
    """See the module. Raises Violation from whatever must not be."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.recorder = watch.recorder
        self.recorder.restart()
        self.lives: list[Process] = []
        self.at: dict[str, Process] = {}
        self.wires: dict[str, Wire] = {}
        self.drawn: set[tuple[str, tuple[int, ...], int]] = set()
        self.commits: dict[str, int] = {}
        """Lease to the attempt that committed."""
        self.superseded: dict[str, int] = {}
        """Lease to the least attempt that may commit."""
        self.committed: list[Lease] = []
        self.broken = ""
        self.trouble_due = bool(plan.restart)
        self.busy = ["start", "end"] if plan.busy else []
        for number in range(1, plan.senders + 1):
            self._live(f"P{number}")
        self._live("D")
        self.asks = [
            Ask(n, [10 * n + i for i in range(length)], plan.max_tokens) for n, length in enumerate(plan.prompts, 1)
        ]

    def _live(self, address: str) -> None:
        """A new life at an address."""
        salt = len(self.lives) + 1
        name = f"{address}.{sum(process.address == address for process in self.lives) + 1}"
        common: dict[str, Any] = {"transport": self.plan.transport, "salt": salt, "drawn": self._on_drawn}
        process: Process
        if address == "D":
            process = Decode(name, address, self.recorder, blocks=self.plan.decode_blocks, **common)
        else:
            common["connect"] = self._connect
            process = Prefill(name, address, self.recorder, blocks=self.plan.prefill_blocks, **common)
            process.loop.instant = not self.plan.sender_threads
        self.lives.append(process)
        self.at[address] = process

    def _connect(self, client: Process, address: str) -> Wire:
        name = f"{client.name}-{sum(w.client is client for w in self.wires.values())}"
        self.wires[name] = Wire(name, client, self.at[address.partition(":")[0]])
        return self.wires[name]

    # -- what the explorer sees

    def enabled(self) -> list[Source]:
        """The workers first, then the gateway, then trouble."""
        found: list[Source] = []
        for process in self.lives:
            found += process.enabled()
        found += [("wire", w.name, way) for w in self.wires.values() for way in (DOWN, UP) if w.waiting(way)]
        for ask in self.asks:
            found += [(ask.name, what) for what in self._due(ask)]
        if self.trouble_due:
            found.append(("restart", self.plan.restart))
        if self.busy == ["start", "end"] and self.asks[0].calls and not self.asks[0].prefills:
            found.append(("other prompt", "start"))
        return found or [("other prompt", "end")] * (self.busy == ["end"])

    def run(self, source: Source) -> Accesses:
        """One event."""
        accesses = self.recorder.begin()
        watch.world = self
        kind = source[0]
        if kind == "restart":
            self._restart(self.at[self.plan.restart])
        elif kind == "other prompt":
            self._busy(self.at["P1"], self.busy.pop(0))
        elif kind == "wire":
            self.wires[source[1]].deliver(source[2])  # type: ignore[index,arg-type]
        elif isinstance(kind, str) and kind.startswith("r"):
            self._decide(self.asks[int(kind[1:]) - 1], source[1])  # type: ignore[arg-type]
        else:
            next(process for process in self.lives if process.name == kind).run(source)
        watch.check_committed()
        if self.broken:
            raise Violation(self.broken)
        return accesses

    def fail(self, message: str) -> None:
        """What was seen must not be. It is raised by `run`: whoever saw it may be called by code that catches it."""
        self.broken = self.broken or message

    def check_end(self) -> None:
        """All requests have an end, and nothing is left of them."""
        for ask in self.asks:
            if not ask.over:
                raise Violation(f"{ask.name} hangs: nobody does anything for it any more")
        for process in self.lives:
            process.check_empty()

    def close(self) -> None:
        for process in self.lives:
            process.loop.end()
            if isinstance(process, Prefill):
                process.source.close()

    # -- the gateway

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

    def _busy(self, process: Process, what: str) -> None:
        """The other prompt is a request of the engine alone, and has the blocks that it gets until its end."""
        record = Record("other", MODEL, [90, 91], SamplingParams(), StopRules(1), [OutputState()])
        engine = process.worker.engine
        process.react(
            "other", (lambda: engine.submit("other", record)) if what == "start" else lambda: engine.release("other")
        )

    def _restart(self, process: Process) -> None:
        self.trouble_due = False
        process.kill()
        for w in self.wires.values():
            if process in (w.client, w.server):
                w.lose(process)
        self._live(process.address)
        for ask in self.asks:
            self.recorder.write(ask.name, "decode")
            self.recorder.write(ask.name, "prefill")
            if ask.over or not ask.started:
                continue
            if ask.decode[0] is process:
                ask.unwanted.update(ask.prefills)
                ask.started = ask.prefill_due = ask.retry_due = False
                ask.unsaid = None
                ask.current = -1
            else:
                for call in [call for call, (where, _) in ask.prefills.items() if where is process]:
                    self._lost_sender(ask, call)

    def _lost_sender(self, ask: Ask, call: int) -> None:
        """A Prefill call failed: if it is the present one, another sender is needed, once; then D computes itself."""
        ask.prefills.pop(call, None)
        ask.retry_due = ask.retry_due or call == ask.current

    # -- what the gateway hears

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

    def _on_drawn(self, where: str, spec: SampleSpec) -> None:
        place = (where, tuple(spec.prompt), spec.position)
        if place in self.drawn and where.startswith("D"):
            self.fail(f"{where} draws token {spec.position} after {spec.prompt} a second time")
        self.drawn.add(place)


def maker(plan: Plan) -> Callable[[], World]:
    """Makes equal worlds."""
    return lambda: World(plan)
