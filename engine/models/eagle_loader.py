"""Loads EAGLE heads from the folders in which they are published: config.json and safetensors.

Names are those of SafeAILab/EAGLE, which vLLM reads too: `fc`, `layers.0.*` (EAGLE-1) or `midlayer.*` (EAGLE-3),
`norm`, `lm_head`, `d2t` (for each row of the LM head how far its token's id is beyond its own). Embeddings are the
target's, unless the head's width is another: then it brings its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models.eagle import EagleHead, EagleLayer
from engine.models.embedding import TableEmbedding
from engine.models.rope import rope_tables
from engine.models.transformer import Embedding, Linear, Model, Product
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.fields import Fields
from engine.weights.hf_config import read_json
from kernels.linear import pack_linear
from tandem.errors import ModelFormatError

EMBEDDING: Final = "embed_tokens.weight"
HEAD: Final = "lm_head.weight"
UNREAD: Final = ("t2d",)
"""What training needs."""


def load_eagle(path: str, target: Model, max_positions: int) -> EagleHead:
    """The head in the folder `path`, for `target` and positions below `max_positions`.

    Raises ModelFormatError: not such a folder, or one for another target.
    """
    checkpoint = open_checkpoint(path)
    try:
        return _Loader(checkpoint, Path(path), target).load(max_positions)
    finally:
        checkpoint.close()


class _Loader:
    """Life cycle: built, `load` once, thrown away."""

    def __init__(self, checkpoint: Checkpoint, path: Path, target: Model) -> None:
        self._checkpoint, self._path, self._target = checkpoint, path, target
        self._config: ModelConfig = checkpoint.config
        self._fields = Fields(str(path / "config.json"), read_json(path / "config.json"))
        self._names = set(checkpoint.names())
        self._third = any(name.endswith("hidden_norm.weight") for name in self._names)
        self._unread = self._names - set(UNREAD)

    def load(self, max_positions: int) -> EagleHead:
        """The whole head."""
        self._check_target()
        width = self._config.hidden_size
        taps = self._taps() if self._third else ()
        inputs = len(taps) * self._target.config.hidden_size if taps else 2 * width
        cos, sin = rope_tables(self._config.rope, max_positions)
        head = EagleHead(
            config=self._config,
            taps=taps,
            embedding=self._embedding(),
            fuse=self._linear(["fc"], [width], inputs),
            layer=self._layer(width),
            norm=self._vector("norm.weight", width) if self._third else None,
            lm_head=self._lm_head(width),
            token_ids=self._token_ids(),
            normed_residual=self._fields.boolean("norm_before_residual", False),
            cos=cos,
            sin=sin,
        )
        if self._unread:
            raise ModelFormatError(f"{self._path}: an EAGLE head has no use for tensor {sorted(self._unread)[0]}")
        return head

    def _check_target(self) -> None:
        config, target = self._config, self._target.config
        if config.num_layers != 1:
            raise self._fields.error("num_hidden_layers", f"must be 1 in an EAGLE head, not {config.num_layers}")
        if config.vocab_size != target.vocab_size:
            raise self._fields.error("vocab_size", f"{config.vocab_size}, the model has {target.vocab_size} token ids")
        if not self._third and config.hidden_size != target.hidden_size:
            raise self._fields.error("hidden_size", f"{config.hidden_size}, the model's is {target.hidden_size}")
        hidden = self._fields.integer("target_hidden_size", target.hidden_size)
        if hidden != target.hidden_size:
            raise self._fields.error("target_hidden_size", f"{hidden}, the model's is {target.hidden_size}")

    def _taps(self) -> tuple[int, ...]:
        """Three layers, from low to high: those that the config names, else those of the published heads."""
        key, layers = "eagle_aux_hidden_state_layer_ids", self._target.config.num_layers
        nested = self._fields.get("eagle_config")
        found = nested.get(key) if isinstance(nested, Mapping) else self._fields.get(key)
        if found is None:
            return 2, layers // 2, layers - 3
        if not isinstance(found, list) or not all(isinstance(i, int) and 0 <= i < layers for i in found) or not found:
            raise self._fields.error(key, f"must be a list of layers below the model's {layers}, not {found!r}")
        return tuple(found)

    def _layer(self, width: int) -> EagleLayer:
        at = "midlayer" if any(name.startswith("midlayer.") for name in self._names) else "layers.0"
        config, attention = self._config, f"{at}.self_attn"
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = [f"{attention}.{part}_proj" for part in "qkv"]
        norms = {
            name: self._vector(f"{at}.{name}.weight", width) if self._third else None
            for name in ("input_layernorm", "hidden_norm")
        }
        return EagleLayer(
            input_norm=norms["input_layernorm"],
            hidden_norm=norms["hidden_norm"],
            qkv=self._linear(qkv, [query, key, key], 2 * width if self._third else width),
            output=self._linear([f"{attention}.o_proj"], [width], query),
            post_norm=self._vector(f"{at}.post_attention_layernorm.weight", width),
            gate_up=self._linear(
                [f"{at}.mlp.{part}_proj" for part in ("gate", "up")], [config.intermediate_size] * 2, width
            ),
            down=self._linear([f"{at}.mlp.down_proj"], [width], config.intermediate_size),
        )

    def _embedding(self) -> Embedding:
        same = self._config.hidden_size == self._target.config.hidden_size
        if same:
            self._unread.discard(EMBEDDING)
            return self._target.embedding
        return TableEmbedding(self._take(EMBEDDING, (self._config.vocab_size, self._config.hidden_size)).clone())

    def _lm_head(self, width: int) -> Product:
        if not self._third or HEAD not in self._names:
            self._unread.discard(HEAD)
            if width != self._target.config.hidden_size:
                raise ModelFormatError(f"{self._path}: tensor {HEAD} is missing")
            return self._target.head
        rows = self._fields.integer("draft_vocab_size", self._config.vocab_size)
        return self._linear(["lm_head"], [rows], width)

    def _token_ids(self) -> Tensor | None:
        """`d2t` turned into ids."""
        if "d2t" not in self._names:
            return None
        (stored,) = (tensor for tensor in self._checkpoint.stored() if tensor.name == "d2t")
        rows = self._fields.integer("draft_vocab_size", self._config.vocab_size)
        if stored.type != "I64" or stored.shape != (rows,):
            raise ModelFormatError(f"{self._path}: d2t must be I64 [{rows}], not {stored.type} {list(stored.shape)}")
        self._unread.discard("d2t")
        ids = np.frombuffer(stored.data, np.int64) + np.arange(rows)
        if len(np.unique(ids)) != rows or int(ids.min()) < 0 or int(ids.max()) >= self._config.vocab_size:
            raise ModelFormatError(f"{self._path}: d2t names a token twice or one outside the vocabulary")
        return torch.from_numpy(ids)

    def _linear(self, names: Sequence[str], outputs: Sequence[int], inputs: int) -> Linear:
        """The product of all `names` fused, with their biases where the files have them."""
        parts = [
            self._take(f"{name}.weight", (rows, inputs)).float() for name, rows in zip(names, outputs, strict=True)
        ]
        packed = pack_linear(parts, "exact")
        if f"{names[0]}.bias" not in self._names:
            return Linear(packed)
        return Linear(
            packed, torch.cat([self._vector(f"{n}.bias", rows) for n, rows in zip(names, outputs, strict=True)])
        )

    def _vector(self, name: str, length: int) -> Tensor:
        return self._take(name, (length,)).to(torch.float32, copy=True)

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._checkpoint.shape(name)
        if found != shape:
            raise ModelFormatError(f"{self._path}: tensor {name} has shape {list(found)}; expected {list(shape)}")
        self._unread.discard(name)
        return self._checkpoint.tensor(name)
