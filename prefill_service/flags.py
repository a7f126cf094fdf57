"""The flags of `python -m prefill_service`. A bad one raises ConfigError with its name; nothing is started then."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from kv_transfer.registry import available
from tandem.errors import ConfigError
from tandem.service import address as addresses
from tandem.service.logging import LEVELS


@dataclass(frozen=True, slots=True)
class Flags:
    """Everything that the command line says; `engine` goes to `engine.config.resolve_engine_config`."""

    listen: str
    metrics: str
    engine: dict[str, object]
    transports: tuple[str, ...]
    drain_grace: float
    log_level: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line for the caller to print, in place of argparse's usage and exit."""
        raise ConfigError(message)


def parse_flags(argv: Sequence[str]) -> Flags:
    """Raises ConfigError. Values of the engine are checked where they are resolved."""
    values = _parser().parse_args(argv)
    addresses.parse(values.listen, flag="--listen")
    addresses.parse(values.metrics, flag="--metrics")
    if not values.drain_grace >= 0:
        raise ConfigError(f"--drain-grace: must not be negative, got {values.drain_grace:g}")
    if values.log_level not in LEVELS:
        raise ConfigError(f"--log-level: {values.log_level!r} is not one of {', '.join(LEVELS)}")
    return Flags(
        listen=values.listen,
        metrics=values.metrics,
        engine={
            "model": values.model,
            "compute": values.compute,
            "dtype": values.dtype,
            "kv_dtype": values.kv_dtype,
            "block_size": values.block_size,
            "num_blocks": values.num_blocks,
            "kv_memory": values.kv_memory,
            "max_step_tokens": values.chunk_size,
            "max_sequences": values.max_sequences,
            "prefix_cache": not values.no_prefix_cache,
            "threads": values.threads,
        },
        transports=_transports(values.transport),
        drain_grace=values.drain_grace,
        log_level=values.log_level,
    )


def _transports(wanted: str | None) -> tuple[str, ...]:
    """What this worker may send by, best first. The network always works; shared memory is left out by `grpc`."""
    here = available()
    if wanted is None:
        return tuple(here)
    if wanted not in here:
        raise ConfigError(f"--transport: {wanted!r} is not available here; available are {', '.join(here)}")
    return tuple(here[here.index(wanted) :])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m prefill_service", description="Runs one prefill worker.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a GGUF file or a Hugging Face folder")
    add("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="where gateways call")
    add("--metrics", default="127.0.0.1:0", metavar="HOST:PORT", help="where /metrics is served")
    add("--compute", default="auto", help="auto, exact or bf16")
    add("--dtype", default="auto", help="of the weights: auto, float32 or bfloat16")
    add("--kv-dtype", default="auto", help="of the KV cache: auto, float32 or bfloat16")
    add("--block-size", type=int, metavar="TOKENS", help="tokens a KV block")
    add("--num-blocks", type=int, metavar="N", help="KV blocks; or --kv-memory")
    add("--kv-memory", type=int, metavar="BYTES", help="memory of the KV cache")
    add("--chunk-size", type=int, metavar="TOKENS", help="prompt tokens a step, all requests together")
    add("--max-sequences", type=int, metavar="N", help="most prompts that are computed at once")
    add("--transport", metavar="NAME", help="shm or grpc; default: whatever this machine can, best first")
    add("--no-prefix-cache", action="store_true", help="keep no blocks of finished requests")
    add("--threads", type=int, metavar="N", help="compute threads")
    add("--drain-grace", type=float, default=30.0, metavar="SECONDS", help="time to finish requests after SIGTERM")
    add("--log-level", default="info", help=", ".join(LEVELS))
    return parser
