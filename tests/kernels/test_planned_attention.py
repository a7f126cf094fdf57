"""FlashInfer and FlashAttention behind `Attention`, beside torch: by fakes that hold their contracts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_flashinfer_plan
import numpy as np
import pytest
import torch
from attention_packages import FAKES, install
from fake_flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

from kernels import flashinfer_attention
from kernels.attention_probe import ProbeStep, disagreement, probe_step
from kernels.attentions import ATTENTIONS
from kernels.backends import Attention, AttentionShape, HostStep
from kernels.flashinfer_attention import FlashInferAttention
from kernels.paged_plan import Pages
from kernels.torch_operations import TorchAttention
from tandem.errors import InternalError

CPU = torch.device("cpu")
F16 = torch.float16
SHAPE = AttentionShape(6, 2, 64, 16, F16, F16, max_sequences=8, max_context=600)
DECODE, MIXED = [1, 1, 1, 1], [1, 15, 3, 200]
CONTEXTS = [1, 15, 33, 590]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All fakes, and a small workspace."""
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 1024)
    for name in FAKES:
        install(monkeypatch, tmp_path, name)


def make(name: str, shape: AttentionShape) -> Attention:
    candidate = next(candidate for candidate in ATTENTIONS if candidate.name == name)
    assert candidate.refusal(shape, CPU) is None
    return candidate.make(shape, CPU)


def fitting(name: str, **change: Any) -> AttentionShape:
    return replace(SHAPE, block_size=256 if name == "flash-attn-2" else 16, **change)


class Cache:
    """A cache of three layers, of which the middle one is read, and queries."""

    def __init__(self, shape: AttentionShape, seed: int = 3) -> None:
        """160 blocks of 16, or as many positions."""
        generator = torch.Generator().manual_seed(seed)
        size = (2560 // shape.block_size, 3, 2, shape.kv_heads, shape.block_size, shape.head_dim)
        self.shape, self._generator = shape, generator
        self.layer = torch.randn(size, generator=generator).to(shape.dtype)[:, 1]

    def queries(self, count: int) -> torch.Tensor:
        """[count, Hq, D]."""
        shape = self.shape
        return torch.randn(count, shape.heads, shape.head_dim, generator=self._generator).to(shape.dtype)

    def compare(self, attention: Attention, step: ProbeStep, windows: tuple[int | None, ...] = (None,)) -> None:
        """Plan, run each layer's window, and compare rows that are no padding with torch."""
        attention.plan(step.host)
        q = self.queries(int(step.host.query_starts[-1]))
        real = np.repeat(step.host.context_lens > 0, np.diff(step.host.query_starts))
        for window in windows:
            run = (q, self.layer, step, self.shape.scale, window)
            actual, expected = attention.run(*run), TorchAttention(self.shape, CPU).run(*run)
            assert actual.dtype is self.shape.dtype
            assert torch.allclose(actual[real].float(), expected[real].float(), atol=2e-3)
            assert actual.isfinite().all()


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize(("windows", "cap"), [((None,), None), ((20, None), None), ((7,), 5.0)])
@pytest.mark.usefixtures("packages")
def test_prefill_and_decode_are_torch_s(
    name: str, heads: int, kv_heads: int, windows: tuple[int | None, ...], cap: float | None
) -> None:
    shape = fitting(name, heads=heads, kv_heads=kv_heads, windows=windows, soft_cap=cap)
    attention, cache = make(name, shape), Cache(shape)
    for queries in (DECODE, MIXED):
        cache.compare(attention, probe_step(shape, queries, CONTEXTS, None, CPU), tuple(dict.fromkeys(windows)))
    assert disagreement(attention, shape, CPU) is None


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.usefixtures("packages")
def test_bfloat16_tables_with_blocks_in_reserve_and_padding(name: str) -> None:
    shape = fitting(name, dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
    attention = make(name, shape)
    step = probe_step(shape, DECODE, [33, 0, 290, 0], 4, CPU)
    wider = np.pad(step.host.block_tables, ((0, 0), (0, 3)))
    padded = replace(step, block_tables=torch.from_numpy(wider), host=replace(step.host, block_tables=wider))
    attention.plan(padded.host)
    q, cache = Cache(shape).queries(4), Cache(shape).layer
    actual = attention.run(q, cache, padded, shape.scale, None)
    expected = TorchAttention(shape, CPU).run(q[::2], cache, _rows(step, [0, 2]), shape.scale, None)
    assert torch.allclose(actual[::2].float(), expected.float(), atol=2e-2)
    assert actual.isfinite().all()


def _rows(step: ProbeStep, rows: list[int]) -> ProbeStep:
    """Some of a decode step's sequences."""
    starts = torch.arange(len(rows) + 1, dtype=torch.int32)
    return ProbeStep(step.block_tables[rows], starts, step.context_lens[rows], step.host)


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.usefixtures("packages")
def test_the_cache_is_read_where_it_lies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = fitting(name)
    cache, seen = Cache(shape), []
    room = fake_flashinfer_plan if name == "flashinfer" else __import__(f"fake_{name.replace('-', '_')}")
    compute = room.paged_attention

    def watch(q: torch.Tensor, keys: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(keys.untyped_storage().data_ptr())
        result: torch.Tensor = compute(q, keys, *rest)
        return result

    monkeypatch.setattr(room, "paged_attention", watch)
    attention = make(name, shape)
    for queries in (DECODE, MIXED):
        cache.compare(attention, probe_step(shape, queries, CONTEXTS, None, CPU))
    assert set(seen) == {cache.layer.untyped_storage().data_ptr()}
    assert len(seen) == 2


@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.usefixtures("packages")
def test_captured_steps_find_each_plan_in_the_same_place(heads: int) -> None:
    """Both ways to decode, with and without tensor cores; buckets take turns, and eager steps come between."""
    shape = replace(SHAPE, heads=heads, windows=(None, 30))
    attention, cache = FlashInferAttention(shape, CPU), Cache(shape)
    places: dict[int, set[tuple[int, ...]]] = {4: set(), 2: set()}
    for bucket, contexts in ((4, [0] * 4), (2, [0] * 2), (4, CONTEXTS), (2, [599, 600]), (4, [600, 1, 0, 0])):
        cache.compare(attention, probe_step(shape, [1] * bucket, contexts, bucket, CPU), (None, 30))
        cache.compare(attention, probe_step(shape, MIXED, CONTEXTS, None, CPU), (None, 30))
        cache.compare(attention, probe_step(shape, DECODE, CONTEXTS, None, CPU), (None, 30))
        for wrapper in attention._wrappers[True, bucket].values():
            assert wrapper.wrapper._tensor_cores is (heads == 8)
            arrays = (wrapper.wrapper._arrays[name] for name in ("indices", "indptr", "last"))
            places[bucket].add(tuple(array.data_ptr() for array in arrays))
    ((indices, *others),), ((same, *apart),) = places.values()
    assert indices == same  # block numbers are shared
    assert not set(others) & set(apart)


@pytest.mark.usefixtures("packages")
def test_a_plan_that_no_longer_fits_its_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = FlashInferAttention(SHAPE, CPU)
    step = probe_step(SHAPE, DECODE, CONTEXTS, 4, CPU)
    attention.plan(step.host)
    attention.plan(step.host)
    keep = fake_flashinfer_plan.Wrapper.keep

    def other_layout(wrapper: Any, *args: Any, **kwargs: Any) -> None:
        keep(wrapper, *args, **kwargs)
        wrapper._plan_info = [5, 1]

    monkeypatch.setattr(fake_flashinfer_plan.Wrapper, "keep", other_layout)
    with pytest.raises(InternalError, match=r"planned \[5, 1\] for a step that was captured as \[4, 1\]"):
        attention.plan(step.host)
    attention.plan(probe_step(SHAPE, DECODE, CONTEXTS, None, CPU).host)  # an eager step is planned anew each time


@pytest.mark.usefixtures("packages")
def test_what_was_not_planned_is_not_run() -> None:
    attention, cache = FlashInferAttention(SHAPE, CPU), Cache(SHAPE)
    step = probe_step(SHAPE, DECODE, CONTEXTS, None, CPU)
    q, scale = cache.queries(4), SHAPE.scale
    with pytest.raises(InternalError, match="no attention with a window of None was planned"):
        attention.run(q, cache.layer, step, scale, None)
    attention.plan(step.host)
    with pytest.raises(InternalError, match=r"window of 7 was planned; planned: \[None\]"):
        attention.run(q, cache.layer, step, scale, 7)
    with pytest.raises(InternalError, match="not 1"):
        attention.run(q, cache.layer, step, 1.0, None)
    with pytest.raises(InternalError, match="without scales"):
        attention.run(q, cache.layer, step, scale, None, torch.ones(1))


def test_pages_are_the_blocks_in_use_one_sequence_behind_the_other() -> None:
    tables = np.array([[7, 3, 9], [5, 0, 0], [4, 2, 8]], np.int32)
    lengths = np.array([32, 0, 33], np.int32)
    pages = Pages.of(HostStep(np.arange(4, dtype=np.int32), lengths, tables, 48, 3), 16, CPU)
    assert pages.indices.tolist() == [7, 3, 5, 4, 2, 8]
    assert (pages.starts.tolist(), pages.last_lens.tolist()) == ([0, 2, 3, 6], [16, 1, 1])
    tables[:] = 0
    assert pages.indices.tolist() == [7, 3, 5, 4, 2, 8]


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"indptr": torch.tensor([0, 2, 3])}, "int32"),
        ({"indptr": _int32(0, 2)}, "indptr has one more"),
        ({"indptr": _int32(0, 3, 3)}, "pages don't add up"),
        ({"indptr": torch.zeros(3, dtype=torch.int32, device="meta")}, "wait for the device"),
        ({"last_page_len": _int32(0, 1)}, "last_page_len"),
        ({"last_page_len": _int32(17, 1)}, "last_page_len"),
        ({"indices": _int32(0, 1, 2).to("meta")}, "another device"),
        ({"head_dim": 80}, "no kernel for such heads"),
        ({"num_qo_heads": 10}, "no kernel for the group"),
        ({"q_data_type": torch.float32}, "no kernel for such dtypes"),
        ({"last_page_len": _int32(1), "indptr": _int32(0, 3)}, "batch size should be fixed"),
        ({"indices": _int32(*range(6)), "indptr": _int32(0, 2, 6)}, "size of indices"),
    ],
)
def test_the_fake_refuses_plans_that_the_real_one_refuses(change: dict[str, Any], complaint: str) -> None:
    buffers = (torch.zeros(3, dtype=torch.int32), torch.zeros(5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    workspace = torch.zeros(64, dtype=torch.uint8)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", True, False, *buffers)
    good = {"indptr": _int32(0, 2, 3), "indices": _int32(4, 0, 1), "last_page_len": _int32(16, 1)}
    sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "q_data_type": F16}
    wrapper.plan(**{**good, **sizes})
    with pytest.raises(ValueError, match=complaint):
        wrapper.plan(**{**good, **sizes, **change})


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        (lambda wrapper, q, cache: wrapper.run(q[:1], cache), "q does not match"),
        (lambda wrapper, q, cache: wrapper.run(q.float(), cache), "dtypes differ"),
        (lambda wrapper, q, cache: wrapper.run(q, cache.transpose(2, 3)), "shape differs"),
        (
            lambda wrapper, q, cache: wrapper.run(
                q, cache[..., ::2].repeat(1, 1, 1, 1, 2)[..., ::1].mT.contiguous().mT
            ),
            "strides",
        ),
    ],
)
def test_the_fake_refuses_runs_that_do_not_follow_the_plan(run: Callable[..., Any], complaint: str) -> None:
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.zeros(64, dtype=torch.uint8), "HND")
    q, cache = torch.zeros(5, 4, 64, dtype=F16), torch.zeros(3, 2, 2, 16, 64, dtype=F16)
    with pytest.raises(ValueError, match="plan info is not initialized"):
        wrapper.run(q, cache)
    wrapper.plan(_int32(0, 5), _int32(0, 1), _int32(2), _int32(9), 4, 2, 64, 16, causal=True, q_data_type=F16)
    assert wrapper.run(q, cache).shape == q.shape
    with pytest.raises(ValueError, match=complaint):
        run(wrapper, q, cache)
