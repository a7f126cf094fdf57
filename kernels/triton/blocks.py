"""Whole blocks of the paged KV cache on a GPU: copied within it, gathered from it for a transfer or a swap, scattered
into it.

A block is moved as bytes, whatever its dtype. A cache may be a range of layers of a larger one, `cache[:, 2:5]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launch, require, require_dense
from tandem.errors import InternalError

BLOCK = 2048
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit
def _move(
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    words: tl.tensor,
    FROM_IDS: tl.constexpr,
    TO_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    source = tl.load(sources_ptr + index) if FROM_IDS else index
    target = tl.load(targets_ptr + index) if TO_IDS else index
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < words
    values = tl.load(source_ptr + source * source_stride + at, mask=mask)
    tl.store(target_ptr + target * target_stride + at, values, mask=mask)


def move_launch(
    source: torch.Tensor,
    target: torch.Tensor,
    sources: torch.Tensor | None,
    targets: torch.Tensor | None,
    count: int,
) -> Launch:
    """The launch that moves `count` blocks: from sources[i] (or i) to targets[i] (or i)."""
    source, target = _as_words(source, target)
    words = source.shape[1]
    args = {
        "source_ptr": source,
        "target_ptr": target,
        "sources_ptr": source if sources is None else sources,
        "targets_ptr": target if targets is None else targets,
        "source_stride": source.stride(0),
        "target_stride": target.stride(0),
        "words": words,
    }
    constexprs = {"FROM_IDS": sources is not None, "TO_IDS": targets is not None, "BLOCK": BLOCK}
    return Launch(_move, (count, -(-words // BLOCK)), args, constexprs)


def _as_words(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each as [blocks, words], of the widest integers that all of them are multiples of."""
    size = math.prod(tensors[0].shape[1:]) * tensors[0].element_size()
    steps = [size]
    for tensor in tensors:
        steps += [tensor.stride(0) * tensor.element_size(), int(tensor.storage_offset()) * tensor.element_size()]
    word = next(dtype for dtype in WORDS if all(step % dtype.itemsize == 0 for step in steps))
    flat = [t.as_strided((t.shape[0], math.prod(t.shape[1:])), (t.stride(0), 1)) for t in tensors]
    return [tensor.view(word) for tensor in flat]


def copy_blocks(cache: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy block `source` over block `target` for each (source, target), all at once: copy-on-write.

    `cache` is [num_blocks, ...], dense in a block, any dtype. Raises InternalError for another cache, a block outside
    it, or a target that another pair names too.
    """
    if not pairs:
        return
    _check_cache(cache)
    named = [block for pair in pairs for block in pair]
    if not all(0 <= block < cache.shape[0] for block in named):
        raise InternalError(f"a block of {list(pairs)} is outside [0, {cache.shape[0]})")
    targets = {target for _, target in pairs}
    if len(targets) < len(pairs) or targets & {source for source, _ in pairs}:
        raise InternalError(f"the copies {list(pairs)} depend on their order: a target is named twice")
    ids = torch.tensor(pairs, dtype=torch.int64, device=cache.device).T.contiguous()
    move_launch(cache, cache, ids[0], ids[1], len(pairs)).run()


def gather_blocks(cache: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return blocks `ids` int64 [n] of the cache, one after another: [n, ...], in `out` if given.

    Raises InternalError for wrong shapes or dtypes; ids outside the cache are the caller's to avoid.
    """
    _check_cache(cache)
    require_dense("ids", ids, (ids.numel(),), (torch.int64,), cache)
    shape = (ids.shape[0], *cache.shape[1:])
    if out is None:
        out = torch.empty(shape, dtype=cache.dtype, device=cache.device)
    else:
        require_dense("out", out, shape, (cache.dtype,), cache)
    if ids.shape[0]:
        move_launch(cache, out, ids, None, ids.shape[0]).run()
    return out


def scatter_blocks(cache: torch.Tensor, ids: torch.Tensor, blocks: torch.Tensor) -> None:
    """Write blocks [n, ...] over blocks `ids` int64 [n] of the cache, no id twice.

    Raises InternalError for wrong shapes or dtypes; ids outside the cache are the caller's to avoid.
    """
    _check_cache(cache)
    require_dense("ids", ids, (ids.numel(),), (torch.int64,), cache)
    require_dense("blocks", blocks, (ids.shape[0], *cache.shape[1:]), (cache.dtype,), cache)
    if ids.shape[0]:
        move_launch(blocks, cache, None, ids, ids.shape[0]).run()


def _check_cache(cache: torch.Tensor) -> None:
    good = cache.dim() >= 2 and cache.shape[0] > 0 and cache[0].is_contiguous()
    require(good, "cache", cache, "[num_blocks, ...], dense in a block")
