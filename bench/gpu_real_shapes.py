"""The kernels of a layer beside their references on the shapes of large models: attention, head norms, products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_attention import by, others
from bench.gpu_inputs import make_step
from bench.gpu_parity import Check, grouped_products, scaled_products
from kernels.triton.activation import gated, gated_reference
from kernels.triton.norm import norm_reference, rms_norm, rms_norm_heads


@dataclass(frozen=True)
class Model:
    """What one rank has of a layer, and the steps that it is checked on."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    width: int
    inner: int
    head_norms: bool = False
    contexts: tuple[int, ...] = (1, 1000, 4097, 8192)
    queries: tuple[int, ...] = (1, 17, 512, 1024)
    """Of the prefill step, for each of `contexts`."""
    rows: tuple[int, ...] = (16, 512)


MODELS = (
    Model("Llama 3 8B", 32, 8, 128, 4096, 14336),
    Model("Llama 3 70B, a rank of 8", 8, 1, 128, 8192, 3584),
    Model("Qwen3 8B", 32, 8, 128, 4096, 12288, head_norms=True),
)


def model_checks(model: Model, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """All of one model. What the shapes of two have in common is checked for both."""
    yield from _attention(model, dtype, device)
    yield from _norms(model, dtype, device)
    yield from _products(model, dtype, device)


def _attention(model: Model, dtype: torch.dtype, device: str) -> Iterator[Check]:
    contexts = list(model.contexts)
    prompts = [min(asked, context) for asked, context in zip(model.queries, contexts, strict=True)]
    heads = {"heads": model.heads, "kv_heads": model.kv_heads, "dim": model.dim}
    for form in ("half", "fp8", "int8"):
        decode = make_step([1] * len(contexts), contexts, dtype, device, form=form, **heads)
        prefill = make_step(prompts, contexts, dtype, device, form=form, **heads)
        for kind, step, run in (("decode", decode, decode.decode), ("prefill", prefill, prefill.prefill)):
            name = f"{model.name}: {kind} attention, KV {form}"
            yield Check(name, partial(lambda s, r: (r(), s.expected()), step, run), 2e-2)
            for other in others(step):
                beside = partial(lambda o, s: (by(o, s)(), s.expected()), other, step)
                yield Check(f"{name} by {other.name}", beside, 2e-2)


def _norms(model: Model, dtype: torch.dtype, device: str) -> Iterator[Check]:
    rows = model.rows[-1]

    def norm() -> tuple[Tensor, Tensor]:
        x, residual, weight = (torch.randn(n, model.width, device=device).to(dtype) for n in (rows, rows, 1))
        other = residual.clone()
        return rms_norm(x, weight[0], 1e-6, residual), norm_reference(x, weight[0], 1e-6, other)

    def heads() -> tuple[Tensor, Tensor]:
        every = model.heads + 2 * model.kv_heads
        x, weight = torch.randn(rows, every, model.dim, device=device).to(dtype), torch.randn(model.dim, device=device)
        queries = x[:, : model.heads]
        return rms_norm_heads(queries, weight, 1e-6), norm_reference(queries, weight, 1e-6)

    def activation() -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 2 * model.inner, device=device).to(dtype)
        return gated(x, "silu"), gated_reference(x, "silu")

    yield Check(f"{model.name}: RMSNorm with residual", norm, 1e-2)
    yield Check(f"{model.name}: SiLU and product", activation, 1e-2)
    if model.head_norms:
        yield Check(f"{model.name}: RMSNorm of heads", heads, 1e-2)


def _products(model: Model, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """Up, and down again."""
    for n, k in ((model.inner, model.width), (model.width, model.inner)):
        for m in model.rows:
            where, shape = f"{m} x {k} by {n}", (m, n, k)
            for bits, group, minima in ((4, 128, False), (4, 32, True), (8, 128, False)):
                name = f"{model.name}: product {bits}-bit weights, groups of {group}, {where}"
                yield Check(name, partial(grouped_products, bits, group, shape, minima, dtype, device), 2e-2)
            for code, scaling in (
                (torch.int8, "channel"),
                (torch.float8_e4m3fn, "channel"),
                (torch.float8_e4m3fn, "blocks"),
            ):
                name = f"{model.name}: product {code} by {scaling}, {where}"
                yield Check(name, partial(scaled_products, code, scaling, shape, dtype, device), 1e-2)
