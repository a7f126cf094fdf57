"""The decode worker's process: load the engine, assemble, announce, serve until a signal, drain."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from pathlib import Path

from decode_service.assembly import Parts, assemble
from decode_service.config import SchedulerConfig
from decode_service.flags import Flags
from decode_service.worker import WorkerIdentity
from engine.config import resolve_engine_config
from engine.loading import Engine, load_engine
from engine.weights.checkpoint import read_config
from kv_transfer.layout import KvLayout
from tandem.service.logging import configure
from tandem.service.metrics import Metrics, start_metrics_server


def parts_of(engine: Engine, flags: Flags, metrics_address: str) -> Parts:
    """A loaded engine's identity and limits."""
    model, config = engine.model_config, engine.engine_config
    layout = KvLayout(config.block_size, config.kv_dtype, model.num_layers, model.num_kv_heads, model.head_dim)
    identity = WorkerIdentity(
        incarnation=secrets.token_hex(8),
        model_id=engine.model_id,
        model_name=model.name or Path(config.model).stem,
        layout=layout,
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
    )
    scheduler = SchedulerConfig(
        max_step_tokens=config.max_step_tokens,
        max_sequences=config.max_sequences,
        max_context=identity.max_context,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        mixed_prefill_tokens=flags.mixed_prefill_tokens,
        model_id=engine.model_id,
        layout_id=layout.layout_id,
        numerics_id=engine.numerics_id,
    )
    return Parts(identity, scheduler, engine.runner, engine.kv_cache.blocks_view(), config.prefix_cache)


def load(flags: Flags) -> Engine:
    """Load the model and warm it up; blocking. Raises ConfigError."""
    model_config = read_config(str(flags.engine["model"]))
    engine = load_engine(resolve_engine_config(flags.engine, model_config))
    engine.runner.warm_up()
    return engine


async def serve(flags: Flags) -> int:
    """The whole life of the process. Returns its exit code; raises ConfigError at start."""
    configure("decode", flags.log_level)
    engine = await asyncio.to_thread(load, flags)
    metrics = Metrics("decode")
    metrics_address = start_metrics_server(flags.metrics, metrics.registry)
    assembly = assemble(parts_of(engine, flags, metrics_address), flags.listen, metrics)
    try:
        address = await assembly.start()
        announce(address, metrics_address, assembly.worker.identity.incarnation)
        return await assembly.shell.run_until_signal(assembly.worker.drain, flags.drain_grace)
    finally:
        await assembly.close()


def announce(address: str, metrics_address: str, incarnation: str) -> None:
    """The one line on stdout that says where this worker serves."""
    ready = {
        "event": "ready",
        "role": "decode",
        "address": address,
        "metrics": metrics_address,
        "pid": os.getpid(),
        "incarnation": incarnation,
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
