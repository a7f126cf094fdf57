"""Attention of other packages over the steps of the GPU checks, beside Triton's: what is installed of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

from torch import Tensor

from bench.gpu_inputs import Step
from kernels.attention_probe import ProbeStep
from kernels.attentions import ATTENTIONS, Candidate
from kernels.backends import AttentionShape, HostStep

OTHERS = tuple(candidate for candidate in ATTENTIONS if candidate.probed)


def installed() -> list[Candidate]:
    """Those that may be tried."""
    return [candidate for candidate in OTHERS if candidate.not_installed() is None]


def remarks() -> list[dict[str, object]]:
    """A line for each: taken beside Triton, or why not."""
    refusals = [(candidate.name, candidate.not_installed()) for candidate in OTHERS]
    return [{"attention": name, "beside_triton": "yes" if no is None else no.reason} for name, no in refusals]


def others(step: Step) -> list[Candidate]:
    """Those that are installed and take such a step."""
    shape, device = _shape(step), step.q.device
    return [candidate for candidate in installed() if candidate.refusal(shape, device) is None]


def by(candidate: Candidate, step: Step) -> Callable[[], Tensor]:
    """The step by another attention, as a layer takes it; the first call plans it, and fails if it can't be had."""
    plan = functools.cache(partial(_planned, candidate, step))
    return lambda: plan()()


def _planned(candidate: Candidate, step: Step) -> Callable[[], Tensor]:
    shape = _shape(step)
    attention = candidate.make(shape, step.q.device)
    starts, contexts, tables = (tensor.cpu().numpy() for tensor in (step.starts, step.contexts, step.tables))
    decode = len(step.q) == len(contexts)
    host = HostStep(starts, contexts, tables, step.longest, bucket=len(contexts) if decode else None)
    attention.plan(host)
    meta = ProbeStep(step.tables, step.starts, step.contexts, host)
    return partial(attention.run, step.q, step.kv_layer, meta, shape.scale, step.window)


def _shape(step: Step) -> AttentionShape:
    return AttentionShape(
        heads=step.q.shape[1],
        kv_heads=step.kv_layer.shape[2],
        head_dim=step.q.shape[2],
        block_size=step.kv_layer.shape[3],
        dtype=step.q.dtype,
        kv_dtype=step.kv_layer.dtype,
        max_sequences=len(step.contexts),
        max_context=step.longest,
        windows=(step.window,),
        soft_cap=step.cap,
    )
