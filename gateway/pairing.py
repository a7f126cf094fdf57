"""Chooses where a request runs: the pair of workers whose estimated cost is least.

Cost is in seconds of waiting, roughly: prompt tokens that must be computed before and for this request on P, tokens
that must travel to D, and how crowded D is. Only workers that fit (`gateway.fit`) are paired.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.affinity import Prefix
from gateway.config import GatewayConfig
from gateway.fit import mismatch
from gateway.pool import WorkerPool
from gateway.workers import Worker
from tandem.errors import IncompatibleError

DEFAULT_TOKENS_PER_SECOND = 1000.0
TRANSFER_TOKENS_PER_SECOND = 50_000.0
# What a full batch, or a full pool, on D is worth in seconds.
CROWDED_SECONDS = 0.5


@dataclass(frozen=True)
class Need:
    """What a request asks of workers. `model_id` and `numerics_id` are set once it has run somewhere."""

    tokens: int
    sequences: int
    prefix: Prefix
    model_id: str = ""
    numerics_id: str = ""
    avoid: frozenset[str] = frozenset()
    """Incarnations that failed this request."""


@dataclass(frozen=True)
class Pair:
    """Where a request runs; `prefill` is None when the decode worker computes the prompt itself."""

    decode: Worker
    prefill: Worker | None


class Pairing:
    """Stateless but for the pool it looks at."""

    def __init__(self, pool: WorkerPool, config: GatewayConfig) -> None:
        """`config` gives the thresholds."""
        self._pool, self._config = pool, config

    def candidates(self, need: Need) -> list[Worker]:
        """Decode workers that could run the request, with or without credit now.

        While prefill workers are ready, decode workers that fit none of them stand back. Raises IncompatibleError when
        that is all of them, but not for a request that has begun: its decode worker can compute it alone.
        """
        decode = [worker for worker in self._pool.decode if worker.ready and _fits(worker, need)]
        prefill = [worker for worker in self._pool.prefill if worker.ready]
        fitting = [one for one in decode if any(mismatch(other.traits, one.traits) is None for other in prefill)]
        if not prefill or len(fitting) == len(decode):
            return decode
        alone = [worker for worker in decode if worker not in fitting]
        texts = [self._pool.report_mismatch(prefill[0], worker) for worker in alone]
        if not fitting and not need.model_id:
            raise IncompatibleError(texts[0], reason="INCOMPATIBLE_WORKERS")
        return fitting or decode

    def alive(self) -> set[str]:
        """Incarnations that report their load now."""
        return {w.info.incarnation for w in (*self._pool.prefill, *self._pool.decode) if w.connected}

    def choose(self, need: Need, now: float) -> Pair | None:
        """The cheapest pair with credit; None when the request has to wait. `now` is the loop's clock."""
        best: tuple[float, Pair] | None = None
        for decode in self.candidates(need):
            if not self.has_decode_credit(decode, need, now):
                continue
            option = self._with_prefill(decode, need, now)
            if option is not None and (best is None or option[0] < best[0]):
                best = option
        return best[1] if best else None

    def prefill_for(self, decode: Worker, need: Need, now: float) -> Worker | None:
        """Another prefill worker for a request that D already holds; None: D computes it itself."""
        fitting = [worker for worker in self._fitting(decode, need) if self._has_prefill_credit(worker, now)]
        return min(fitting, key=lambda worker: _prefill_cost(worker, need), default=None)

    def _with_prefill(self, decode: Worker, need: Need, now: float) -> tuple[float, Pair] | None:
        missing = max(1, need.tokens - decode.memory.expected(need.prefix))
        cost = _decode_cost(decode) + missing / TRANSFER_TOKENS_PER_SECOND
        fitting = self._fitting(decode, need)
        if not fitting or missing <= self._config.local_prefill_threshold:
            return cost + missing / rate_of(decode), Pair(decode, None)
        prefill = self.prefill_for(decode, need, now)
        if prefill is None:
            return None
        return cost + _prefill_cost(prefill, need), Pair(decode, prefill)

    def _fitting(self, decode: Worker, need: Need) -> Iterable[Worker]:
        return [
            worker
            for worker in self._pool.prefill
            if worker.ready
            and mismatch(worker.traits, decode.traits) is None
            and worker.info.incarnation not in need.avoid
        ]

    def has_decode_credit(self, worker: Worker, need: Need, now: float) -> bool:
        """An idle worker always has; else the batch and the blocks must have room."""
        if now < worker.paused_until:
            return False
        if worker.outstanding == 0:
            return True
        if worker.running + need.sequences > max(1, worker.info.max_sequences):
            return False
        block_size = max(1, worker.info.layout.block_size)
        blocks = -(-need.tokens // block_size) + need.sequences
        return worker.load.free_blocks - worker.pending_blocks >= blocks

    def _has_prefill_credit(self, worker: Worker, now: float) -> bool:
        backlog = worker.load.queued_prefill_tokens + worker.pending_tokens
        return now >= worker.paused_until and (worker.outstanding == 0 or backlog < self._config.max_prefill_backlog)


def _fits(worker: Worker, need: Need) -> bool:
    info = worker.info
    return (
        info.incarnation not in need.avoid
        and need.model_id in ("", info.model_id)
        and need.numerics_id in ("", info.numerics_id)
    )


def rate_of(worker: Worker) -> float:
    """Prompt tokens a second, as measured or as good as any."""
    return worker.load.prefill_tokens_per_second or DEFAULT_TOKENS_PER_SECOND


def _prefill_cost(worker: Worker, need: Need) -> float:
    missing = max(1, need.tokens - worker.memory.expected(need.prefix))
    return (worker.load.queued_prefill_tokens + worker.pending_tokens + missing) / rate_of(worker)


def _decode_cost(worker: Worker) -> float:
    crowd = worker.running / max(1, worker.info.max_sequences)
    total = max(1, worker.load.total_blocks)
    used = 1 - max(0, worker.load.free_blocks - worker.pending_blocks) / total
    return CROWDED_SECONDS * (crowd + used)
