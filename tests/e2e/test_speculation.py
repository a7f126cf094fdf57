"""Drafts through real services: the same answers as without, in fewer steps, and figures that say so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tandem.client import AsyncClient, Client
from tandem.errors import InvalidRequestError

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 11},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.15, "frequency_penalty": 0.2, "seed": 5},
    "logprobs": {"temperature": 0.6, "logprobs": 3, "seed": 6},
    "choices": {"temperature": 0.9, "n": 2, "seed": 7},
    "stop": {"temperature": 0.0, "stop": ["12, 13", "\n\n"], "min_tokens": 6},
    "bias": {"temperature": 0.0, "logit_bias": {28: 3.0}, "min_tokens": 20},
}
PROMPTS = [
    "one two three four five six seven eight, one two three four five six seven eight, one two",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,",
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return a + b\n\ndef",
    "The sky is blue because",
]


async def answers(gateway: str, at_once: int, **speculation: Any) -> list[Any]:
    """Everything that a client is told, but for the figures."""
    limit = asyncio.Semaphore(at_once)
    async with AsyncClient(gateway) as client:

        async def one(prompt: str, settings: dict[str, Any]) -> Any:
            async with limit:
                result = await client.generate(prompt, max_tokens=32, **settings, **speculation)
            return [(c.token_ids, c.text, c.finish_reason, c.stop_match, c.logprobs) for c in result.choices]

        return await asyncio.gather(*(one(prompt, each) for prompt in PROMPTS for each in SETTINGS.values()))


@pytest.fixture(scope="module")
def stack(start_stack: Any) -> Any:
    running = start_stack.start("--speculation", "ngram", "--speculation-tokens", "5", "--speculation-fixed")
    yield running
    running.kill()


def test_answers_are_the_same_alone_and_in_company(stack: Any) -> None:
    without = asyncio.run(answers(stack.gateway, 16, speculation="off"))
    assert stack.metric("decode", "tandem_spec_decode_num_draft_tokens_total") == 0
    for at_once in (1, 16):
        assert asyncio.run(answers(stack.gateway, at_once)) == without
    drafted = stack.metric("decode", "tandem_spec_decode_num_draft_tokens_total")
    accepted = stack.metric("decode", "tandem_spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < drafted
    assert stack.metric("decode", "tandem_spec_decode_num_accepted_tokens_per_pos_total") == accepted
    assert stack.metric("decode", "tandem_spec_decode_proposer_draft_tokens_total") == drafted


def test_the_answer_says_what_drafts_did(stack: Any) -> None:
    with Client(stack.gateway) as client:
        options = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
        with_drafts = client.generate(PROMPTS[0], **options, speculation="ngram", speculation_tokens=3)
        without = client.generate(PROMPTS[0], **options, speculation="off")
    assert with_drafts.token_ids == without.token_ids
    assert (without.usage.draft_tokens, without.usage.accepted_draft_tokens) == (0, 0)
    assert 0 < with_drafts.usage.accepted_draft_tokens <= with_drafts.usage.draft_tokens
    told = stack.generate(PROMPTS[0], "--speculation", "ngram", "--max-tokens", "40", "--ignore-eos")
    assert told["token_ids"] == list(without.token_ids)
    assert told["usage"]["accepted_draft_tokens"] > 0


def test_unknown_proposers_are_refused_by_name(stack: Any) -> None:
    with Client(stack.gateway) as client:
        with pytest.raises(InvalidRequestError, match=r"speculation\.mode: 'magic' is not one of auto, off, ngram"):
            client.generate("x", speculation="magic")
        with pytest.raises(InvalidRequestError, match=r"speculation\.max_tokens: -1 is outside 0 to 64"):
            client.generate("x", speculation_tokens=-1)
