"""The same weights with layers skipped: a smaller model to draft with (Zhang et al., "Draft & Verify", 2023).

Nothing is copied: kept layers are the model's own, and so is their KV cache. What the whole model has cached of a token
stands for what the skipping one would have: for layers before the first skipped one the two are equal, for later ones
the whole model's is the better guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from engine.config import ModelConfig
from engine.kv_cache import KVCache
from engine.models.fused import FusedModel
from engine.models.transformer import Model
from tandem.errors import ConfigError


class KeptCache:
    """The whole model's cache for the kept layers. What the fused step and copies take has all layers."""

    def __init__(self, cache: KVCache, layers: Sequence[int]) -> None:
        """`layers` as in `keep_layers`."""
        self.blocks, self.tensor, self.scales, self.order = cache.blocks, cache.tensor, cache.scales, cache.order
        self._cache, self._layers = cache, tuple(layers)

    def layer(self, index: int) -> Tensor:
        """K and V of the kept layer at place `index`."""
        return self._cache.layer(self._layers[index])

    def layer_scales(self, index: int) -> Tensor | None:
        """Scales of the kept layer at place `index`."""
        return self._cache.layer_scales(self._layers[index])


def keep_layers(model: Model | FusedModel, layers: Sequence[int]) -> Model | FusedModel:
    """`model` without the other layers, over the same weights; its cache is a `KeptCache` of the model's. `layers` are
    places, rising.
    """
    config = _kept_config(model.config, layers)
    if isinstance(model, FusedModel):
        return replace(model, config=config, kernel=model.kernel.keeping(layers))
    return replace(model, config=config, layers=[model.layers[place] for place in layers])


def parse_layers(text: str, num_layers: int, *, flag: str) -> tuple[int, ...]:
    """Layers to keep: a number of them, spread evenly with the first and the last, or a list as `0-3,7,28-29`.

    Raises ConfigError, naming `flag`: not such a text, a layer that there isn't, or all of them.
    """
    try:
        if text.isdecimal():
            layers = _spread(int(text), num_layers)
        else:
            layers = tuple(sorted({place for part in text.split(",") for place in _range(part)}))
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is neither a number of layers nor a list like 0-3,7,28-29") from None
    if not layers or layers[-1] >= num_layers or len(layers) >= num_layers:
        raise ConfigError(
            f"{flag}: {text!r} must keep 1 to {num_layers - 1} of the model's layers 0 to {num_layers - 1}"
        )
    return layers


def _spread(count: int, num_layers: int) -> tuple[int, ...]:
    """`count` places, the first and the last among them, as evenly as whole numbers can be."""
    if count < 2:
        return tuple(range(count))
    if count > num_layers:
        return tuple(range(count))
    return tuple(round(i * (num_layers - 1) / (count - 1)) for i in range(count))


def _range(part: str) -> range:
    first, dash, last = part.strip().partition("-")
    return range(int(first), int(last if dash else first) + 1)


def _kept_config(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    sliding = config.sliding_layers
    kept = None if sliding is None else tuple(sliding[place] for place in layers)
    return replace(config, num_layers=len(layers), sliding_layers=kept)
