"""The proposers that need a model, around a loaded engine. The one module of this package that imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from decode_service.flags import Flags
from decode_service.speculation.config import Borrower, SpeculationConfig
from decode_service.speculation.draft import DraftProposer
from decode_service.speculation.draft_memory import BorrowedMemory, OwnMemory
from decode_service.speculation.eagle_memory import EagleMemory
from decode_service.speculation.proposer import Proposer
from engine.block_pool import BlockPool
from engine.config import ModelConfig
from engine.eagle_runner import EagleRunner
from engine.features import FeatureStore
from engine.kv_cache import KVCache
from engine.loading import Engine, load_engine, resolve
from engine.models.eagle_loader import load_eagle
from engine.models.skipping import KeptCache, keep_layers, parse_layers
from engine.models.transformer import Model
from engine.runner import Runner
from engine.weights.checkpoint import read_config
from engine.weights.vocabulary import check_same_vocabulary
from tandem.errors import ConfigError, TandemError
from tandem.service.logging import get_logger

_log = get_logger(__name__)
EAGLE_CATCH_UP: Final = 256
"""Rows of a head that one call computes for outputs that begin: one layer each."""
_SHARED_SETTINGS: Final = ("threads", "share_weights", "prefix_cache")
"""Settings of the engine that the draft model's has too."""


def with_models(config: SpeculationConfig, flags: Flags, engine: Engine) -> SpeculationConfig:
    """`config` with the proposers named in `config.models`, loaded and warm; blocking.

    Raises ConfigError, naming the flag: the draft model can't be read or has another vocabulary, the layers aren't
    there.
    """
    made: list[Proposer] = []
    borrowers: list[Borrower] = []
    for name in config.models:
        proposer, memory = _MAKERS[name](flags, engine)
        made.append(proposer)
        if isinstance(memory, BorrowedMemory):
            borrowers.append(memory)
    return replace(config, proposers=[*config.proposers, *made], borrowers=borrowers)


def _draft(flags: Flags, engine: Engine) -> tuple[Proposer, OwnMemory]:
    """A smaller model with as many KV blocks as the target has: so it lacks none while the target doesn't."""
    path, target = str(flags.draft_model), engine.engine_config
    try:
        check_same_vocabulary(path, target.model, flag="--draft-model")
        settings = {key: flags.engine[key] for key in _SHARED_SETTINGS}
        # What computes the drafts fastest: their bits decide nothing.
        settings |= {
            "model": path,
            "device": target.device,
            "block_size": target.block_size,
            "num_blocks": target.num_blocks,
        }
        draft = load_engine(resolve(settings, read_config(path)))
    except TandemError as error:
        if isinstance(error, ConfigError) and error.message.startswith("--draft-model"):
            raise
        raise ConfigError(f"--draft-model: {error.message}") from error
    draft.runner.warm_up()
    _log.info("draft model", model=path, compute=draft.engine_config.compute, layers=draft.model_config.num_layers)
    memory = OwnMemory(BlockPool(target.num_blocks, target.block_size, prefix_cache=target.prefix_cache))
    return DraftProposer("draft", draft.runner, memory, _context(draft.model_config, engine)), memory


def _self(flags: Flags, engine: Engine) -> tuple[Proposer, BorrowedMemory]:
    """The target without some layers, over its own weights and KV."""
    config = engine.engine_config
    layers = parse_layers(str(flags.self_draft_layers), engine.model_config.num_layers, flag="--self-draft-layers")
    if not isinstance(engine.kv_cache, KVCache):
        raise ConfigError("--self-draft-layers: only on a CPU (--device cpu)")
    cache = KeptCache(engine.kv_cache, layers)
    runner = Runner(keep_layers(engine.runner.model, layers), cache, config)
    runner.warm_up()
    memory = BorrowedMemory()
    return DraftProposer("self", runner, memory, config.context_limit(engine.model_config)), memory


def _eagle(flags: Flags, engine: Engine) -> tuple[Proposer, EagleMemory]:
    """An EAGLE head over the target's hidden states."""
    path, config, model = str(flags.eagle_head), engine.engine_config, engine.runner.model
    if not isinstance(model, Model):
        raise ConfigError("--eagle-head: compute int8 keeps no hidden states; use --compute exact or bf16")
    limit = config.context_limit(engine.model_config)
    try:
        head = load_eagle(path, model, limit)
    except TandemError as error:
        raise ConfigError(f"--eagle-head: {error.message}") from error
    features = FeatureStore(head.taps)
    engine.runner.keep_features(features)
    runner = EagleRunner(head, features, config.num_blocks, config.block_size)
    runner.warm_up()
    memory = EagleMemory(BlockPool(config.num_blocks, config.block_size, prefix_cache=False), features, runner)
    return DraftProposer("eagle", runner, memory, limit, catch_up_tokens=EAGLE_CATCH_UP), memory


def _context(draft: ModelConfig, engine: Engine) -> int:
    return min(draft.max_context, engine.engine_config.context_limit(engine.model_config))


_MAKERS: Final[Mapping[str, Callable[[Flags, Engine], tuple[Proposer, OwnMemory | BorrowedMemory]]]] = {
    "draft": _draft,
    "self": _self,
    "eagle": _eagle,
}
