"""A sender and a receiver whose pools aren't alike, over any in-process transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from pools_of_tokens import read_codes, write_tokens

from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.pool import LocalPool, PoolMemory, SharedPool
from kv_transfer.ranks import RankedSource
from kv_transfer.registry import source_transport, target_transport
from kv_transfer.session import Receiver, ReceiveSession, Sender, SendSession
from kv_transfer.transport import SourceTransport, TargetTransport
from tandem.kv_layout import KvLayout
from tandem.record import OutputState, Record, SamplingParams, StopRules

NUM_BLOCKS = 128


@dataclass
class Unlike:
    """Both ends; sequences lie in the sender's last blocks backwards, and come into the receiver's first."""

    source_layout: KvLayout
    target_layout: KvLayout
    source_pools: list[PoolMemory]
    """One a rank, as of the receiver's."""
    target_pools: list[PoolMemory]
    source: SourceTransport
    target: TargetTransport
    receiver: Receiver
    released: list[str] = field(default_factory=list)
    sender_numerics: str = "exact"

    @property
    def source_pool(self) -> PoolMemory:
        return self.source_pools[0]

    @property
    def source_blocks(self) -> list[int]:
        return list(range(NUM_BLOCKS))[::-1]

    def write(self, codes: torch.Tensor) -> None:
        """The whole sequence, as the sender computed it."""
        write_tokens(self.source_pools, self.source_layout, self.source_blocks, codes)

    def read(self, lease: Lease) -> torch.Tensor:
        """The needed tokens' codes as they arrived."""
        tokens = lease.needed_end - lease.needed_start
        return read_codes(self.target_pools, self.target_layout, lease.blocks, tokens)

    def grant(self, start: int, end: int) -> Lease:
        blocks = range(self.target_layout.blocks_for(end - start))
        return self.receiver.leases.grant("r", start, end, blocks, lambda: self.released.append("r"))

    def opened(self, lease: Lease, attempt: int = 0) -> tuple[SendSession, ReceiveSession]:
        """Both sides of a transfer after Open and Opened."""
        send = SendSession(
            Sender("source-1", "model", self.sender_numerics, self.source_layout),
            self.source,
            lease_id=lease.lease_id,
            attempt=attempt,
            target_incarnation=self.receiver.leases.incarnation,
        )
        receive = ReceiveSession(self.receiver)
        send.on_opened(receive.on_open(send.open()))
        return send, receive

    def send(self, lease: Lease, chunks: Sequence[int]) -> SendSession:
        """A whole transfer, computed up to each of `chunks` in turn; the last is the end."""
        send, receive = self.opened(lease)
        for computed in chunks:
            send.ready(computed, self.source_blocks)
            while (offer := send.next_offer()) is not None:
                send.on_ack(receive.copy(receive.on_offer(offer)))
        answer = receive.on_commit(send.commit(record()))
        assert send.on_committed(answer)
        receive.close()
        return send


def record() -> Record:
    return Record("r", "model", [1, 2], SamplingParams(), StopRules(8), [OutputState([7])])


@contextmanager
def unlike_ends(name: str, source: KvLayout, target: KvLayout, *, convert_dtype: bool = False) -> Iterator[Unlike]:
    """Both ends over transport `name`."""
    pool_type: Callable[[int, int], PoolMemory] = SharedPool if name == "shm" else LocalPool
    source_pools = [pool_type(NUM_BLOCKS, source.block_bytes) for _ in range(source.tp_size)]
    target_pools: list[PoolMemory] = [LocalPool(NUM_BLOCKS, target.block_bytes) for _ in range(target.tp_size)]
    ends = [source_transport(name, pool, "source-1") for pool in source_pools]
    sending: SourceTransport = ends[0] if len(ends) == 1 else RankedSource(ends)
    receiving = target_transport(name)
    leases = LeaseTable("target-1", target.block_size)
    receiver = Receiver(
        leases,
        target_pools[0],
        target,
        "model",
        "exact",
        {name: receiving},
        convert_dtype=convert_dtype,
        other_pools=tuple(target_pools[1:]),
    )
    try:
        yield Unlike(source, target, source_pools, target_pools, sending, receiving, receiver)
        assert receiver.staging.idle
    finally:
        sending.close()
        receiving.close()
        for pool in source_pools:
            if isinstance(pool, SharedPool):
                pool.close()
