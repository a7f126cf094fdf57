"""One fused step: from token ids to logits in one call, with int8 products (`kernels.int8`).

What surrounds the products (norms, rotation, cache writes, attention, silu, quantising) runs in the same parallel
region, so that no Python and no thread start stands between them: at batch 1 that is most of a step. Every operation is
the one of its own file (norm.h, rope.h, attention_bf16.h, int8.h), so calling the public operations one by one gives
the same bits: the parity test does that.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import build, check
from kernels.attention import MAX_GROUP, MAX_HEAD_DIM
from kernels.int8 import GROUP, Int8Linear, MatrixArgs
from kernels.kv_codes import FORMATS, FixedScales, check_scales
from kernels.kv_order import PAIRED, PLAIN, check_order
from tandem.errors import InternalError

MAX_HIDDEN = 1 << 15
HALF_PANEL = 16
"""Gate columns of a panel; the other half are their up columns."""
_COMPLAINTS = {
    1: "a token id is outside the vocabulary",
    2: "a position or a slot is out of range",
    3: "a sampled row is out of range",
    4: "a sequence's query_starts, context_len and block_table do not fit together or leave the cache",
}


@dataclass(frozen=True, eq=False)
class StepLinear:
    """A product of the step with its bias float32 [N] or None."""

    packed: Int8Linear
    bias: torch.Tensor | None = None

    def args(self) -> MatrixArgs:
        """For C++."""
        return self.packed.args(self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, eq=False)
class StepLayer:
    """One layer's weights. `gate_up` columns are in `gate_up_order`; norms are float32 [W], head norms [D] or None."""

    input_norm: torch.Tensor
    qkv: StepLinear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: StepLinear
    post_norm: torch.Tensor
    gate_up: StepLinear
    down: StepLinear
    window: int | None
    fine_down: bool
    """True: down's input is taken in 15 bits."""
    kv_scales: FixedScales | None = None
    """Used for 8-bit keys and values in place of each row's own; None: a row's own."""


@dataclass(frozen=True)
class StepShape:
    """Sizes of the model, as in `engine.config.ModelConfig`."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float
    interleaved_rope: bool

    def why_not(self) -> str | None:
        """None when `Step` can run this shape, else what stands against it."""
        group = self.heads // self.kv_heads
        if self.heads % self.kv_heads or group > MAX_GROUP:
            return f"{self.heads} heads must be 1 to {MAX_GROUP} times the {self.kv_heads} KV heads"
        attended = group * self.head_dim
        if self.hidden % GROUP or self.inner % GROUP or attended % GROUP:
            return f"hidden {self.hidden}, inner {self.inner} and heads' width {attended} must be multiples of {GROUP}"
        if self.hidden > MAX_HIDDEN or self.head_dim > MAX_HEAD_DIM or self.head_dim % 8:
            return f"hidden {self.hidden} (most {MAX_HIDDEN}) or head_dim {self.head_dim} (most {MAX_HEAD_DIM}, by 8)"
        return None


def gate_up_order(inner: int) -> torch.Tensor:
    """Where the rows of gate [inner], then up [inner], go: 16 gates, the 16 ups that belong to them, and so on."""
    row = torch.arange(inner)
    gate = row // HALF_PANEL * 2 * HALF_PANEL + row % HALF_PANEL
    return torch.cat([gate, gate + HALF_PANEL])


class _LayerArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "query_norm", "key_norm")),
        *((name, MatrixArgs) for name in ("qkv", "output", "gate_up", "down")),
        ("window", ctypes.c_int64),
        ("fine_down", ctypes.c_int64),
        ("key_scale", ctypes.c_float),
        ("value_scale", ctypes.c_float),
        ("cache_layer", ctypes.c_int64),
    )


class _ModelArgs(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_LayerArgs)),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_layers",
                "hidden",
                "inner",
                "heads",
                "kv_heads",
                "dim",
                "half",
                "max_positions",
                "interleaved",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("final_norm", "cos", "sin")),
        ("head", MatrixArgs),
        ("table", ctypes.c_void_p),
        ("table_bf16", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("eps", ctypes.c_double),
    )


class _StepArgs(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("token_ids", "positions", "slots", "tables", "query_starts", "context_lens")
        ),
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "table_stride")),
        ("cache", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("layer_stride", "block_stride", "num_blocks", "block_size", "format", "paired")
        ),
        ("scales", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("scales_layer_stride", "scales_block_stride")),
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("greedy", "best", "logits")),
        ("workspace", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("step.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    lib.tandem_step_workspace.argtypes = [ctypes.POINTER(_ModelArgs), ctypes.c_int64, ctypes.c_int64]
    lib.tandem_step_workspace.restype = ctypes.c_int64
    lib.tandem_step.argtypes = [ctypes.POINTER(_ModelArgs), ctypes.POINTER(_StepArgs)]
    lib.tandem_step.restype = ctypes.c_int64
    return lib


class Step:
    """A model's weights wired for `run`. Life cycle: built once, `run` from one thread at a time, dropped."""

    def __init__(
        self,
        shape: StepShape,
        layers: Sequence[StepLayer],
        final_norm: torch.Tensor,
        head: StepLinear,
        table: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache_layers: Sequence[int] | None = None,
    ) -> None:
        """`table` [V, W] float32 or bfloat16 holds the embeddings; None: the head's weight does. `cos`, `sin` float32
        [positions, rotary_dim / 2]. `cache_layers` says which layer of the cache is each layer's; None: in order.

        Raises InternalError for a shape that it can't run.
        """
        if (reason := shape.why_not()) is not None:
            raise InternalError(reason)
        places = range(len(layers)) if cache_layers is None else cache_layers
        self._keep = (shape, tuple(layers), final_norm, head, table, cos, sin)  # what the pointers below point into
        self._layers = (_LayerArgs * len(layers))(*map(_layer_args, layers, places))
        self._cache_layers = max(places) + 1
        self._model = _ModelArgs(
            self._layers,
            len(layers),
            shape.hidden,
            shape.inner,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            cos.shape[1],
            cos.shape[0],
            shape.interleaved_rope,
            final_norm.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            head.args(),
            _pointer(table),
            table is not None and table.dtype is torch.bfloat16,
            shape.vocabulary,
            shape.eps,
        )
        self._vocabulary = shape.vocabulary
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, shape.vocabulary)

    def keeping(self, layers: Sequence[int]) -> Step:
        """A step of the same weights with no other than `layers` (places, rising) and their layers of the cache."""
        shape, every, final_norm, head, table, cos, sin = self._keep
        return Step(shape, [every[place] for place in layers], final_norm, head, table, cos, sin, cache_layers=layers)

    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        cache: torch.Tensor,
        rows: torch.Tensor,
        order: str = PLAIN,
        greedy: torch.Tensor | None = None,
        best: torch.Tensor | None = None,
        cache_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits float32 [R, V] of `rows` int64 [R]; writes the keys and values of all T rows to `cache`.

        token_ids, positions, slots int64 [T]; block_tables int32 [S, B]; query_starts int32 [S + 1]; context_lens int32
        [S]: as `engine.models.meta.ForwardMeta`. cache [blocks, layers, 2, Hkv, block_size, D], float32 or bfloat16, or
        int8 or float8_e4m3fn with `cache_scales` [blocks, layers, 2, Hkv, block_size], in `order`: paired only where
        `kernels.kv_order.best_order` says so.
        `greedy` uint8 [R], with `best` int64 [R]: rows where it is 1 get no logits, but in `best` the id of the largest
        (the lowest of equals), or -1 when they are not finite; other entries are left alone.
        The result is valid until the next `run`. Raises InternalError when something is out of range; then nothing was
        written.
        """
        check_order(order, cache.dtype, cache.shape[4], cache.shape[5])
        _check_cache(cache, cache_scales)
        if cache.shape[1] < self._cache_layers:
            raise InternalError(f"a cache of {cache.shape[1]} layers is too small for layer {self._cache_layers - 1}")
        if greedy is not None or best is not None:
            _check_greedy(greedy, best, rows.shape[0])
        logits = self._logits_of(rows.shape[0])
        step = _StepArgs(
            *(each.data_ptr() for each in (token_ids, positions, slots, block_tables, query_starts, context_lens)),
            token_ids.shape[0],
            *block_tables.shape,
            **_cache_args(cache, order, cache_scales),
            rows=rows.data_ptr(),
            num_rows=rows.shape[0],
            greedy=_pointer(greedy),
            best=_pointer(best),
            logits=logits.data_ptr(),
            workspace=self._memory(token_ids.shape[0], rows.shape[0]),
            threads=torch.get_num_threads(),
        )
        bad = _library().tandem_step(self._model, step)
        if bad:
            raise InternalError(_COMPLAINTS[bad])
        return logits

    def _logits_of(self, rows: int) -> torch.Tensor:
        """Kept from step to step: fresh pages for megabytes of logits would cost more than filling them."""
        if self._logits.shape[0] < rows:
            self._logits = torch.empty(rows, self._vocabulary)
        return self._logits[:rows]

    def _memory(self, tokens: int, rows: int) -> int:
        """Address of a workspace that is large enough, at a multiple of 64."""
        size = _library().tandem_step_workspace(self._model, tokens, rows) + 64
        if self._workspace.nbytes < size:
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return -(-self._workspace.data_ptr() // 64) * 64


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _cache_args(cache: torch.Tensor, order: str, scales: torch.Tensor | None) -> dict[str, int | None]:
    """The fields of `_StepArgs` that say where keys and values are."""
    return {
        "cache": cache.data_ptr(),
        "layer_stride": cache.stride(1),
        "block_stride": cache.stride(0),
        "num_blocks": cache.shape[0],
        "block_size": cache.shape[4],
        "format": FORMATS[cache.dtype],
        "paired": order == PAIRED,
        "scales": _pointer(scales),
        "scales_layer_stride": 0 if scales is None else scales.stride(1),
        "scales_block_stride": 0 if scales is None else scales.stride(0),
    }


def _check_cache(cache: torch.Tensor, scales: torch.Tensor | None) -> None:
    check.kv_layer(cache[:, 0], cache.shape[3], cache.shape[5])
    check_scales(cache[:, 0], None if scales is None else scales[:, 0])


def _check_greedy(greedy: torch.Tensor | None, best: torch.Tensor | None, rows: int) -> None:
    if greedy is None or best is None:
        raise InternalError("greedy and best go together")
    check.vector("greedy", greedy, torch.uint8, rows)
    check.vector("best", best, torch.int64, rows)


def _layer_args(layer: StepLayer, cache_layer: int) -> _LayerArgs:
    def pointer(tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        check.vector("norm", tensor, torch.float32)
        return tensor.data_ptr()

    return _LayerArgs(
        pointer(layer.input_norm),
        pointer(layer.post_norm),
        pointer(layer.query_norm),
        pointer(layer.key_norm),
        layer.qkv.args(),
        layer.output.args(),
        layer.gate_up.args(),
        layer.down.args(),
        layer.window or 0,
        layer.fine_down,
        *(layer.kv_scales or (0.0, 0.0)),
        cache_layer,
    )
