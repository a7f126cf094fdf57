"""Copying between pools, checked: shared by the transports whose reader sees the sender's memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kv_transfer.messages import Offer
from kv_transfer.pool import PoolMemory
from tandem.errors import DataCorruptionError, InternalError, InvalidRequestError, StaleError

PIECE_BYTES = 4 << 20
"""Most bytes between two looks at `stop`: about a millisecond's copying."""


def check_payload_free(offer: Offer) -> None:
    """Refuse bytes in the stream where none belong (InvalidRequestError)."""
    if offer.payload or offer.checksums:
        raise InvalidRequestError("this transport takes no bytes in the stream", field="offer.payload")


def check_checksums(offer: Offer) -> None:
    """Refuse an offer without a checksum for each block, or with bytes in the stream (InvalidRequestError)."""
    if offer.payload or len(offer.checksums) != len(offer.blocks):
        raise InvalidRequestError(
            f"{len(offer.payload)} bytes in the stream and {len(offer.checksums)} checksums for {len(offer.blocks)} "
            "blocks: this transport takes a checksum of each and no bytes",
            field="offer.checksums",
        )


def check_blocks(offer: Offer, num_blocks: int) -> None:
    """Every offered block is one of the sender's `num_blocks` (InvalidRequestError)."""
    for block in offer.blocks:
        if not 0 <= block < num_blocks:
            raise InvalidRequestError(f"block {block} of a pool of {num_blocks}", field="offer.blocks")


def check_target(block_bytes: int, target: PoolMemory, blocks: Sequence[int]) -> None:
    """`blocks` are the pool's, and hold what the sender's do (InternalError)."""
    if block_bytes != target.block_bytes:
        raise InternalError(f"blocks of {block_bytes} bytes can't go into blocks of {target.block_bytes}")
    for block in blocks:
        if not 0 <= block < target.num_blocks:
            raise InternalError(f"target block {block} of a pool of {target.num_blocks}")


def check_stop(stop: Callable[[], bool]) -> None:
    """StaleError once the copy isn't wanted any more."""
    if stop():
        raise StaleError("the copy was stopped: its attempt is over", reason="TRANSFER_OVER")


def check_generations(offer: Offer, source: PoolMemory) -> None:
    """Every offered block exists (else InvalidRequestError) and is still the one that was offered (else StaleError)."""
    check_blocks(offer, source.num_blocks)
    _check_generation(source, offer.blocks, offer.generations)


def stale_block(block: int) -> StaleError:
    """What a generation that changed means."""
    return StaleError(f"block {block} was handed out again by the sender", reason="STALE_GENERATION")


def corrupt_block(offer: Offer, place: int) -> DataCorruptionError:
    """What a checksum that differs means; `place` of the block in the offer."""
    return DataCorruptionError(f"block {place} of offer {offer.sequence} has another checksum", reason="CHECKSUM")


def checksums(pool: PoolMemory, blocks: Sequence[int]) -> tuple[int, ...]:
    """CRC-32 of each block's bytes."""
    size, buffer = pool.block_bytes, pool.buffer
    return tuple(zlib.crc32(buffer[block * size : (block + 1) * size]) for block in blocks)


def copy_blocks(
    offer: Offer,
    source: PoolMemory,
    target: PoolMemory,
    target_blocks: Sequence[int],
    stop: Callable[[], bool],
) -> None:
    """Copy run by run, generations checked before and after each. Raises InvalidRequestError, StaleError.

    A run's blocks lie side by side in both pools.
    """
    check_payload_free(offer)
    check_generations(offer, source)
    check_target(source.block_bytes, target, target_blocks)
    size = source.block_bytes
    for at, count in runs(offer.blocks, target_blocks, max(1, PIECE_BYTES // size)):
        check_stop(stop)
        blocks, generations = offer.blocks[at : at + count], offer.generations[at : at + count]
        _check_generation(source, blocks, generations)
        copy_bytes(source.buffer[blocks[0] * size : (blocks[0] + count) * size], target, target_blocks[at])
        _check_generation(source, blocks, generations)


def runs(blocks: Sequence[int], into: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, count) of each stretch that is contiguous in both, at most `most` long."""
    start = 0
    for at in range(1, len(blocks) + 1):
        ends = at == len(blocks) or at - start == most
        if ends or blocks[at] != blocks[at - 1] + 1 or into[at] != into[at - 1] + 1:
            yield start, at - start
            start = at


def copy_payload(
    offer: Offer, block_bytes: int, target: PoolMemory, target_blocks: Sequence[int], stop: Callable[[], bool]
) -> None:
    """Copy an offer's own bytes, each block under its CRC-32. Nothing is written of a block whose checksum differs.

    Raises InvalidRequestError (sizes), DataCorruptionError (a checksum), StaleError (stopped).
    """
    check_target(block_bytes, target, target_blocks)
    size, count = block_bytes, len(offer.blocks)
    if len(offer.payload) != count * size or len(offer.checksums) != count:
        raise InvalidRequestError(
            f"{len(offer.payload)} bytes and {len(offer.checksums)} checksums for {count} blocks of {size} bytes",
            field="offer.payload",
        )
    payload = memoryview(offer.payload)
    for i, (checksum, into) in enumerate(zip(offer.checksums, target_blocks, strict=True)):
        check_stop(stop)
        piece = payload[i * size : (i + 1) * size]
        if zlib.crc32(piece) != checksum:
            raise corrupt_block(offer, i)
        copy_bytes(piece, target, into)


def copy_bytes(source: memoryview, target: PoolMemory, block: int) -> None:
    """Bytes of one or more whole blocks into a pool, from `block` on; checked by the caller.

    numpy copies without the GIL; assigning to a memoryview slice would hold it.
    """
    into = np.frombuffer(target.buffer, dtype=np.uint8, count=source.nbytes, offset=block * target.block_bytes)
    np.copyto(into, np.frombuffer(source, dtype=np.uint8))


def _check_generation(source: PoolMemory, blocks: Sequence[int], generations: Sequence[int]) -> None:
    for block, generation in zip(blocks, generations, strict=True):
        if source.generations[block] != generation:
            raise stale_block(block)
