"""Prefill and decode pools of two block sizes, and of two KV dtypes, as real processes."""

from __future__ import annotations

from typing import Any

from kv_transfer import nixl_agent
from tandem.client import Client

APART = ("--prefill-block-size", "16")
STACKS = [APART, *([(*APART, "--transport", "nixl")] if nixl_agent.installed() else []), ("--prefill", "0")]
"""The last one computes all itself. Over NIXL as well, where its wheel is: CI has none."""
TALE = "Once upon a time there was a lighthouse keeper who wrote a letter to the sea every night. " * 6


def _answers(stack: Any) -> list[list[int]]:
    """Two prompts, the second with the first as its prefix, greedy and sampled; then a question."""
    asked: list[dict[str, Any]] = [
        {"prompt": TALE, "temperature": 0.0},
        {"prompt": TALE + "One morning the sea answered:", "temperature": 0.8, "seed": 3},
        {"prompt": TALE + "One morning the sea answered:", "temperature": 0.0},
        {"prompt": "The capital of France is", "temperature": 0.0},
    ]
    with Client(stack.gateway) as client:
        return [
            list(client.generate(one.pop("prompt"), max_tokens=16, ignore_eos=True, **one).token_ids) for one in asked
        ]


def test_two_block_sizes_give_the_tokens_of_one_worker(start_stack: Any) -> None:
    results = []
    flags = ("--block-size", "32", "--local-prefill-threshold", "0")
    for more in STACKS:
        stack = start_stack.start(*flags, *more)
        try:
            results.append(_answers(stack))
            if more[:2] == APART:
                assert stack.metric("prefill", "tandem_nixl_bytes_transferred_total") > 0
                assert stack.metric("decode", "tandem_nixl_num_failed_transfers_total") == 0
            assert stack.stop() == 0
        finally:
            stack.kill()
    assert all(len(tokens) == 16 for tokens in results[0])
    assert all(result == results[0] for result in results)


def test_a_prompt_is_quantized_on_its_way(start_stack: Any) -> None:
    """What follows is the answer that the model gives from its own cache of bfloat16."""
    stack = start_stack.start(
        *("--kv-dtype", "fp8_e4m3", "--prefill-kv-dtype", "bfloat16", "--local-prefill-threshold", "0")
    )
    try:
        with Client(stack.gateway) as client:
            text = "The days of the week are Monday, Tuesday, Wednesday, Thursday,"
            answer = client.generate(text, max_tokens=8, temperature=0.0)
            assert "Friday, Saturday" in answer.text
        assert stack.metric("prefill", "tandem_nixl_bytes_transferred_total") > 0
        assert stack.metric("decode", "tandem_nixl_num_failed_transfers_total") == 0
        assert stack.stop() == 0
    finally:
        stack.kill()
