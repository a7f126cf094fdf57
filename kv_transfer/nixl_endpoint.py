"""What a NIXL source says of itself in Open: whose pool, where it lies, and its agent's metadata, as bytes.

The same bytes for an incarnation's whole life. Of the metadata, which NIXL writes, the head is read here as well: the
agent's name and its addresses, for nobody else may have either (`claims`), and no agent is loaded under another's name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kv_transfer.messages import MAX_INCARNATION
from kv_transfer.pool import MAX_POOL_BYTES
from kv_transfer.segments import DEVICE, HOST, Segment
from tandem.errors import InvalidRequestError

_MAGIC = b"tandem-nixl-2:"
_HEAD = struct.Struct("<BIQQQQHHI")
_KINDS = (HOST, DEVICE)
MAX_BLOCKS = 1 << 20
"""A receiver keeps descriptors of every block, of about 100 bytes each."""
_NIXL_MAGIC = b"nixlSerDes|"
_NIXL_LENGTH = struct.Struct("<Q")
_MAX_BACKENDS = 8
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

    def claims(self) -> tuple[bytes, ...]:
        """What no other incarnation may present: the agent's name and each of its addresses.

        Raises InvalidRequestError when the metadata's agent isn't the one that the endpoint names, or isn't NIXL's.
        """
        name, addresses = metadata_head(self.metadata)
        if name != self.agent.encode():
            raise InvalidRequestError("the endpoint names another agent than its metadata", field="open.endpoint")
        return (name, *addresses)

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
        if not all(sizes) or max(sizes[:2]) > MAX_INCARNATION or sizes[2] > _MAX_METADATA:
            raise _malformed()
        if not 0 < num_blocks <= MAX_BLOCKS or not 0 < nbytes <= MAX_POOL_BYTES or nbytes % num_blocks:
            raise _malformed()
        if address + nbytes > _MAX_ADDRESS or generations + 8 * num_blocks > _MAX_ADDRESS:
            raise _malformed()
        incarnation, agent = data[at : at + sizes[0]], data[at + sizes[0] : at + sizes[0] + sizes[1]]
        try:
            names = incarnation.decode(), agent.decode()
        except UnicodeDecodeError as error:
            raise _malformed() from error
        return cls(*names, Segment(address, nbytes, _KINDS[kind], device), generations, num_blocks, data[-sizes[2] :])


def metadata_head(metadata: bytes) -> tuple[bytes, list[bytes]]:
    """Of an agent's metadata its name, and its address for each backend. Raises InvalidRequestError.

    As NIXL's serializer writes it: tag, length of the value, value and a bar, for `Agent`, `Conns` (how many), and for
    each of them `t` (backend) and `c` (address).
    """
    if not metadata.startswith(_NIXL_MAGIC):
        raise _malformed()
    name, at = _field(metadata, len(_NIXL_MAGIC), b"Agent")
    count, at = _field(metadata, at, b"Conns")
    if len(count) != _NIXL_LENGTH.size or not 0 < (backends := _NIXL_LENGTH.unpack(count)[0]) <= _MAX_BACKENDS:
        raise _malformed()
    addresses = []
    for _ in range(backends):
        backend, at = _field(metadata, at, b"t")
        address, at = _field(metadata, at, b"c")
        addresses.append(backend + b"|" + address)
    return name, addresses


def _field(data: bytes, at: int, tag: bytes) -> tuple[bytes, int]:
    """Its value, which isn't empty, and where the next one begins."""
    start = at + len(tag) + _NIXL_LENGTH.size
    if data[at : at + len(tag)] != tag or len(data) < start:
        raise _malformed()
    end = start + _NIXL_LENGTH.unpack_from(data, at + len(tag))[0]
    if not start < end < len(data) or data[end : end + 1] != b"|":
        raise _malformed()
    return data[start:end], end + 1


def _malformed() -> InvalidRequestError:
    return InvalidRequestError("malformed endpoint for transport nixl", field="open.endpoint")
