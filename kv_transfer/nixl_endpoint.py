"""What a NIXL source says of itself in Open: whose pool, where it lies, and its agent's metadata, as bytes.

The same bytes for an incarnation's whole life.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kv_transfer.pool import MAX_POOL_BYTES
from kv_transfer.segments import DEVICE, HOST, Segment
from tandem.errors import InvalidRequestError

_MAGIC = b"tandem-nixl-1:"
_HEAD = struct.Struct("<BIQQQQHHI")
_KINDS = (HOST, DEVICE)
MAX_NAME_BYTES = 256
_MAX_METADATA = 1 << 16
_MAX_ADDRESS = 1 << 64


@dataclass(frozen=True)
class Endpoint:
    """A source, as its peers must know it."""

    incarnation: str
    agent: str
    """The agent's name: random, so that nobody can pass for another's."""
    blocks: Segment
    generations: int
    """Address, in host memory."""
    num_blocks: int
    metadata: bytes
    """Of the agent, with both segments registered."""

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
        return self.blocks.nbytes // self.num_blocks

    def encode(self) -> bytes:
        """For Open."""
        blocks, names = self.blocks, (self.incarnation.encode(), self.agent.encode())
        head = _HEAD.pack(
            _KINDS.index(blocks.kind),
            blocks.device,
            blocks.address,
            blocks.nbytes,
            self.generations,
            self.num_blocks,
            len(names[0]),
            len(names[1]),
            len(self.metadata),
        )
        return b"".join((_MAGIC, head, *names, self.metadata))

    @classmethod
    def decode(cls, data: bytes) -> Endpoint:
        """Raises InvalidRequestError for what no source says."""
        at = len(_MAGIC) + _HEAD.size
        if not data.startswith(_MAGIC) or len(data) < at:
            raise _malformed()
        kind, device, address, nbytes, generations, num_blocks, *sizes = _HEAD.unpack_from(data, len(_MAGIC))
        if len(data) != at + sum(sizes) or kind >= len(_KINDS):
            raise _malformed()
        if not all(sizes) or max(sizes[:2]) > MAX_NAME_BYTES or sizes[2] > _MAX_METADATA:
            raise _malformed()
        if not num_blocks or not 0 < nbytes <= MAX_POOL_BYTES or nbytes % num_blocks:
            raise _malformed()
        if address + nbytes > _MAX_ADDRESS or generations + 8 * num_blocks > _MAX_ADDRESS:
            raise _malformed()
        incarnation, agent = data[at : at + sizes[0]], data[at + sizes[0] : at + sizes[0] + sizes[1]]
        try:
            names = incarnation.decode(), agent.decode()
        except UnicodeDecodeError as error:
            raise _malformed() from error
        return cls(*names, Segment(address, nbytes, _KINDS[kind], device), generations, num_blocks, data[-sizes[2] :])


def _malformed() -> InvalidRequestError:
    return InvalidRequestError("malformed endpoint for transport nixl", field="open.endpoint")
