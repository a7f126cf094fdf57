"""Draft models through real processes: the same answers, and figures by proposer."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.client import Client
from tandem.models import default_model

PROMPT = "The three largest cities of France are"


@pytest.fixture(scope="module")
def stack(start_stack: Any) -> Any:
    running = start_stack.start(
        *("--draft-model", str(default_model()), "--self-draft-layers", "0-9,12-29"),
        *("--prefill", "0", "--speculation-fixed", "--speculation-tokens", "3", "--num-blocks", "256"),
    )
    yield running
    running.kill()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 5}])
def test_answers_are_the_same_with_either(stack: Any, options: dict[str, Any]) -> None:
    with Client(stack.gateway) as client:
        results = {
            mode: client.generate(PROMPT, max_tokens=24, ignore_eos=True, speculation=mode, **options)
            for mode in ("off", "draft", "self")
        }
    assert results["draft"].token_ids == results["self"].token_ids == results["off"].token_ids
    assert results["off"].usage.draft_tokens == 0
    assert results["self"].usage.draft_tokens > 0
    drafted = results["draft"].usage
    assert drafted.accepted_draft_tokens == drafted.draft_tokens > 8, "the target itself drafted, with the same noise"
