"""The simulated cluster: a gateway before two pools, whose sizes the chart's rules decide.

Time goes by ticks of a quarter second. In each, arrivals join the gateway's queue, the queue is served while a pair has
credit, prompts and tokens are computed; every 15 seconds everything is scraped and both scalers look. Workers take a
while to start, and drain before they go; what a decode worker still runs after its grace goes on elsewhere.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bench.autoscale.machines import DecodeWorker, Histogram, Machine, PrefillWorker, Request, Worker
from bench.autoscale.rules import NAMESPACE, RELEASE, Pace, Rule, Scaler
from bench.autoscale.scrapes import Labels, Scrapes
from bench.autoscale.trace import Arrival

TICK = 0.25
LOOK_SECONDS = 15.0
"""Between two scrapes, and between two looks of the HPA controller."""
LAST_SECONDS = 3600.0
"""How long what is under way at the end of the trace may take."""

W = TypeVar("W", bound=Worker)


class Pool(Generic[W]):
    """Workers of one role."""

    def __init__(self, make: Callable[[str, float], W], count: int, start: float) -> None:
        """`count` workers serve from the beginning; others take `start` seconds."""
        self._make, self._start = make, start
        self._numbers = itertools.count()
        self.workers: list[W] = [make(str(next(self._numbers)), 0.0) for _ in range(count)]
        self.worker_seconds = 0.0

    @property
    def ordered(self) -> int:
        """Those that are to be there."""
        return sum(worker.draining_since is None for worker in self.workers)

    def taking(self, now: float) -> list[W]:
        """Those that take new work."""
        return [worker for worker in self.workers if worker.takes(now)]

    def order(self, count: int, now: float) -> None:
        """Starts workers, or drains the youngest."""
        staying = [worker for worker in self.workers if worker.draining_since is None]
        for _ in range(count - len(staying)):
            self.workers.append(self._make(str(next(self._numbers)), now + self._start))
        for worker in staying[count:]:
            worker.draining_since = now


@dataclass(frozen=True)
class Look:
    """The state at one look, for plots; latencies are of the time since the last."""

    at: float
    arrivals: int
    waiting: int
    ready: Mapping[str, int]
    ordered: Mapping[str, int]
    values: Mapping[str, float]


@dataclass
class Result:
    """What came of a trace."""

    requests: list[Request]
    looks: list[Look] = field(default_factory=list)
    worker_hours: dict[str, float] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    migrations: int = 0
    unfinished: int = 0


class Cluster:
    """One run: made -> `run()`."""

    def __init__(
        self,
        machine: Machine,
        counts: Mapping[str, int],
        rules: Mapping[str, Sequence[Rule]] | None = None,
        paces: Mapping[str, Pace] | None = None,
    ) -> None:
        """`counts`: workers at the start, by role. Without `rules` and `paces` both pools stay as they are."""
        self.machine = machine
        self.prefill = Pool(
            lambda pod, at: PrefillWorker(f"prefill-{pod}", machine, at), counts["prefill"], machine.start
        )
        self.decode = Pool(lambda pod, at: DecodeWorker(f"decode-{pod}", machine, at), counts["decode"], machine.start)
        self.scalers = {role: Scaler(rules[role], paces[role]) for role in rules} if rules and paces else {}
        self.scrapes = Scrapes()
        self.queue: deque[Request] = deque()
        self.ttft, self.itl = Histogram(), Histogram()
        self._homes: dict[Request, DecodeWorker] = {}
        self._arrived = 0

    def run(self, arrivals: Sequence[Arrival]) -> Result:
        """Replays them all."""
        result = Result([Request(arrival) for arrival in arrivals])
        coming = deque(result.requests)
        end = arrivals[-1].at
        for number in itertools.count(1):
            now = number * TICK
            self._arrive(coming, now)
            self._serve(now)
            self._compute(now, result)
            self._retire(now, result)
            if number % round(LOOK_SECONDS / TICK) == 0:
                self._look(now, result)
            if now > end and (now > end + LAST_SECONDS or not (coming or self.queue or self._homes)):
                break
        result.unfinished = sum(request.done < 0 for request in result.requests)
        for role, pool in self._pools():
            result.worker_hours[role] = pool.worker_seconds / 3600
        return result

    def _pools(self) -> list[tuple[str, Pool[PrefillWorker] | Pool[DecodeWorker]]]:
        return [("prefill", self.prefill), ("decode", self.decode)]

    def _arrive(self, coming: deque[Request], now: float) -> None:
        while coming and coming[0].arrival.at <= now:
            self._arrived += 1
            self.queue.append(coming.popleft())

    def _serve(self, now: float) -> None:
        """In order: who waits for credit holds up those behind."""
        while self.queue:
            request = self.queue[0]
            prefill = min(self.prefill.taking(now), key=lambda worker: worker.backlog(now), default=None)
            rooms = [worker for worker in self.decode.taking(now) if worker.has_room(request)]
            if prefill is None or not rooms:
                return
            if prefill.backlog(now) * self.machine.prefill_rate >= self.machine.most_backlog:
                return
            decode = min(rooms, key=lambda worker: worker.kv_used)
            self.queue.popleft()
            came = max(request.arrival.at, now - TICK) if request.moved == 0 else now
            prefill.take(came, request)
            decode.receiving[request] = request.tokens
            self._homes[request] = decode

    def _compute(self, now: float, result: Result) -> None:
        for prefill in self.prefill.workers:
            for at, request in prefill.finished(now):
                self._prefilled(at, request)
        for decode in self.decode.workers:
            if decode.running:
                seconds = decode.step_seconds()
                self.itl.observe(seconds, len(decode.running) * TICK / seconds)
            for request in decode.advance(TICK):
                request.done = now
                del self._homes[request]
            for request in decode.overflow():
                result.preemptions += 1
                self._again(request)

    def _prefilled(self, at: float, request: Request) -> None:
        home = self._homes.get(request)
        if home is None or request not in home.receiving:
            return  # it was sent elsewhere meanwhile
        if request.first < 0:
            request.first = at
            self.ttft.observe(at - request.arrival.at)
        home.begin(request)

    def _again(self, request: Request) -> None:
        del self._homes[request]
        self.queue.appendleft(request)

    def _retire(self, now: float, result: Result) -> None:
        """Workers that drain go when they are empty, or when their grace is over."""
        for _, pool in self._pools():
            pool.worker_seconds += TICK * len(pool.workers)
        for decode in self.decode.workers:
            over = decode.draining_since is not None and now >= decode.draining_since + self.machine.drain
            for request in [*decode.running, *decode.receiving] if over else ():
                decode.evict(request)
                result.migrations += 1
                self._again(request)
        self.prefill.workers = [w for w in self.prefill.workers if w.draining_since is None or w.queue]
        self.decode.workers = [w for w in self.decode.workers if w.draining_since is None or w.running or w.receiving]

    def _look(self, now: float, result: Result) -> None:
        self.scrapes.scrape(now, dict(self._samples(now)))
        values: dict[str, float] = {}
        for role, pool in self._pools():
            result.most[role] = max(result.most.get(role, 0), pool.ordered)
            if scaler := self.scalers.get(role):
                pool.order(scaler.look(now, self.scrapes, pool.ordered), now)
                values.update(scaler.values)
        ready = {role: len(pool.taking(now)) for role, pool in self._pools()}
        ordered = {role: pool.ordered for role, pool in self._pools()}
        result.looks.append(Look(now, self._arrived, len(self.queue), ready, ordered, values))
        self._arrived = 0

    def _samples(self, now: float) -> Iterator[tuple[tuple[str, Labels], float]]:
        """As the pods would tell them, with the labels that the chart's PodMonitor adds."""
        rate = self.machine.prefill_rate
        tokens = float(sum(request.tokens for request in self.queue))
        labels = {"role": "gateway", "pod": "gateway-0"}
        told = [
            ("tandem_queued_prefill_tokens", labels, tokens),
            ("tandem_queued_prefill_seconds", labels, tokens / rate),
            *self.ttft.samples("tandem_time_to_first_token_seconds", labels),
            *self.itl.samples("tandem_inter_token_latency_seconds", labels),
        ]
        for _, pool in self._pools():
            for worker in pool.workers:
                if worker.serves(now):
                    told += worker.samples(now)
        for name, own, value in told:
            yield (name, frozenset({**own, "namespace": NAMESPACE, "release": RELEASE}.items())), value
