"""What a forward pass must know about its rows, beside their token ids, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.backends import HostStep


@dataclass(frozen=True, slots=True)
class ForwardMeta:
    """One step: T rows of S sequences, packed one sequence after another. All tensors are contiguous, on one device.

    Row i is token `positions[i]` of its sequence; its K and V go to slot `slots[i]` before attention reads them.
    On a GPU a slot of -1 is written nowhere, and a context of 0 is a row of padding.
    """

    positions: Tensor
    """int64 [T]: absolute position of each row in its sequence, from 0."""
    slots: Tensor
    """int64 [T]: where each row's K and V are written: block * block_size + offset."""
    block_tables: Tensor
    """int32 [S, B]: each sequence's blocks in order, padded with any valid block (0) on the right."""
    query_starts: Tensor
    """int32 [S+1]: rows query_starts[s] to query_starts[s+1] belong to sequence s; the last is T."""
    context_lens: Tensor
    """int32 [S]: tokens of each sequence in the cache after this step, its own rows included."""
    host: HostStep | None = None
    """The lengths where the host can read them; on a CPU the tensors do, and it is None."""


NOT_PICKED: Final = -100
"""In place of a token in `Predictions.best`: the row's logits are there."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a step says of the R rows that were asked for. Valid until the model's next step."""

    logits: Tensor
    """float32 [R, V] (or 16 bits, on a GPU); rows with an answer in `best` may be unfilled."""
    best: Tensor | None = None
    """int64 [R]: the id of the largest logit, `kernels.sampling.NOT_FINITE`, or NOT_PICKED; None: no row has one."""


@dataclass(slots=True)
class Taps:
    """Hidden states that a step is to keep of all its rows, for who drafts from them."""

    layers: tuple[int, ...]
    """The residual stream before each of these layers; none: the last hidden states, normed."""
    kept: list[Tensor] = field(default_factory=list)
    """Filled by the step: float32 [T, W] each, in the order of `layers`."""
