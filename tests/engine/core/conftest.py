"""A tiny random Llama in a folder, engines over it, and each kernel implementation in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama

from engine.config import EngineConfig
from engine.loading import Engine, load_engine
from kernels import dispatch


@pytest.fixture(params=dispatch.NAMES)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each implementation."""
    with dispatch.forced(request.param) as chosen:
        yield chosen.name


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread unless a test asks for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a random two-layer Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def make_engine(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """`make_engine(num_blocks=32, block_size=4, buffer_factory=None, **settings)`."""
    kernels = dispatch.build.cache_dir()
    monkeypatch.setattr(dispatch.build, "cache_dir", lambda: kernels)  # no kernel is compiled again
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path))

    def make(num_blocks: int = 32, block_size: int = 4, buffer_factory: Any = None, **settings: Any) -> Engine:
        config = EngineConfig(model=str(tiny_model), num_blocks=num_blocks, block_size=block_size, **settings)
        return load_engine(config, buffer_factory)

    return make
