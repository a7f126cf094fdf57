"""Every GPU kernel beside its reference, on the GPU: what `bench.gpu_check` runs first."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_attention import by, others
from bench.gpu_inputs import KV_DTYPES, make_draws, make_step
from bench.gpu_report import Report
from kernels.sampling import draw_reference
from kernels.triton.activation import KINDS, gated, gated_reference
from kernels.triton.blocks import copy_blocks, gather_blocks, scatter_blocks
from kernels.triton.embedding import embedding, embedding_reference
from kernels.triton.group_linear import GroupQuantized, group_linear, group_linear_reference, pack_pairs
from kernels.triton.norm import norm_reference, rms_norm, rms_norm_heads
from kernels.triton.quantize import quantize, quantize_reference
from kernels.triton.rope import rope_and_store, rope_and_store_reference
from kernels.triton.sampling import draw_tokens
from kernels.triton.scaled_linear import scaled_linear, scaled_linear_reference
from tandem.record import SamplingParams

DECODED = [1, 15, 16, 17, 500, 2049]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(),
    "top-k": SamplingParams(temperature=1.3, top_k=40),
    "top-p": SamplingParams(temperature=1.3, top_p=0.8),
    "all": SamplingParams(temperature=1.5, top_k=100, top_p=0.9, min_p=0.01),
}


@dataclass(frozen=True)
class Check:
    """A name and what gives (actual, expected); `tolerance` is relative to the largest expected magnitude."""

    name: str
    run: Callable[[], tuple[Tensor, Tensor]]
    tolerance: float

    def largest_error(self) -> float:
        """The largest difference, over the largest magnitude that is expected. NaN and infinities count as infinite."""
        actual, expected = (tensor.double() for tensor in self.run())
        error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        return error if error == error else float("inf")


def parity(wanted: Iterator[tuple[torch.dtype, Check]], report: Report) -> int:
    """A row for each check while there is time; how many fail."""
    failed = 0
    for dtype, check in wanted:
        if report.skips(f"parity from {check.name} in {dtype} on"):
            break
        try:
            error = check.largest_error()
            good = error <= check.tolerance
            report.say(check=check.name, dtype=str(dtype), error=error, tolerance=check.tolerance, ok=good)
        except Exception:
            good = False
            report.say(check=check.name, dtype=str(dtype), ok=False, failure=traceback.format_exc()[-1500:])
        failed += not good
    return failed


def checks(dtype: torch.dtype, device: str) -> Iterator[Check]:
    """All of them, for one dtype of activations."""
    yield from _attention(dtype, device)
    yield from _small(dtype, device)
    yield from _rope(dtype, device)
    yield from _products(dtype, device)
    yield from _sampling(dtype, device)
    yield Check("blocks", partial(_blocks, dtype, device), 0.0)
    yield Check("captured graph", partial(_graph, dtype, device), 0.0)


def _attention(dtype: torch.dtype, device: str) -> Iterator[Check]:
    shapes = [("D 64", 9, 3, 64), ("D 80", 8, 8, 80), ("D 128", 32, 8, 128), ("D 256", 8, 1, 256)]
    options = [("", None, None), (" window", 100, None), (" soft cap", None, 20.0)]
    for form in ("half", "fp8", "int8"):
        for label, heads, kv_heads, dim in shapes:
            for extra, window, cap in options:
                one = [1] * len(DECODED)
                given = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "form": form, "window": window, "cap": cap}
                decode = make_step(one, DECODED, dtype, device, **given)  # type: ignore[arg-type]
                mixed = make_step([1, 15, 3, 17, 300, 700], DECODED, dtype, device, **given)  # type: ignore[arg-type]
                name = f"{label} {form}{extra}"
                yield Check(f"decode attention {name}", lambda s=decode: (s.decode(), s.expected()), 2e-2)  # type: ignore[misc]
                yield Check(f"prefill attention {name}", lambda s=mixed: (s.prefill(), s.expected()), 2e-2)  # type: ignore[misc]
                for kind, step in (("decode", decode), ("prefill", mixed)):
                    for other in others(step):
                        run = partial(lambda o, s: (by(o, s)(), s.expected()), other, step)
                        yield Check(f"{kind} attention {name} by {other.name}", run, 2e-2)


def _small(dtype: torch.dtype, device: str) -> Iterator[Check]:
    def norm(width: int) -> tuple[Tensor, Tensor]:
        x, residual, weight = (torch.randn(n, width, device=device).to(dtype) for n in (33, 33, 1))
        other = residual.clone()
        return rms_norm(x, weight[0], 1e-5, residual), norm_reference(x, weight[0], 1e-5, other)

    def heads() -> tuple[Tensor, Tensor]:
        x, weight = torch.randn(33, 12, 128, device=device).to(dtype), torch.randn(128, device=device)
        return rms_norm_heads(x[:, :8], weight, 1e-6), norm_reference(x[:, :8], weight, 1e-6)

    def activation(kind: str) -> tuple[Tensor, Tensor]:
        x = (torch.randn(33, 2 * 5000, device=device) * 4).to(dtype)
        return gated(x, kind), gated_reference(x, kind)

    def lookup() -> tuple[Tensor, Tensor]:
        ids, table = torch.randint(-5, 1005, (300,), device=device), torch.randn(1000, 2500, device=device).to(dtype)
        return embedding(ids, table), embedding_reference(ids, table)

    for width in (100, 4096, 16384):
        yield Check(f"RMSNorm with residual, width {width}", partial(norm, width), 1e-2)
    yield Check("RMSNorm of heads", heads, 1e-2)
    for kind in KINDS:
        yield Check(f"{kind} and product", partial(activation, kind), 1e-2)
    yield Check("embedding", lookup, 0.0)


def _rope(dtype: torch.dtype, device: str) -> Iterator[Check]:
    def run(form: str, interleaved: bool, rotated: int) -> tuple[Tensor, Tensor]:
        """What kernel and reference give: queries, then the cache (codes as shares of the largest), in one row."""
        torch.manual_seed(0)
        cos, sin = torch.rand(2, 500, rotated // 2, device=device).unbind(0)
        positions, slots = torch.randint(0, 500, (70,), device=device), torch.randperm(160, device=device)[:70]
        slots[3] = -1
        kv = torch.zeros(10, 2, 4, 16, 128, device=device, dtype=KV_DTYPES.get(form, dtype))
        scales = None if form == "half" else kv[..., 0].float()
        qkv = torch.randn(70, (16 + 8) * 128, device=device).to(dtype)
        other, other_scales = kv.clone(), None if scales is None else scales.clone()
        step = (qkv, positions, slots, cos, sin)
        q = rope_and_store(*step, kv, 16, interleaved=interleaved, kv_scales=scales)
        expected = rope_and_store_reference(*step, other, 16, interleaved, other_scales)
        largest = {"fp8": 448.0, "int8": 127.0}.get(form, 1.0)  # codes don't hide what is wrong with q
        actual = [q.float().flatten(), kv.float().flatten() / largest]
        return torch.cat(actual), torch.cat([expected.flatten(), other.float().flatten() / largest])

    for form in ("half", "fp8", "int8"):
        for interleaved in (False, True):
            for rotated in (128, 64):
                name = f"rope and KV write {form}, {rotated} of 128{', interleaved' if interleaved else ''}"
                given = (form, interleaved, rotated)
                yield Check(name, partial(run, *given), 3e-2 if form == "fp8" else 1e-2)


def grouped_products(
    bits: int, group: int, shape: tuple[int, int, int], minima: bool, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """A product with codes of 4 or 8 bits, and its reference; `shape` is rows, outputs and inputs."""
    m, n, k = shape
    codes = torch.randint(0, 1 << bits, (n, k), device=device, dtype=torch.uint8)
    scales, least = torch.rand(2, n, k // group, device=device).half().div(1 << bits).unbind(0)
    packed = pack_pairs(codes) if bits == 4 else codes
    weight = GroupQuantized(bits, group, packed, scales.contiguous(), least.contiguous() if minima else None)
    x, bias = torch.randn(m, k, device=device).to(dtype), torch.randn(n, device=device)
    return group_linear(x, weight, bias), group_linear_reference(x, weight, bias)


def scaled_products(
    code: torch.dtype, scaling: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """A product of int8 or fp8, scaled by tensor, channel or blocks, and its reference; `shape` as above."""
    m, n, k = shape
    x, w = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device)
    scale = torch.full((1,), 0.04, device=device) if scaling == "tensor" else None
    group = 128 if scaling == "blocks" else None
    codes, scales = quantize(x, code, group=group, scale=scale)
    w_codes, w_scales = quantize_reference(w, code, group, scale)
    step = (codes, w_codes, scales, w_scales[::128].contiguous() if group else w_scales)
    return scaled_linear(*step, out_dtype=torch.float32), scaled_linear_reference(*step)


def _products(dtype: torch.dtype, device: str) -> Iterator[Check]:
    for m in (1, 33, 300):
        for bits, group, minima in ((4, 32, True), (4, 64, False), (4, 128, True), (8, 32, False), (8, 256, True)):
            name = f"product {bits}-bit weights, groups of {group}, {m} rows"
            yield Check(name, partial(grouped_products, bits, group, (m, 520, 1024), minima, dtype, device), 2e-2)
        for code in (torch.int8, torch.float8_e4m3fn):
            for scaling in ("tensor", "channel", "blocks"):
                name = f"product {code} by {scaling}, {m} rows"
                yield Check(name, partial(scaled_products, code, scaling, (m, 520, 1100), dtype, device), 1e-2)


def _sampling(dtype: torch.dtype, device: str) -> Iterator[Check]:
    def run(params: SamplingParams, logits_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        logits, draws = (torch.randn(24, 128256, device=device) * 2.5).to(logits_dtype), make_draws(24, params)
        rows = logits.float().cpu()
        expected = [draw_reference(rows[draw.row], draw.spec).token_id for draw in draws]
        return torch.tensor([drawn.token_id for drawn in draw_tokens(logits, draws)]), torch.tensor(expected)

    for name, params in PARAMS.items():
        for logits_dtype in (torch.float32, dtype):
            yield Check(f"sampling {name}, {logits_dtype}", partial(run, params, logits_dtype), 0.0)


def _blocks(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    cache = torch.randn(64, 4, 2, 2, 16, 64, device=device).to(dtype)
    expected, ids = cache.clone(), torch.tensor([5, 60, 7], device=device)
    taken = gather_blocks(cache[:, 1:3], ids)
    copy_blocks(cache, [(1, 2), (1, 3)])
    scatter_blocks(cache[:, 1:3], ids - 1, taken)
    expected[2] = expected[3] = expected[1]
    expected[ids - 1, 1:3] = taken
    return cache, expected


def _graph(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Decode attention captured once and replayed over other lengths equals the launch itself, bit for bit."""
    step = make_step([1] * 3, [100, 700, 2000], dtype, device)
    step.decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.decode()
    step.contexts.sub_(37)
    graph.replay()
    return out, step.decode()
