"""Simulated workers: what each does with its requests, and what it would tell Prometheus.

A prefill worker computes prompts one after the other at a fixed rate. A decode worker steps all its sequences together,
and a step takes longer the more there are; its KV blocks fill as they grow.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.autoscale.trace import Arrival
from tandem.service.metrics import LATENCY_BUCKETS

Samples = Iterator[tuple[str, dict[str, str], float]]
BOUNDS = [*(str(float(bound)) for bound in LATENCY_BUCKETS), "+Inf"]


@dataclass(frozen=True)
class Machine:
    """What one worker of each role can do, and how long it takes to come and go; seconds and tokens."""

    prefill_rate: float = 3000.0
    """Prompt tokens a second."""
    step_base: float = 0.025
    step_per_sequence: float = 0.0015
    """A decode step takes the base and this for each sequence."""
    kv_tokens: int = 80_000
    most_sequences: int = 64
    start: float = 90.0
    """From the order until a worker serves: scheduling, image, weights."""
    drain: float = 630.0
    """What runs on a decode worker after so long goes on elsewhere."""
    most_backlog: int = 32_768
    """Prompt tokens that may wait on one prefill worker, as the gateway's own bound."""


@dataclass(eq=False, slots=True)
class Request:
    """One arrival on its way."""

    arrival: Arrival
    emitted: float = 0.0
    """Tokens given out before the worker that has it now."""
    first: float = -1.0
    """When the first token came; negative: it hasn't."""
    done: float = -1.0
    moved: int = 0

    @property
    def tokens(self) -> int:
        """To compute before it goes on."""
        return self.arrival.prompt_tokens + int(self.emitted)

    @property
    def left(self) -> float:
        """Output tokens to come."""
        return max(0.0, self.arrival.output_tokens - self.emitted)


class Histogram:
    """Cumulative buckets, as Prometheus has them."""

    def __init__(self) -> None:
        """Empty."""
        self._counts = [0.0] * len(BOUNDS)
        self._sum = 0.0

    def observe(self, value: float, weight: float = 1.0) -> None:
        """`weight` times."""
        self._counts[bisect_left(LATENCY_BUCKETS, value)] += weight
        self._sum += value * weight

    def samples(self, name: str, labels: dict[str, str]) -> Samples:
        """Of all buckets, and count and sum."""
        total = 0.0
        for bound, count in zip(BOUNDS, self._counts, strict=True):
            total += count
            yield f"{name}_bucket", {**labels, "le": bound}, total
        yield f"{name}_count", labels, total
        yield f"{name}_sum", labels, self._sum


@dataclass(eq=False)
class Worker:
    """What both roles share. `serves`: it is up."""

    pod: str
    machine: Machine
    ready_at: float
    draining_since: float | None = None

    def serves(self, now: float) -> bool:
        """True when it is up, draining or not."""
        return now >= self.ready_at

    def takes(self, now: float) -> bool:
        """True when it takes new work."""
        return self.draining_since is None and self.serves(now)


@dataclass(eq=False)
class PrefillWorker(Worker):
    """First come, first served."""

    free_at: float = 0.0
    work: float = 0.0
    """Seconds of work taken on since the start."""
    queue: deque[tuple[float, float, Request]] = field(default_factory=deque)
    """(finished at, came at, request)"""
    ttft: Histogram = field(default_factory=Histogram)

    def backlog(self, now: float) -> float:
        """Seconds until all is computed."""
        return max(0.0, self.free_at - now)

    def take(self, now: float, request: Request) -> None:
        """Behind what is there."""
        seconds = request.tokens / self.machine.prefill_rate
        self.free_at = max(now, self.free_at) + seconds
        self.work += seconds
        self.queue.append((self.free_at, now, request))

    def finished(self, now: float) -> Iterator[tuple[float, Request]]:
        """Those that are computed by `now`, and when each was."""
        while self.queue and self.queue[0][0] <= now:
            at, came, request = self.queue.popleft()
            self.ttft.observe(at - came)
            yield at, request

    def samples(self, now: float) -> Samples:
        """What it tells."""
        labels = {"role": "prefill", "pod": self.pod}
        backlog = self.backlog(now)
        yield "tandem_queued_prefill_seconds", labels, backlog
        yield "tandem_queued_prefill_tokens", labels, backlog * self.machine.prefill_rate
        yield "tandem_prefill_tokens_per_second", labels, self.machine.prefill_rate
        yield "tandem_engine_step_seconds_sum", labels, self.work - backlog
        yield from self.ttft.samples("tandem_time_to_first_token_seconds", labels)


@dataclass(eq=False)
class DecodeWorker(Worker):
    """All sequences advance together: `clock` counts the tokens that each has got since the worker began."""

    clock: float = 0.0
    busy: float = 0.0
    receiving: dict[Request, int] = field(default_factory=dict)
    """Reserved for: tokens."""
    running: dict[Request, float] = field(default_factory=dict)
    """The clock when each began."""
    _ends: list[tuple[float, int, Request]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _prompts: int = 0
    _began: float = 0.0

    @property
    def kv_used(self) -> float:
        """Tokens in its blocks."""
        return sum(self.receiving.values()) + self._prompts + len(self.running) * self.clock - self._began

    def has_room(self, request: Request) -> bool:
        """For the request, and for what the others will have soon."""
        count = len(self.receiving) + len(self.running)
        return count == 0 or (
            count < self.machine.most_sequences and self.kv_used + request.tokens + 16 * count <= self.machine.kv_tokens
        )

    def begin(self, request: Request) -> None:
        """Its KV is here."""
        self._prompts += self.receiving.pop(request)
        self.running[request] = self.clock
        self._began += self.clock
        heapq.heappush(self._ends, (self.clock + request.left, next(self._numbers), request))

    def step_seconds(self) -> float:
        """Of one token for everybody."""
        return self.machine.step_base + self.machine.step_per_sequence * len(self.running)

    def advance(self, seconds: float) -> list[Request]:
        """Those that ended."""
        ended = []
        if self.running:
            self.clock += seconds / self.step_seconds()
            self.busy += seconds
        while self._ends and self._ends[0][0] <= self.clock:
            request = heapq.heappop(self._ends)[2]
            if request in self.running:
                self._forget(request)
                ended.append(request)
        return ended

    def _forget(self, request: Request) -> None:
        self._began -= self.running.pop(request)
        self._prompts -= request.tokens

    def evict(self, request: Request) -> None:
        """It goes on elsewhere, with what it has."""
        if self.receiving.pop(request, None) is None:
            emitted = self.clock - self.running[request]
            self._forget(request)
            request.emitted = min(request.emitted + emitted, request.arrival.output_tokens - 1.0)
        request.moved += 1
        self._ends = [item for item in self._ends if item[2] is not request]
        heapq.heapify(self._ends)

    def overflow(self) -> list[Request]:
        """The youngest, preempted until the blocks suffice; never the oldest."""
        gone = []
        while self.kv_used > self.machine.kv_tokens and len(self.running) > 1:
            youngest = next(reversed(self.running))
            self.evict(youngest)
            gone.append(youngest)
        return gone

    def samples(self, now: float) -> Samples:
        """What it tells."""
        labels = {"role": "decode", "pod": self.pod}
        yield "tandem_kv_cache_usage_perc", labels, min(1.0, self.kv_used / self.machine.kv_tokens)
        yield "tandem_num_requests_running", labels, float(len(self.running))
        yield "tandem_engine_step_seconds_sum", labels, self.busy
