"""Packages of attention, installed for a test: fakes on the path, as distributions with a version; and what they all
compute. The fakes hold the contracts of the real ones, whose signatures they have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

FAKES = {
    "flashinfer": ("flashinfer", "flashinfer-python", "0.6.1", "from fake_flashinfer import *"),
    "flash-attn-3": ("flash_attn_interface", "flash-attn-3", "3.0.0b1", "from fake_flash_attn_3 import *"),
    "flash-attn-2": ("flash_attn", "flash-attn", "2.8.3.post1", "from fake_flash_attn_2 import *"),
}
"""Attention -> (module, distribution, version, source)."""


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, version: str | None = None, source: str | None = None
) -> None:
    """Put the fake of the attention `name` on the path until the test ends, in another version or with other code."""
    module, distribution, usual, imports = FAKES[name]
    place = folder / f"{name}-{version or usual}"
    info = place / f"{distribution.replace('-', '_')}-{version or usual}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version or usual}\n")
    (place / f"{module}.py").write_text(imports if source is None else source)
    monkeypatch.setitem(sys.modules, module, sys)  # so that it is forgotten again at the end
    del sys.modules[module]
    monkeypatch.syspath_prepend(place)


def refuse(wrong: object, complaint: str) -> None:
    """Raise ValueError, as the real packages do, when something is wrong."""
    if wrong:
        raise ValueError(complaint)


def opaque(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One operation of torch, whose inside nobody who watches operations sees: as a kernel is."""
    wrapped: Any = wrap_torch_function(lambda *args: args)(function)
    return wrapped  # type: ignore[no-any-return]


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, left: int, cap: float, causal: bool = True) -> Tensor:
    """q [n, Hq, D], the last of m positions, over keys and values [m, Hkv, D]: [n, Hq, D] float32. A position sees
    `left` before its own (-1: all). Rows that see nothing are zero."""
    group, (n, m) = q.shape[1] // keys.shape[1], (q.shape[0], keys.shape[0])
    keys, values = (tensor.float().repeat_interleave(group, 1) for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    if cap > 0:
        scores = cap * torch.tanh(scores / cap)
    at, own = torch.arange(m), torch.arange(m - n, m)[:, None]
    hidden = (at > own) & causal
    if left >= 0:
        hidden |= at < own - left
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values)
