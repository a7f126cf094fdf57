"""Copying between pools, checked: shared by the transports whose reader sees the sender's memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from kv_transfer.messages import Offer
from kv_transfer.pool import PoolMemory
from tandem.errors import DataCorruptionError, InternalError, InvalidRequestError, StaleError


def check_payload_free(offer: Offer) -> None:
    """Refuse bytes in the stream where none belong (InvalidRequestError)."""
    if offer.payload or offer.checksums:
        raise InvalidRequestError("this transport takes no bytes in the stream", field="offer.payload")


def check_generations(offer: Offer, source: PoolMemory) -> None:
    """Every offered block exists (else InvalidRequestError) and is still the one that was offered (else StaleError)."""
    for block, generation in zip(offer.blocks, offer.generations, strict=True):
        if not 0 <= block < source.num_blocks:
            raise InvalidRequestError(f"block {block} of a pool of {source.num_blocks}", field="offer.blocks")
        _check_generation(source, block, generation)


def copy_blocks(
    offer: Offer,
    source: PoolMemory,
    target: PoolMemory,
    target_blocks: Sequence[int],
    stop: Callable[[], bool],
) -> None:
    """Copy block by block, generation checked before and after each. Raises InvalidRequestError, StaleError."""
    check_payload_free(offer)
    check_generations(offer, source)
    size = _block_bytes(source.block_bytes, target)
    for block, generation, into in zip(offer.blocks, offer.generations, target_blocks, strict=True):
        _check_stop(stop)
        _check_generation(source, block, generation)
        copy_bytes(source.buffer[block * size : (block + 1) * size], target, into)
        _check_generation(source, block, generation)


def copy_payload(
    offer: Offer, block_bytes: int, target: PoolMemory, target_blocks: Sequence[int], stop: Callable[[], bool]
) -> None:
    """Copy an offer's own bytes, each block under its CRC-32. Nothing is written of a block whose checksum differs.

    Raises InvalidRequestError (sizes), DataCorruptionError (a checksum), StaleError (stopped).
    """
    size, count = _block_bytes(block_bytes, target), len(offer.blocks)
    if len(offer.payload) != count * size or len(offer.checksums) != count:
        raise InvalidRequestError(
            f"{len(offer.payload)} bytes and {len(offer.checksums)} checksums for {count} blocks of {size} bytes",
            field="offer.payload",
        )
    payload = memoryview(offer.payload)
    for i, (checksum, into) in enumerate(zip(offer.checksums, target_blocks, strict=True)):
        _check_stop(stop)
        piece = payload[i * size : (i + 1) * size]
        if zlib.crc32(piece) != checksum:
            raise DataCorruptionError(f"block {i} of offer {offer.sequence} has another checksum", reason="CHECKSUM")
        copy_bytes(piece, target, into)


def copy_bytes(source: memoryview, target: PoolMemory, block: int) -> None:
    """One block's bytes into a pool. numpy copies without the GIL; assigning to a memoryview slice would hold it."""
    if not 0 <= block < target.num_blocks:
        raise InternalError(f"target block {block} of a pool of {target.num_blocks}")
    size = target.block_bytes
    into = np.frombuffer(target.buffer, dtype=np.uint8, count=size, offset=block * size)
    np.copyto(into, np.frombuffer(source, dtype=np.uint8))


def _check_generation(source: PoolMemory, block: int, generation: int) -> None:
    if source.generations[block] != generation:
        raise StaleError(f"block {block} was handed out again by the sender", reason="STALE_GENERATION")


def _check_stop(stop: Callable[[], bool]) -> None:
    if stop():
        raise StaleError("the copy was stopped: its attempt is over", reason="TRANSFER_OVER")


def _block_bytes(source_bytes: int, target: PoolMemory) -> int:
    if source_bytes != target.block_bytes:
        raise InternalError(f"blocks of {source_bytes} bytes can't go into blocks of {target.block_bytes}")
    return source_bytes
