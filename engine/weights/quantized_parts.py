"""One quantised layer's tensors, taken by name with their type and shape checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tandem.errors import ModelFormatError


class RawTensors(Protocol):
    """An open checkpoint's tensors as they are stored."""

    def names(self) -> frozenset[str]:
        """All of them."""

    def raw(self, name: str) -> Tensor:
        """The tensor in its stored type, perhaps a view of the map: never write to it."""


@dataclass(frozen=True, slots=True)
class Parts:
    """One layer's tensors; `layer` such as `model.layers.0.mlp.up_proj`."""

    tensors: RawTensors
    layer: str
    source: str
    """The checkpoint's path, for messages."""
    taken: set[str] = field(default_factory=set, repr=False, compare=False)
    """Suffixes of what was read so far."""

    def has(self, suffix: str) -> bool:
        """True when the tensor `layer`.`suffix` is there."""
        return f"{self.layer}.{suffix}" in self.tensors.names()

    def take(self, suffix: str, types: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of one of `types` and one of `shapes` (none given: any). Raises ModelFormatError saying both."""
        name = f"{self.layer}.{suffix}"
        wanted = " or ".join(str(t).removeprefix("torch.") for t in types)
        wanted += "".join([" ", " or ".join(str(shape) for shape in shapes)] if shapes else [])
        if not self.has(suffix):
            raise ModelFormatError(f"{self.source}: tensor {name} is missing; expected {wanted}")
        self.taken.add(suffix)
        tensor = self.tensors.raw(name)
        if tensor.dtype not in types or (shapes and tuple(tensor.shape) not in shapes):
            found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise ModelFormatError(f"{self.source}: tensor {name} is {found}; expected {wanted}")
        return tensor

    def number(self, suffix: str, types: tuple[torch.dtype, ...]) -> float:
        """A positive number that stands alone. Raises ModelFormatError as `take`, and for any other number."""
        number = float(self.take(suffix, types, (), (1,)))
        if not 0 < number < math.inf:
            raise ModelFormatError(f"{self.source}: tensor {self.layer}.{suffix} is {number}; expected one over 0")
        return number

    def refuse_others(self, suffixes: Sequence[str]) -> None:
        """Raises ModelFormatError for the first of `suffixes` that is there and was not taken."""
        for suffix in suffixes:
            if suffix not in self.taken and self.has(suffix):
                problem = "is there, but quantization_config says nothing that it could be for"
                raise ModelFormatError(f"{self.source}: tensor {self.layer}.{suffix} {problem}")

    def matrix(self, suffix: str, types: tuple[torch.dtype, ...]) -> Tensor:
        """As `take`, of any shape with two sides."""
        tensor = self.take(suffix, types)
        if tensor.dim() != 2:
            shape = tuple(tensor.shape)
            raise ModelFormatError(f"{self.source}: tensor {self.layer}.{suffix} has shape {shape}; expected two sides")
        return tensor
