"""A quantised Hugging Face folder seen as any other checkpoint: a layer's tensors stand for one weight by its own name.

Life cycle: as `engine.weights.checkpoint.Checkpoint` says. The folder is opened and checked by `safetensors`; here
`x.qweight` with its scales, or whatever the tool writes, becomes `x.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.weights.checkpoint import StoredTensor, kv_scale_names
from engine.weights.int8_codes import group_weights
from engine.weights.quantized import Quantization, Scheme
from engine.weights.quantized_parts import Parts
from engine.weights.quantized_tensors import SUFFIXES, coded_shape, read_weight
from engine.weights.safetensors import EMBEDDING, HEAD, SafetensorsCheckpoint
from kernels.coded import FP8, CodedWeights
from kernels.int8 import GroupWeights
from tandem.errors import ModelFormatError

CODES: Final = ("qweight", "weight_packed", "_weight_qdata")
"""What codes are called where it isn't `weight`."""


class QuantizedCheckpoint:
    """A quantised folder, see the module's text. Owns `inner`."""

    def __init__(self, inner: SafetensorsCheckpoint, quantization: Quantization) -> None:
        """Raises ModelFormatError for tensors that don't belong together, or a layer that the file leaves alone."""
        self._inner = inner
        self._quantization = quantization
        self._source = str(inner.folder)
        self._raw = _Raw(inner)
        self._coded = self._find_layers()
        self._idle = frozenset(self._idle_biases())
        self._check_kv_scales()
        self._names = self._find_names()
        self._config = self._own_config()

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self._config

    @property
    def files(self) -> Sequence[Path]:
        """As the folder's."""
        return self._inner.files

    @property
    def coding(self) -> str:
        """What the stored bytes mean, beside their types: part of the model's identity."""
        return self._quantization.facts

    @property
    def kv_scales(self) -> str:
        """What `kv_cache_scheme` says, else 8-bit floats."""
        return self._quantization.kv_scales or self._inner.kv_scales

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Layer -> how its weight is stored, of those that are quantised."""
        return self._coded

    def names(self) -> Sequence[str]:
        """All weights, sorted; those of quantised layers once each."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The weight's shape, outermost first."""
        scheme = self._scheme(name)
        return self._inner.shape(name) if scheme is None else coded_shape(self._parts(name), scheme)

    def tensor(self, name: str) -> Tensor:
        """The tensor; float32 (new memory) where it is quantised."""
        coded = self.coded(name)
        return self._inner.tensor(name) if coded is None else coded.dequantized()

    def coded(self, name: str) -> CodedWeights | None:
        """The weight as the file's codes, new memory; None: it is stored as plain numbers."""
        scheme = self._scheme(name)
        return None if scheme is None else read_weight(self._parts(name), scheme)

    def codes(self, name: str) -> GroupWeights | None:
        """As `coded`, for `kernels.int8`; None also where its groups can't hold them."""
        coded = self.coded(name)
        return None if coded is None else group_weights(coded)

    def release(self, name: str) -> None:
        """Give the source pages of all the weight's tensors back."""
        if self._scheme(name) is None:
            self._inner.release(name)
            return
        parts = self._parts(name)
        for suffix in ("weight", *SUFFIXES):
            if parts.has(suffix):
                self._inner.release(f"{parts.layer}.{suffix}")

    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor as the files hold it."""
        return self._inner.stored()

    def close(self) -> None:
        """Unmap the files."""
        self._inner.close()

    def _scheme(self, name: str) -> Scheme | None:
        return self._coded.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def _parts(self, name: str) -> Parts:
        return Parts(self._raw, name.removesuffix(".weight"), self._source)

    def _find_layers(self) -> dict[str, Scheme]:
        """Every layer that has codes, and how they are stored."""
        found, names = {}, frozenset(self._inner.names())
        for name in sorted(names):
            layer, _, suffix = name.rpartition(".")
            if suffix in CODES or (suffix == "weight" and self._inner.dtype(name) in (torch.int8, torch.uint8, FP8)):
                found[layer] = self._scheme_of(layer, name)
        self._refuse_strays(names, found)
        return found

    def _scheme_of(self, layer: str, name: str) -> Scheme:
        scheme = self._quantization.scheme(layer)
        if scheme is None:
            raise self._error(f"tensor {name} is quantised, but quantization_config leaves {layer} alone")
        if _weight(layer) == EMBEDDING:
            raise self._error(f"tensor {name}: quantised embeddings are not supported")
        return scheme

    def _find_names(self) -> tuple[str, ...]:
        hidden = {f"{layer}.{suffix}" for layer in self._coded for suffix in SUFFIXES} | self._idle
        return tuple(sorted(({*self._inner.names()} - hidden) | {_weight(layer) for layer in self._coded}))

    def _refuse_strays(self, names: frozenset[str], found: Mapping[str, Scheme]) -> None:
        """Scales of no codes, codes beside a plain weight, and plain weights where codes should be."""
        for name in sorted(names):
            layer, _, suffix = name.rpartition(".")
            if suffix in SUFFIXES and layer not in found:
                scheme = self._quantization.scheme(layer)
                plain = "" if scheme is None else scheme.codes_name
                wanted = {None: "codes", "packed": "weight_packed", "plain": f"{plain} as int8 or FP8"}
                codes = wanted.get(None if scheme is None else scheme.packing, "qweight")
                raise self._error(f"tensor {layer}.{codes} is missing; expected beside {name}")
            if suffix in CODES and _weight(layer) in names:
                raise self._error(f"tensors {name} and {_weight(layer)} are two weights of one layer")

    def _idle_biases(self) -> Iterator[str]:
        """Biases of zeros, which AutoGPTQ once gave every layer, whether or not the model has any."""
        names = frozenset(self._inner.names())
        for layer, scheme in self._coded.items():
            bias = f"{layer}.bias"
            if scheme.packing == "gptq" and bias in names and not bool(self._inner.raw(bias).any()):
                yield bias

    def _check_kv_scales(self) -> None:
        """What kv_cache_scheme promises."""
        layers = range(self._inner.config.num_layers) if self._quantization.kv_scales else ()
        names = frozenset(self._inner.names())
        wanted = [name for layer in layers for name in kv_scale_names(f"model.layers.{layer}.self_attn", names)]
        missing = sorted({*wanted} - names)
        if missing:
            raise self._error(f"tensor {missing[0]} is missing, which kv_cache_scheme names; expected one number")

    def _own_config(self) -> ModelConfig:
        config = self._inner.config
        described = sorted({scheme.describe() for scheme in self._coded.values()})
        kind = f"{self._quantization.method}: {'; '.join(described) or 'nothing'}"
        tied = config.tie_embeddings and HEAD.removesuffix(".weight") not in self._coded
        return replace(config, quantization=kind, tie_embeddings=tied)

    def _error(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self._source}: {problem}")


class _Raw:
    """`RawTensors` of a folder."""

    def __init__(self, inner: SafetensorsCheckpoint) -> None:
        self._inner = inner
        self._names = frozenset(inner.names())

    def names(self) -> frozenset[str]:
        """All of them."""
        return self._names

    def raw(self, name: str) -> Tensor:
        """See `SafetensorsCheckpoint.raw`."""
        return self._inner.raw(name)


def _weight(layer: str) -> str:
    return f"{layer}.weight"
