"""What must never be, watched from within: each function of the protocol that makes a promise is asked whether it kept
it. `install` wraps whatever is there, so a protection that a test took away before stays away.

- A committed sequence holds its own bytes, and keeps them as long as it has its blocks.
- An acknowledged block holds the bytes of its request and position, and of nobody else.
- A commit is refused when, as it was taken up, a block it counts on had been handed out again by its sender.
- A lease commits once, by the attempt that the last accepted retarget named.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import network
import pytest
from processes import BLOCK, LAYOUT, VOCAB
from stepping import Recorder, condition, pause

from decode_service.worker import DecodeWorker
from engine.batch import Batch, Slice
from engine.fake import SLOT_BYTES, FakeRunner
from kv_transfer import leases
from kv_transfer.leases import CommitResult, Lease
from kv_transfer.receiving import ReceiveSession

if TYPE_CHECKING:
    from world import World

recorder = Recorder()
"""Of whichever world runs; one runs at a time."""
world: World = None  # type: ignore[assignment]
"""Whose event runs now."""


@cache
def kv_of(tokens: tuple[int, ...]) -> bytes:
    """The KV of a sequence, position by position."""
    runner = FakeRunner(LAYOUT.blocks_for(len(tokens)), BLOCK, vocab_size=VOCAB)
    runner.run(Batch([Slice("expected", tokens, 0, list(range(runner.num_blocks)))]))
    return bytes(runner.buffer)[: len(tokens) * SLOT_BYTES]


def install(patch: pytest.MonkeyPatch) -> None:
    """Watch until the patch is undone; a job that waits for a lease's condition becomes one that can't go on."""
    patch.setattr(leases, "threading", SimpleNamespace(Condition=condition(recorder), Lock=threading.Lock))
    network.install(patch, recorder)
    _watch_session(patch)
    _watch_lease(patch)
    _record(patch)


def _watch_session(patch: pytest.MonkeyPatch) -> None:
    on_open, on_offer, copy, on_commit = (
        getattr(ReceiveSession, name) for name in ("on_open", "on_offer", "copy", "on_commit")
    )

    def opened(self: Any, message: Any) -> Any:
        self.watched = (message.source_incarnation, [])
        return on_open(self, message)

    def offered(self: Any, offer: Any) -> Any:
        self.watched[1].append(offer)
        return on_offer(self, offer)

    def copied(self: Any, plan: Any) -> Any:
        ack = copy(self, plan)
        _check_copied(self, plan)
        return ack

    def committed(self: Any, message: Any) -> Any:
        reused = _reused(*self.watched)
        answer = on_commit(self, message)
        if reused and not answer.already_committed:
            world.fail(f"committed though the sender had handed out blocks {reused} again")
        if not answer.already_committed:
            world.committed.append(self.lease)
            check_committed()
        return answer

    for name, function in (("on_open", opened), ("on_offer", offered), ("copy", copied), ("on_commit", committed)):
        patch.setattr(ReceiveSession, name, function)


def _check_copied(session: ReceiveSession, plan: Any) -> None:
    if not _holds(session.lease.request_id, plan.target_blocks, plan.offer.token_start, plan.offer.token_end):
        world.fail(f"{session.lease.request_id}: an acknowledged block holds foreign bytes")


def check_committed() -> None:
    """Every committed sequence that has its blocks still holds its own bytes."""
    for lease in world.committed:
        whole = _holds(lease.request_id, lease.blocks, lease.needed_start, lease.needed_end)
        if not lease.released and lease in world.at["D"].worker.leases._leases.values() and not whole:
            world.fail(f"{lease.request_id}: a committed sequence holds foreign bytes")


def _holds(request: str, blocks: Sequence[int], start: int, end: int) -> bool:
    """True when `blocks` of D hold the request's tokens [start, end)."""
    ask = next(ask for ask in world.asks if ask.name == request)
    wanted = kv_of((*ask.prompt, *ask.record.outputs[0].token_ids))[start * SLOT_BYTES : end * SLOT_BYTES]
    memory, size = world.at["D"].memory.buffer, LAYOUT.block_bytes
    return b"".join(bytes(memory[b * size : (b + 1) * size]) for b in blocks)[: len(wanted)] == wanted


def _reused(incarnation: str, offers: list[Any]) -> set[int]:
    """Blocks of the sender that are not any more what was offered; none where the bytes came with the offers."""
    sender = next(process for process in world.lives if process.name == incarnation)
    generations = sender.memory.generations
    offered = [(offer.blocks, offer.generations) for offer in offers if not offer.payload]
    return {b for blocks, held in offered for b, g in zip(blocks, held, strict=True) if generations[b] != g}


def _watch_lease(patch: pytest.MonkeyPatch) -> None:
    commit, retarget = Lease.commit, Lease.retarget

    def committed(self: Any, attempt: int) -> CommitResult:
        pause()
        result = commit(self, attempt)
        if result is CommitResult.COMMITTED:
            if self.lease_id in world.commits:
                world.fail(f"attempt {attempt} committed after attempt {world.commits[self.lease_id]}")
            if attempt < (least := world.superseded.get(self.lease_id, 0)):
                world.fail(f"attempt {attempt} committed after attempt {least} had taken its place")
            world.commits[self.lease_id] = attempt
        return result

    def retargeted(self: Any, attempt: int, *, local: bool = False) -> bool:
        over = retarget(self, attempt, local=local)
        if not over:
            world.superseded[self.lease_id] = attempt
        return over

    patch.setattr(Lease, "commit", committed)
    patch.setattr(Lease, "retarget", retargeted)


def _record(patch: pytest.MonkeyPatch) -> None:
    """Who changes what another part of a process looks at: a lease's state, and whose streams are open."""

    def writes(owner: type, name: str, resource: Callable[[Any], tuple[Any, ...]]) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            recorder.write(*resource(self))
            return function(self, *args, **kwargs)

        patch.setattr(owner, name, recorded)

    for name in ("begin", "retarget", "commit", "when_quiet", "close"):
        writes(Lease, name, lambda lease: ("lock", lease._changed.number))
    for name in ("grant", "key_of", "fail_stream", "close_stream", "end_transfers"):
        writes(DecodeWorker, name, lambda worker: (worker.identity.incarnation, "calls"))
