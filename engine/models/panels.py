"""Where a model's packed weights lie: in memory of this process, or in one memory for all processes that load the same.

With compute int8 the packed weights are nearly all of a model, so what else a process holds (norms, tables) stays its
own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from engine.config import ModelConfig
from engine.models.tensors import fused_shapes, most_bytes
from engine.weights import sharing
from engine.weights.sharing import Panel, Share
from kernels import build, dispatch
from kernels.int8 import ZEROS, GroupWeights, Int8Linear, pack_int8, packed_bytes
from kernels.memory import Arena
from tandem.errors import ConfigError, IncompatibleError, InternalError

logger = logging.getLogger("engine")

FORMAT: Final = 2
"""Raised when the same checkpoint gives other panels: other fused parts, another order, another rounding in Python."""


def sharing_key(identity: str) -> str:
    """Processes may share panels when theirs are equal: what was read, and the code that packs it.

    Nothing of `EngineConfig` changes a packed byte of compute int8.
    """
    facts = [FORMAT, identity, build.library_key("int8.cpp"), dispatch.int8_isa()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class Panels:
    """The packed weights of one model while it is loaded. `received` and `pack` may be called by many threads.

    Life: made -> all weights received, or all packed -> `finish`; or `abandon`, when loading fails.
    """

    def __init__(self, config: ModelConfig, identity: str | None) -> None:
        """`identity` of the checkpoint; None shares with nobody. May wait for a process that is packing the same.

        Raises ConfigError when the memory can't be reserved.
        """
        self._shapes = fused_shapes(config)
        self._capacity = most_bytes(config, packed_bytes)
        self._known: dict[str, Int8Linear] = {}
        self._share: Share | None = None
        if identity is not None and dispatch.select().name == "cpp":
            self._share = sharing.join(sharing_key(identity), self._capacity)
        self._arena = self._shared_arena() or Arena(self._capacity)
        self._taken = dict(self._known)

    def received(self, name: str) -> Int8Linear | None:
        """The weight as another process packed it; None: it is to be packed here. `name` is of `fused_shapes`."""
        return self._taken.get(name)

    def pack(self, name: str, parts: Sequence[GroupWeights], order: torch.Tensor | None = None) -> Int8Linear:
        """See `kernels.int8.pack_int8`."""
        packed = self._known[name] = pack_int8(parts, order, self._arena)
        return packed

    def finish(self) -> None:
        """All is there. Give it to others from now on, until the last weight is freed."""
        share = self._share
        if share is None:
            return
        try:
            if share.manifest is None:
                share.publish(_manifest(self._known))
                self._arena.freeze()
            share.start()
        except OSError as error:
            _say_alone(error)
            share.close()
            return
        self._arena.when_freed(share.close)

    def abandon(self) -> None:
        """Let whoever waits for these weights pack them."""
        if self._share is not None:
            self._share.close()

    def _shared_arena(self) -> Arena | None:
        share = self._share
        if share is None:
            return None
        try:
            arena = Arena(self._capacity, share.fd, filled=share.manifest is not None)
            if share.manifest is not None:
                self._known = _linears(share.manifest, self._shapes, arena)
        except (ConfigError, IncompatibleError) as error:
            _say_alone(error)
            share.close()
            self._share = None
            return None
        return arena


def _say_alone(error: Exception) -> None:
    # As text: a log record that somebody keeps must not keep the traceback's frames, and by them the memory.
    logger.warning("weights are not shared: %s", str(error))


def _manifest(linears: Mapping[str, Int8Linear]) -> dict[str, Panel]:
    found = {}
    for name, linear in linears.items():
        assert linear.panels is not None, "only the C++ kernels' panels are shared"
        offset = int(linear.panels.storage_offset())
        found[name] = Panel(offset, linear.panels.nbytes, linear.n, linear.k, linear.bits)
    return found


def _linears(
    manifest: Mapping[str, Panel], shapes: Mapping[str, tuple[int, int]], arena: Arena
) -> dict[str, Int8Linear]:
    """What the manifest says, over the mapped memory. Raises IncompatibleError for anything but the model's weights."""
    if manifest.keys() != shapes.keys():
        raise IncompatibleError("another process's weights have other names")
    found = {}
    for name, panel in manifest.items():
        sound = (panel.n, panel.k) == shapes[name] and panel.bits in ZEROS
        if not sound or panel.nbytes != packed_bytes(panel.n, panel.k, panel.bits):
            raise IncompatibleError(f"another process's weight {name} can't be: {panel}")
        try:
            found[name] = Int8Linear(panel.n, panel.k, panel.bits, arena.at(panel.offset, panel.nbytes))
        except InternalError as error:
            raise IncompatibleError(f"another process's weight {name} can't be: {error}") from error
    return found
