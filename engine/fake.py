"""A runner without a model, for tests of schedulers and services: deterministic pseudo-tokens, and a check of every
batch.

Its KV cache is real memory with 16 bytes per slot: (chain: digest of all tokens up to here, token, position + 1). So
block copies and transfers of real bytes carry it, and `run` can prove that positions 0 .. start-1 hold the sequence's
own KV. As a KvLayout the blocks are float32, 1 layer, 1 KV head, head_dim 2. Torch-free.
"""

from __future__ import annotations

import hashlib
import struct

from engine.batch import Batch, SampledToken, SampleSpec, Slice, StepOutput
from tandem.errors import InternalError
from tandem.record import TokenLogprobs

_SLOT = struct.Struct("<QII")
SLOT_BYTES = _SLOT.size


def _digest(*values: int) -> int:
    raw = b"".join((value % (1 << 64)).to_bytes(8, "little") for value in values)
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


class FakeRunner:
    """A `StepRunner`. Raises InternalError for a batch that reads unwritten or foreign KV, or writes what another slice
    sees."""

    def __init__(
        self, num_blocks: int, block_size: int, *, vocab_size: int = 1000, buffer: memoryview | bytearray | None = None
    ) -> None:
        """`buffer` holds num_blocks * block_size * SLOT_BYTES zeroed bytes (shared memory, say); None: its own."""
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, vocab_size
        self.block_bytes = block_size * SLOT_BYTES
        self.buffer = memoryview(bytearray(num_blocks * self.block_bytes) if buffer is None else buffer).cast("B")
        self.batches: list[Batch] = []
        """Every batch so far."""

    def warm_up(self) -> None:
        """Nothing to do."""

    def run(self, batch: Batch) -> StepOutput:
        """Copies, checks, writes the shadow, draws."""
        self.batches.append(batch)
        for source, destination in batch.copies:
            self._block(destination)[:] = self._block(source)
        self._check_private(batch)
        return StepOutput([self._run_slice(item) for item in batch.slices])

    def expected(self, tokens: list[int], seed: int, index: int, position: int, suppress: tuple[int, ...] = ()) -> int:
        """The token that follows `tokens` (prompt and output); greedy callers pass seed 0 and index 0."""
        chain = 0
        for token in tokens:
            chain = _digest(chain, token)
        return self._draw(chain, seed, index, position, suppress)

    def _draw(self, chain: int, seed: int, index: int, position: int, suppress: tuple[int, ...]) -> int:
        token = _digest(chain, seed, index, position) % self.vocab_size
        while token in suppress:
            token = (token + 1) % self.vocab_size
        return token

    def _block(self, block: int) -> memoryview:
        if not 0 <= block < self.num_blocks:
            raise InternalError(f"block {block} is outside the pool of {self.num_blocks}")
        return self.buffer[block * self.block_bytes : (block + 1) * self.block_bytes]

    def _check_private(self, batch: Batch) -> None:
        """No slice may write into a block that another slice of the step reads or writes."""
        users: dict[int, list[int]] = {}
        for number, item in enumerate(batch.slices):
            if not item.token_ids or item.start < 0 or item.end > len(item.block_table) * self.block_size:
                raise InternalError(
                    f"{item.request_id}: {item.start}..{item.end} doesn't fit {len(item.block_table)} blocks"
                )
            for block in item.block_table[: -(-item.end // self.block_size)]:
                users.setdefault(block, []).append(number)
        for item in batch.slices:
            for place in range(item.start // self.block_size, -(-item.end // self.block_size)):
                if len(users[item.block_table[place]]) > 1:
                    raise InternalError(f"{item.request_id} writes into shared block {item.block_table[place]}")

    def _run_slice(self, item: Slice) -> list[SampledToken]:
        tokens: list[int] = []
        chains: list[int] = []
        chain = 0
        for position in range(item.end):
            place = position % self.block_size * SLOT_BYTES
            block = self._block(item.block_table[position // self.block_size])
            if position >= item.start:
                chain = _digest(chain, item.token_ids[position - item.start])
                _SLOT.pack_into(block, place, chain, item.token_ids[position - item.start], position + 1)
            found, token, mark = _SLOT.unpack_from(block, place)
            if mark != position + 1 or (position < item.start and found != _digest(chain, token)):
                raise InternalError(f"{item.request_id}: position {position} reads unwritten or foreign KV")
            chain = found
            tokens.append(token)
            chains.append(chain)
        if not item.drafts:
            return [self._sample(item, spec, tokens, chain) for spec in item.samples]
        ends = range(item.end - item.drafts, item.end + 1)
        drawn = [
            self._sample(item, spec, tokens[:end], chains[end - 1])
            for end, spec in zip(ends, item.samples, strict=True)
        ]
        return drawn[: item.standing([sampled.token_id for sampled in drawn])]

    def _sample(self, item: Slice, spec: SampleSpec, tokens: list[int], chain: int) -> SampledToken:
        if [*spec.prompt, *spec.output] != tokens or spec.position != len(spec.output):
            raise InternalError(
                f"{item.request_id}: cached tokens are not the sequence's, or position {spec.position} is wrong"
            )
        key = (0, 0) if spec.params.greedy else (spec.params.seed, spec.index)
        token = self._draw(chain, *key, spec.position, spec.suppress)
        if spec.logprobs is None:
            return SampledToken(token)
        top = tuple((token + i) % self.vocab_size for i in range(spec.logprobs))
        return SampledToken(token, TokenLogprobs(-0.5, top, tuple(-0.5 - i for i in range(spec.logprobs))))
