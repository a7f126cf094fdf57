"""Promise 1, through the real gateway: the same tokens however they are computed, and those of `transformers`.

CI runs a pairwise selection of the matrix; `make exact` (`--exact-full`) runs all of it and tells how it gets on.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.client import AsyncClient, Client

TOP2_GAP = 1e-4
logger = logging.getLogger("exact")
SHORT_PROMPT = 64
SECONDS_A_REQUEST = 1800.0

Outputs = dict[str, dict[int, list[int]]]
"""greedy | sampled -> number of the prompt -> token ids"""
Prompts = dict[int, list[int]]


def _load(name: str) -> Any:
    """Loads a module that lies beside this one (tests are no package)."""
    key = f"tandem_exact_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    return sys.modules[key]


matrix = _load("matrix")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Picks the rows of the matrix."""
    if "variant" in metafunc.fixturenames:
        full = metafunc.config.getoption("--exact-full")
        rows = matrix.FULL if full else matrix.PAIRWISE
        metafunc.parametrize("variant", rows, ids=lambda variant: variant.name)


SAMPLING: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 200,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
}


async def _run_all(gateway: str, prompts: Prompts, variant: Any) -> Outputs:
    """All prompts greedy, then all sampled with a seed of their own; at most `variant.concurrency` at once."""
    limit = asyncio.Semaphore(variant.concurrency)
    async with AsyncClient(gateway) as client:

        async def one(number: int, settings: dict[str, Any]) -> list[int]:
            async with limit:
                result = await client.generate(
                    token_ids=prompts[number], ignore_eos=True, timeout=SECONDS_A_REQUEST, **settings
                )
            return list(result.token_ids)

        async def every(settings: dict[str, Any]) -> dict[int, list[int]]:
            began = time.monotonic()
            rows = await asyncio.gather(*(one(number, {**settings, "seed": 1000 + number}) for number in prompts))
            kind = "sampled" if settings["temperature"] else "greedy"
            tokens, seconds = sum(map(len, rows)), time.monotonic() - began
            logger.info("%s: %d prompts, %d %s tokens in %.0f s", variant.name, len(rows), tokens, kind, seconds)
            return dict(zip(prompts, rows, strict=True))

        return {
            "greedy": await every({"temperature": 0.0, "max_tokens": variant.greedy}),
            "sampled": await every({**SAMPLING, "max_tokens": variant.sampled}),
        }


@pytest.fixture(scope="module")
def baseline(start_stack: Any) -> tuple[Prompts, Outputs]:
    """Prompts and the outputs of `matrix.BASELINE`."""
    stack = start_stack.start(*matrix.BASELINE.flags())
    try:
        with Client(stack.gateway) as client:
            prompts = dict(enumerate(_load("prompts").build_prompts(client)))
        outputs = asyncio.run(_run_all(stack.gateway, prompts, matrix.BASELINE))
        assert stack.stop() == 0
    finally:
        stack.kill()
    return prompts, outputs


@pytest.fixture(scope="module")
def reference_model() -> Any:
    """The default model in transformers, float32, dequantized by transformers' own reader."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from tandem.models import resolve_model

    path = resolve_model("default")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.eval()


@pytest.mark.timeout(1800)
def test_greedy_equals_transformers(baseline: tuple[Prompts, Outputs], reference_model: Any) -> None:
    """Each token is the reference's argmax given all before it, or the reference's top two are within 1e-4."""
    prompts, outputs = baseline
    ties = 0
    for number, output in outputs["greedy"].items():
        prompt = prompts[number]
        assert len(output) == matrix.BASELINE.greedy
        with torch.inference_mode():
            ids = torch.tensor([prompt + output[:-1]])
            logits = reference_model(ids, logits_to_keep=matrix.BASELINE.greedy).logits[0]
        top = logits.topk(2, dim=-1)
        for position, token in enumerate(output):
            if token != int(top.indices[position, 0]):
                gap = float(top.values[position, 0] - top.values[position, 1])
                assert gap < TOP2_GAP, f"prompt of {len(prompt)} tokens differs at output {position}, gap {gap}"
                assert token == int(top.indices[position, 1])
                ties += 1
    assert ties < 5


@pytest.mark.timeout(3600)
def test_same_tokens_however_run(
    variant: Any, baseline: tuple[Prompts, Outputs], start_stack: Any, request: Any
) -> None:
    """Chunking, transport, batching, caching, number of workers and preemption change nothing."""
    all_prompts, expected = baseline
    _check_variant(variant, all_prompts, expected, start_stack, request.config.getoption("--exact-full"))


@pytest.fixture(scope="module")
def int8_baseline(baseline: tuple[Prompts, Outputs], start_stack: Any) -> tuple[Prompts, Outputs]:
    """The same prompts and the outputs of the first of `matrix.INT8`."""
    prompts = baseline[0]
    stack = start_stack.start(*matrix.INT8[0].flags())
    try:
        outputs = asyncio.run(_run_all(stack.gateway, prompts, matrix.INT8[0]))
        assert stack.stop() == 0
    finally:
        stack.kill()
    return prompts, outputs


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("int8_variant", matrix.INT8[1:], ids=lambda variant: variant.name)
def test_int8_gives_the_same_tokens_however_run(
    int8_variant: Any, int8_baseline: tuple[Prompts, Outputs], start_stack: Any
) -> None:
    """What holds for compute exact holds for int8 among its own runs."""
    _check_variant(int8_variant, *int8_baseline, start_stack, full=True)


def _check_variant(variant: Any, all_prompts: Prompts, expected: Outputs, start_stack: Any, full: bool) -> None:
    # The prompt steps of one token each would take most of CI's time.
    longest = SHORT_PROMPT if variant.chunk_size == 1 and not full else None
    prompts = variant.chosen(all_prompts, longest)
    stack = start_stack.start(*variant.flags(list(prompts.values())))
    try:
        outputs = asyncio.run(_run_all(stack.gateway, prompts, variant))
        preemptions = stack.metric("decode", "tandem_num_preemptions_total")
        steps = [worker["load"]["steps"] for worker in stack.status()["workers"] if worker["load"] is not None]
        assert stack.stop() == 0
    finally:
        stack.kill()
    differing = []
    for kind, count in (("greedy", variant.greedy), ("sampled", variant.sampled)):
        assert outputs[kind].keys() == prompts.keys()
        for number, row in outputs[kind].items():
            want = expected[kind][number][:count]
            assert len(want) == count
            if row != want:
                same = next((i for i, (a, b) in enumerate(zip(row, want, strict=False)) if a != b), len(row))
                differing.append(
                    f"{kind} output of prompt {number} ({len(prompts[number])} tokens) from token {same} on"
                )
    assert not differing
    assert len(steps) == variant.workers * (2 if variant.prefill else 1)
    # One at a time, the second pair of workers is never the cheaper one.
    assert all(steps) or variant.concurrency == 1, f"a worker had nothing to do: {steps}"
    if variant.preempt:
        assert preemptions > 0, "the pool was meant to be too small for all at once"
    else:
        assert preemptions == 0
