"""Which models are served, by what the ready workers say of themselves, and by the gateway's own files when none is
ready.
"""

from __future__ import annotations

from gateway.pool import WorkerPool
from gateway.tokenizer import Tokenizer
from gateway.workers import Worker
from tandem.errors import NotFoundError
from tandem.v1 import types_pb2


class Catalog:
    """One model per gateway, since the gateway has one tokenizer; during a rollout its workers may be of two builds."""

    def __init__(self, pool: WorkerPool, tokenizer: Tokenizer) -> None:
        """Looks at `pool` at each question."""
        self._pool, self._tokenizer = pool, tokenizer

    def _ready(self) -> list[Worker]:
        return [worker for worker in self._pool.decode if worker.ready]

    @property
    def name(self) -> str:
        """The name that clients use."""
        ready = self._ready()
        return (ready[0].info.model_name if ready else "") or self._tokenizer.config.name

    def check(self, model: str) -> None:
        """Raises NotFoundError for a model that isn't served; empty means the only one."""
        known = {self._tokenizer.config.name}
        for worker in self._ready():
            known |= {worker.info.model_name, worker.info.model_id}
        if model and model not in known:
            raise NotFoundError(f"no model {model[:128]!r} here; served: {self.name}", reason="MODEL_NOT_FOUND")

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and output together, on every ready worker."""
        reported = [worker.info.max_context for worker in self._ready() if worker.info.max_context]
        return min(reported, default=self._tokenizer.config.max_context or 1 << 31)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        reported = [worker.info.vocab_size for worker in self._ready() if worker.info.vocab_size]
        return min(reported, default=self._tokenizer.vocab_size)

    @property
    def proposers(self) -> set[str] | None:
        """Those of all ready workers together; None while nobody can say."""
        ready = self._ready()
        return {name for worker in ready for name in worker.info.proposers} if ready else None

    def models(self) -> list[tuple[str, types_pb2.WorkerInfo, int, int]]:
        """(name, info, prefill workers, decode workers) per model id that has a ready decode worker."""
        found: dict[str, tuple[str, types_pb2.WorkerInfo, int, int]] = {}
        for worker in self._ready():
            info = worker.info
            if info.model_id not in found:
                decode = sum(w.info.model_id == info.model_id for w in self._ready())
                prefill = sum(w.ready and w.info.model_id == info.model_id for w in self._pool.prefill)
                found[info.model_id] = (info.model_name or self.name, info, prefill, decode)
        return list(found.values())

    def workers(self) -> list[dict[str, str | int]]:
        """The ready workers of each model, for /workers."""
        return [
            {"model": name, "model_id": info.model_id, "prefill_workers": prefill, "decode_workers": decode}
            for name, info, prefill, decode in self.models()
        ]
