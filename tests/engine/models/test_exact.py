"""A row's bits depend on nothing but its own sequence: not on other rows, chunks, block size or threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_promise import random_prompts, same_bits

pytestmark = pytest.mark.usefixtures("cpp_kernels")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "float8_e4m3"])
def test_rows_in_a_batch(
    kind: str, kv_dtype: str, save_tiny: Callable[..., Any], make_driver: Callable[..., Any]
) -> None:
    """1 to 64 sequences side by side, step by step, give the bits of each alone."""
    folder, _ = save_tiny(kind)
    prompts = [prompt[: 5 + n % 7] for n, prompt in enumerate(random_prompts(64, 12, 211))]
    driver = make_driver(folder, sequences=64, length=16, kv_dtype=kv_dtype)
    alone = [driver.run([prompt], chunk=64)[0] for prompt in prompts]
    for rows in (1, 2, 3, 5, 7, 12, 16, 33, 64):
        for batched, single in zip(driver.run(prompts[:rows], chunk=1), alone[:rows], strict=True):
            assert same_bits(batched, single), rows


def test_chunks_blocks_and_threads(save_tiny: Callable[..., Any], make_driver: Callable[..., Any]) -> None:
    """Chunks of 1, 7, 64 and 512, blocks of 4, 16 and 128, one thread or two; a window that crosses chunks."""
    folder, _ = save_tiny(
        "qwen2", max_position_embeddings=600, use_sliding_window=True, sliding_window=50, max_window_layers=1
    )
    prompt = random_prompts(1, 530, 211)[0]
    expected = make_driver(folder, length=530).run([prompt], chunk=530)[0]
    for chunk, block_size in ((1, 16), (7, 4), (64, 16), (512, 128)):
        driver = make_driver(folder, length=530, block_size=block_size)
        assert same_bits(driver.run([prompt], chunk=chunk)[0], expected), chunk
    driver = make_driver(folder, length=530)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert same_bits(driver.run([prompt], chunk=512)[0], expected), count


def test_default_model(default_driver: Any) -> None:
    """The real shapes: 64 rows in one step, chunks of 7, 64 and 512 beside single rows."""
    driver = default_driver
    prompts = random_prompts(4, 80, 49152)
    together = driver.run(prompts, chunk=16)
    for rows, prompt in zip(together[1:3], prompts[1:3], strict=True):
        assert same_bits(driver.run([prompt], chunk=512)[0], rows)
    assert same_bits(driver.run(prompts[:1], chunk=7)[0], together[0])
    assert same_bits(driver.run([prompts[0][:16]], chunk=1)[0], together[0][:16])
    hidden = torch.randn(64, driver.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    all_rows = driver.model.logits(hidden)
    for rows in (1, 2, 5, 6, 7, 13, 32, 63):
        assert same_bits(driver.model.logits(hidden[-rows:].contiguous()), all_rows[-rows:]), rows
