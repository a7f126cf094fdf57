"""A small world: prefill workers, one decode worker, a gateway's decisions about one or two requests, and one trouble.

The workers are real (`processes`), the gateway is what its requests do here: it opens Decode, then Prefill, and once
each, at any moment, whatever a `Plan` says: gives a request up, retargets it (a sender that hangs, and comes back),
loses a worker and starts it again. What the gateway hears it hears at once; what it says arrives when its event comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import network
import watch
from asking import Gateway
from asks import Ask, Plan
from explorer import Source, Violation
from network import Network, Read
from processes import MODEL, Decode, Prefill, Process
from stepping import Accesses
from wires import DOWN, UP, Wire

from engine.batch import SampleSpec
from kv_transfer.leases import Lease
from tandem.record import OutputState, Record, SamplingParams, StopRules


class World(Gateway):
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
        self.hang_due, self.flip_due = plan.hang, plan.corrupt
        network.network = Network(self.recorder)
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
        if self.plan.transport == "nixl":
            network.network.join(process)

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
        found += self._of_bytes()
        for ask in self.asks:
            found += [(ask.name, what) for what in self._due(ask)]
        if self.trouble_due:
            found.append(("restart", self.plan.restart))
        if self.busy == ["start", "end"] and self.asks[0].calls and not self.asks[0].prefills:
            found.append(("other prompt", "start"))
        return found or [("other prompt", "end")] * (self.busy == ["end"])

    def _of_bytes(self) -> list[Source]:
        """Bytes that are under way, and what may become of them."""
        found: list[Source] = []
        for read in network.network.waiting():
            found.append(("net", read.number, "arrives"))
            found += [("net", read.number, "is given up")] * (self.hang_due and not read.given_up)
            found += [("net", read.number, "arrives with another byte")] * self.flip_due
        if self.flip_due:
            found += [("flip", w.name) for w in self.wires.values() if w.waiting(UP) and w.has_bytes()]
        return found

    def run(self, source: Source) -> Accesses:
        """One event."""
        accesses = self.recorder.begin()
        watch.world = self
        kind = source[0]
        if kind == "restart":
            self._restart(self.at[self.plan.restart])
        elif kind == "other prompt":
            self._busy(self.at["P1"], self.busy.pop(0))
        elif kind == "net":
            self._net(network.network.reads[source[1]], source[2])  # type: ignore[index,arg-type]
        elif kind == "flip":
            self.flip_due = False
            self.wires[source[1]].flip()  # type: ignore[index]
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

    # -- trouble

    def _net(self, read: Read, what: str) -> None:
        if what == "is given up":
            self.hang_due, read.given_up = False, True
            self.recorder.write("net", read.number)
            return
        flip = what != "arrives"
        self.flip_due = self.flip_due and not flip
        leases = {process: process.leases() for process in self.lives if isinstance(process, Decode)}
        for process, block in network.network.arrive(read, flip=int(flip)):
            if process.alive and isinstance(process, Decode):
                process.check_leased(block, leases[process])
        for process in leases:
            network.settle(process, ("net", read.number))

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

    def _on_drawn(self, where: str, spec: SampleSpec) -> None:
        place = (where, tuple(spec.prompt), spec.position)
        if place in self.drawn and where.startswith("D"):
            self.fail(f"{where} draws token {spec.position} after {spec.prompt} a second time")
        self.drawn.add(place)


def maker(plan: Plan) -> Callable[[], World]:
    """Makes equal worlds."""
    return lambda: World(plan)
