"""Makes the room's own modules importable by name, as `python tests/chaos` does; and small clusters to break."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from small_cluster import Small, small  # noqa: E402

from gateway.tokenizer import load_tokenizer  # noqa: E402
from tandem.models import resolve_model  # noqa: E402


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model's file, of which only the tokenizer is used here."""
    return resolve_model("default")


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Any:
    """The default model's."""
    return load_tokenizer(model_path)


@pytest.fixture
async def start_small(
    tokenizer: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Any]]:
    """`await start_small(decode=1, ...)` gives a cluster; see `small_cluster`."""
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> Small:
            return await stack.enter_async_context(small(tokenizer, str(model_path), monkeypatch, **options))

        yield start
