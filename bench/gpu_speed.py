"""The main GPU kernels beside their floors: bytes at the rate of a copy, operations at the rate of torch's product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from triton.testing import do_bench

from bench.gpu_attention import by, others
from bench.gpu_inputs import make_draws, make_step
from kernels.triton.activation import gated
from kernels.triton.blocks import gather_blocks
from kernels.triton.group_linear import GroupQuantized, group_linear
from kernels.triton.norm import rms_norm
from kernels.triton.quantize import quantize
from kernels.triton.rope import rope_and_store
from kernels.triton.sampling import pack_settings, sample
from kernels.triton.scaled_linear import scaled_linear
from tandem.record import SamplingParams

DTYPE = torch.bfloat16
HIDDEN, MLP, VOCABULARY = 4096, 14336, 128256


@dataclass(frozen=True)
class Rates:
    """What this GPU did a moment ago."""

    gb_per_s: float
    """Bytes read and written by a copy of 2 GiB."""
    tflops: float
    """torch's product of 8192 x 8192 x 8192 in bfloat16."""


@dataclass(frozen=True)
class Case:
    """A launch, the bytes it must move and the operations it must do."""

    name: str
    run: Callable[[], object]
    nbytes: float
    operations: float = 0.0
    speed: float = 1.0
    """Of the operations, in those of 16 bits: 2 where they are of 8."""

    def measure(self, rates: Rates) -> dict[str, float | str]:
        """See `row`, of a run with a cold L2."""
        return self.row(milliseconds(self.run), rates)

    def row(self, took: float, rates: Rates) -> dict[str, float | str]:
        """Milliseconds, the floor's, and their ratio; then what was achieved, in GB/s and TFLOP/s of the bytes and
        operations above (0 where no product is)."""
        floor = max(self.nbytes / rates.gb_per_s / 1e6, self.operations / self.speed / rates.tflops / 1e9)
        found = {"ms": round(took, 4), "floor_ms": round(floor, 4), "ratio": round(took / floor, 2)}
        achieved = {"gb_per_s": round(self.nbytes / took / 1e6, 1), "tflops": round(self.operations / took / 1e9, 1)}
        return {"case": self.name, **found, **achieved}


def milliseconds(run: Callable[[], object]) -> float:
    """The median of runs over 100 ms, the L2 flushed before each; a captured graph, as a decode step is, so that the
    host's part of a launch doesn't count.
    """
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return _median(graph.replay)


def _median(run: Callable[[], object]) -> float:
    return float(do_bench(run, warmup=25, rep=100, return_mode="median"))


def measure_rates(device: str) -> Rates:
    """Of a copy and of a product, launched as they are: in a graph torch's copy is a slower one."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / _median(lambda: target.copy_(source)) / 1e6
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=DTYPE).unbind(0)
    return Rates(copied, 2 * 8192**3 / _median(lambda: a @ b) / 1e9)


def cases(device: str) -> Iterator[Case]:
    """All of them, made one after another so that memory is not held."""
    yield from _attention(device)
    yield from _memory(device)
    yield from _products(device)
    yield from _sampling(device)


def _attention(device: str) -> Iterator[Case]:
    for form in ("half", "fp8", "int8"):
        for sequences, context in ((1, 32768), (64, 4096), (256, 1024)):
            step = make_step([1] * sequences, [context] * sequences, DTYPE, device, form=form)
            name = f"decode attention, {sequences} x {context}, KV {form}"
            yield Case(name, step.decode, step.kv_bytes)
            for other in others(step):
                yield Case(f"{name}, {other.name}", by(other, step), step.kv_bytes)
    for counts, contexts in (([4096], [4096]), ([512] * 4, [8192] * 4), ([8192], [8192])):
        step = make_step(counts, contexts, DTYPE, device)
        pairs = sum(n * (context - n / 2) for n, context in zip(counts, contexts, strict=True))
        name = f"prefill attention, {len(counts)} x {counts[0]} queries of {contexts[0]}"
        work = (step.kv_bytes, 4 * pairs * step.q.shape[1] * step.q.shape[2])
        yield Case(name, step.prefill, *work)
        for other in others(step):
            yield Case(f"{name}, {other.name}", by(other, step), *work)


def _memory(device: str) -> Iterator[Case]:
    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPE)

    for rows in (64, 8192):
        x, residual, weight, wide = rand(rows, HIDDEN), rand(rows, HIDDEN), rand(HIDDEN), rand(rows, 2 * MLP)
        add = partial(rms_norm, x, weight, 1e-5, residual)
        yield Case(f"RMSNorm with residual, {rows} rows", add, 4 * x.nbytes)
        yield Case(f"SiLU and product, {rows} rows", partial(gated, wide, "silu"), 1.5 * wide.nbytes)
        qkv, kv = rand(rows, 48 * 128), rand(rows // 16 + 1, 2, 8, 16, 128)
        index, angles = torch.arange(rows, device=device), torch.rand(rows, 64, device=device)
        step = (qkv, index, index, angles, angles, kv, 32)
        yield Case(f"rope and KV write, {rows} rows", partial(rope_and_store, *step), 2 * qkv.nbytes)
        to_fp8 = partial(quantize, x, torch.float8_e4m3fn, group=128)
        yield Case(f"quantise to fp8 in groups, {rows} rows", to_fp8, 1.5 * x.nbytes)
    cache, ids = rand(512, 32, 2, 8, 16, 128), torch.randperm(512, device=device)[:256]
    yield Case("blocks gathered, 256 of 2 MiB", lambda: gather_blocks(cache, ids), cache.nbytes)


def _products(device: str) -> Iterator[Case]:
    for m in (1, 16, 64, 4096):
        x, work = torch.randn(m, HIDDEN, device=device, dtype=DTYPE), 2.0 * m * HIDDEN * MLP
        moved = x.nbytes + 2 * m * MLP
        for bits, group in ((4, 128), (4, 32), (8, 128)):
            codes = torch.randint(0, 256, (MLP, HIDDEN * bits // 8), device=device, dtype=torch.uint8)
            weight = GroupQuantized(bits, group, codes, torch.rand(MLP, HIDDEN // group, device=device).half())
            nbytes = moved + codes.nbytes + weight.scales.nbytes
            name = f"product {bits}-bit weights, groups of {group}, {m} rows"
            yield Case(name, partial(group_linear, x, weight), nbytes, work)
        for code in (torch.int8, torch.float8_e4m3fn):
            a, b = (torch.randint(0, 100, (n, HIDDEN), device=device).to(code) for n in (m, MLP))
            ones = torch.ones(m, device=device), torch.ones(MLP, device=device)
            yield Case(f"product {code}, {m} rows", partial(scaled_linear, a, b, *ones), moved + b.nbytes, work, 2)
        blocks = torch.ones(m, HIDDEN // 128, device=device), torch.ones(MLP // 128, HIDDEN // 128, device=device)
        run = partial(scaled_linear, a, b, *blocks)
        yield Case(f"product fp8 in blocks, {m} rows", run, moved + b.nbytes, work, 2)


def _sampling(device: str) -> Iterator[Case]:
    logits = torch.randn(64, VOCABULARY, device=device) * 2.5
    for name, params in (
        ("greedy", SamplingParams(temperature=0.0)),
        ("plain", SamplingParams()),
        ("top-p", SamplingParams(top_p=0.9)),
        ("top-k and top-p", SamplingParams(top_k=50, top_p=0.9)),
    ):
        settings = pack_settings(make_draws(64, params), logits.device)
        yield Case(f"sampling {name}, 64 rows", partial(sample, logits, settings), logits.nbytes)
