"""Which request holds which blocks: reservation, growth, preemption and return. Torch-free.

The order of age decides every conflict. A request that needs a block takes it from the youngest younger one that
computes, never from an older one, and never from one that is being received into: a peer's bytes are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from decode_service import admission
from decode_service.config import SchedulerConfig
from decode_service.events import Counters
from decode_service.request import Chain, Output, Request, State, blocks_for
from engine.block_pool import BlockPool, PoolExhaustedError
from engine.block_table import BlockTable
from engine.prefix import block_hashes
from tandem.errors import OverloadedError


class Memory:
    """The blocks of the requests in `requests`, which the scheduler shares with it (oldest first)."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        requests: dict[str, Request],
        counters: Counters,
        dropped: Callable[[Request], None],
    ) -> None:
        """`requests` and `counters` are the scheduler's own; `dropped` is told of each request that leaves."""
        self._config = config
        self._pool = pool
        self._held: frozenset[str] = frozenset()
        self.leaving: list[Request] = []
        """Dropped, but named by a step that runs."""
        self._requests = requests
        self._counters = counters
        self._dropped = dropped

    def reserve(self, request: Request, *, slots: int, receiving: bool = False) -> int:
        """Give a request its trunk: cached blocks, and fresh ones for what it knows. Returns the cached tokens.

        `receiving`: the fresh blocks are for what a sender computes. Raises OverloadedError, and then has changed
        nothing, when that, its outputs' tails and `slots` more don't fit.
        """
        size, end = self._pool.block_size, request.needed_end if receiving else request.shared_end
        # The last token is always computed, so that there is something to draw from.
        request.hashes = block_hashes(request.root, request.tokens(0, end - 1, None), size, request.hashes)
        matched = self._pool.match(request.hashes)
        fresh = blocks_for(end, size) - len(matched)
        try:
            if not self._pool.can_allocate(admission.blocks_to_hold(request, size) - len(matched) + slots):
                raise PoolExhaustedError(
                    f"{end} tokens don't fit beside the running sequences: {self._pool.num_free} of "
                    f"{self._pool.num_blocks} KV blocks are free"
                )
            if receiving:
                admission.check_receiving_cap(fresh, self._pool, self._requests.values())
        except OverloadedError:
            self._pool.release(matched)
            raise
        request.received_blocks = fresh if receiving else 0
        table = BlockTable(self._pool)
        table.adopt(matched)
        table.ensure(end)
        request.trunk = Chain(table, len(matched) * size, request.hashes[: len(matched)])
        return len(matched) * size

    def grow(self, request: Request, chain: Chain, tokens: int) -> list[tuple[int, int]] | None:
        """Make room for `tokens` tokens in a chain, at the cost of younger requests. None: not now.

        Returns the copies that must come before the step writes.
        """
        while True:
            try:
                return chain.table.ensure(tokens, start=chain.computed)
            except PoolExhaustedError:
                if not self._preempt_younger(request):
                    return None

    def resume(self) -> None:
        """Take preempted requests back, the oldest first, while they fit.

        The oldest of all who compute makes itself room.
        """
        for request in list(self._requests.values()):
            if request.state is not State.WAITING:
                continue
            while not self._try_resume(request):
                if any(other.order < request.order for other in self._computing()):
                    return
                if not self._preempt_younger(request):
                    return

    def register(self, request: Request, chain: Chain, output: Output | None) -> None:
        """Publish the blocks of a chain that are full of computed tokens: those of `output`, None: the trunk's."""
        size = self._pool.block_size
        full = chain.computed // size
        if self._pool.prefix_cache and full > len(chain.hashes):
            tokens = request.tokens(0, full * size, output)
            chain.hashes = block_hashes(request.root, tokens, size, chain.hashes)
            chain.table.register_full(chain.hashes, chain.computed)

    def hold(self, keys: Iterable[str]) -> None:
        """Steps that name blocks of these requests run on: `drop` keeps the blocks until none of a request does."""
        self._held = frozenset(keys)
        self.leaving, leaving = [], self.leaving
        for request in leaving:
            self._free(request)

    def _free(self, request: Request) -> None:
        if request.key in self._held:
            self.leaving.append(request)
        else:
            request.free()

    def drop(self, request: Request) -> None:
        """Free everything that a request holds and forget it."""
        self._free(request)
        if self._requests.pop(request.key, None) is not None:
            self._dropped(request)

    def _computing(self) -> list[Request]:
        return [request for request in self._requests.values() if request.state is State.RUNNING]

    def _try_resume(self, request: Request) -> bool:
        computing = self._computing()
        oldest = all(other.order > request.order for other in computing)
        slots = 0 if oldest else admission.step_slots(computing, 1, self._pool.block_size)
        wanted = admission.blocks_to_hold(request, self._pool.block_size) + slots
        if self._pool.num_free + self._pool.peek(request.hashes) < wanted:
            return False
        try:
            self.reserve(request, slots=slots)
        except OverloadedError:
            return False
        request.state = State.RUNNING
        return True

    def _preempt_younger(self, request: Request) -> bool:
        """Send the youngest request that computes and is younger than `request` back to wait."""
        victim = max(self._computing(), key=lambda other: other.order, default=None)
        if victim is None or victim.order <= request.order:
            return False
        victim.free()
        victim.state = State.WAITING
        victim.preemptions += 1
        self._counters.preemptions += 1
        return True
