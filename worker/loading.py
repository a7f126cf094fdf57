"""A loaded engine and what it is. With `ranks` the one module of this room that imports torch."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from engine.loading import BufferFactory, Engine, load_engine, resolve
from engine.parallel.group import Ranks
from engine.weights.checkpoint import read_config
from kernels import kv_order
from kv_transfer.registry import host_id
from tandem.kv_layout import DEFAULT_ORDER, PAIRED_ORDER, KvLayout
from tandem.models import resolve_model
from tandem.service.collector import freeze_loaded
from tandem.service.logging import get_logger
from worker.flags import Flags
from worker.identity import WorkerIdentity

_log = get_logger(__name__)
ORDERS = {kv_order.PLAIN: DEFAULT_ORDER, kv_order.PAIRED: PAIRED_ORDER}


def load(
    flags: Flags, make_buffer: BufferFactory | None = None, ranks: Ranks | None = None, *, sends: bool = True
) -> Engine:
    """Load the model and warm it up; blocking. `make_buffer` gives the KV cache's memory; `sends`: what steps write is
    read from there. Raises ConfigError.

    With `ranks` it is rank 0's part, and the others have loaded theirs.
    """
    engine = load_part(flags, make_buffer, ranks, sends=sends)
    engine.runner.warm_up()
    freeze_loaded()
    return engine


def load_part(flags: Flags, make_buffer: BufferFactory | None, ranks: Ranks | None, *, sends: bool) -> Engine:
    """This process's part of the model, or all of it; not warm. Raises ConfigError."""
    model = str(resolve_model(str(flags.engine["model"])))
    _log.info("loading", model=model)
    size = ranks.size if ranks is not None else 1
    config = resolve({**flags.engine, "model": model}, read_config(model), size)
    return load_engine(config, make_buffer, transfers=True, ranks=ranks, sends=sends)


def identity_of(engine: Engine, flags: Flags, metrics_address: str) -> WorkerIdentity:
    """A new incarnation of a worker around `engine`."""
    model, config = engine.model_config, engine.engine_config
    return WorkerIdentity(
        incarnation=secrets.token_hex(8),
        model_id=engine.model_id,
        model_name=model.name or Path(config.model).stem,
        layout=layout_of(engine),
        numerics_id=engine.numerics_id,
        max_context=config.context_limit(model),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        transports=flags.transports,
        total_blocks=config.num_blocks,
        max_sequences=config.max_sequences,
        architecture=model.architecture,
        quantization=model.quantization,
        metrics_address=metrics_address,
        host_id=host_id(),
    )


def layout_of(engine: Engine) -> KvLayout:
    """How the engine's KV blocks lie in memory, in each rank's."""
    model, config, ranks = engine.model_config, engine.engine_config, engine.degree
    heads, order = model.num_kv_heads // ranks, ORDERS[engine.kv_cache.order]
    return KvLayout(config.block_size, config.kv_dtype, model.num_layers, heads, model.head_dim, order, ranks)


def limits_of(engine: Engine, identity: WorkerIdentity) -> dict[str, Any]:
    """The fields of `EngineLimits`."""
    return {
        "max_step_tokens": engine.engine_config.max_step_tokens,
        "max_sequences": identity.max_sequences,
        "max_context": identity.max_context,
        "vocab_size": identity.vocab_size,
        "eos_token_ids": identity.eos_token_ids,
        "model_id": identity.model_id,
        "layout_id": identity.layout.layout_id,
        "numerics_id": identity.numerics_id,
    }
