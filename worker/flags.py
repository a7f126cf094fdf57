"""The flags that every worker has. A bad one raises ConfigError with its name; nothing is started then."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, NoReturn

from kv_transfer.registry import IN_CLEAR, available, require
from tandem.errors import ConfigError
from tandem.service import address as addresses
from tandem.service.logging import LEVELS
from tandem.service.tls import TlsFiles, add_tls_flags, tls_files


@dataclass(frozen=True, slots=True)
class Flags:
    """Everything that the command line says; `engine` goes to `engine.config.resolve_engine_config`."""

    listen: str
    metrics: str
    health: str | None
    engine: dict[str, object]
    transports: tuple[str, ...]
    drain_grace: float
    log_level: str
    tls: TlsFiles | None


class Parser(argparse.ArgumentParser):
    """The common flags of `python -m MODULE`; a room adds its own with `add_argument`."""

    def __init__(self, module: str, description: str, *, callers: str, chunk: str, sequences: str) -> None:
        """`callers`, `chunk` and `sequences` are the help of --listen, --chunk-size and --max-sequences."""
        super().__init__(prog=f"python -m {module}", description=description, allow_abbrev=False)
        add = self.add_argument
        add("--model", required=True, metavar="PATH", help="GGUF file, Hugging Face folder, default or hub:ORG/NAME")
        add("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help=callers)
        add("--metrics", default="127.0.0.1:0", metavar="HOST:PORT", help="where /metrics is served")
        add("--health", metavar="HOST:PORT", help="where health alone is served too, in clear, for probes")
        add("--device", default="auto", help="cpu, or cuda for a GPU; auto: a GPU where torch sees one")
        add("--compute", default="auto", help="auto, exact, bf16 or int8; on a GPU native, fp8, int8 or int4")
        add("--dtype", default="auto", help="of the weights: auto, float32 or bfloat16; on a GPU float16 too")
        add(
            "--kv-dtype",
            default="auto",
            help="of the KV cache: auto, float32, bfloat16, int8 or fp8_e4m3; on a GPU that of --dtype, or 8 bits",
        )
        add("--max-context", type=int, metavar="TOKENS", help="longest sequence; default: the model's")
        add(
            "--gpu-share",
            type=float,
            metavar="SHARE",
            help="of a GPU's memory, for model, steps and KV blocks, over 0 up to 1; default: all that is free",
        )
        add("--no-graphs", action="store_true", help="capture no decode steps as graphs on a GPU")
        add(
            "--attention",
            default="auto",
            help="on a GPU: auto (the best that is there), flashinfer, flash-attn-3, flash-attn-2, triton or torch",
        )
        add("--block-size", type=int, metavar="TOKENS", help="tokens a KV block")
        add("--num-blocks", type=int, metavar="N", help="KV blocks; or --kv-memory")
        add("--kv-memory", type=int, metavar="BYTES", help="memory of the KV cache")
        add("--chunk-size", type=int, metavar="TOKENS", help=chunk)
        add("--max-sequences", type=int, metavar="N", help=sequences)
        add("--transport", metavar="NAME", help="shm, nixl or grpc; default: whatever this machine can, best first")
        add("--no-prefix-cache", action="store_true", help="keep no blocks of finished requests")
        add(
            "--no-share-weights",
            action="store_true",
            help="hold weights of compute int8 in memory of this process only",
        )
        add("--threads", type=int, metavar="N", help="compute threads")
        add_tls_flags(self)
        add("--drain-grace", type=float, default=30.0, metavar="SECONDS", help="time to finish requests after SIGTERM")
        add("--log-level", default="info", help=", ".join(LEVELS))

    def error(self, message: str) -> NoReturn:
        """One line for the caller to print, in place of argparse's usage and exit."""
        raise ConfigError(message)


def common(values: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Flags`. Raises ConfigError; values of the engine are checked where they are resolved."""
    addresses.parse(values.listen, flag="--listen")
    addresses.parse(values.metrics, flag="--metrics")
    if values.health is not None:
        addresses.parse(values.health, flag="--health")
    if not 0 <= values.drain_grace < float("inf"):
        raise ConfigError(f"--drain-grace: must be 0 or more seconds, got {values.drain_grace:g}")
    if values.log_level not in LEVELS:
        raise ConfigError(f"--log-level: {values.log_level!r} is not one of {', '.join(LEVELS)}")
    tls = tls_files(values.tls_cert, values.tls_key, values.tls_ca)
    return {
        "listen": values.listen,
        "metrics": values.metrics,
        "health": values.health,
        "engine": _engine(values),
        "transports": _transports(values.transport),
        "drain_grace": values.drain_grace,
        "log_level": values.log_level,
        "tls": tls,
    }


def _engine(values: argparse.Namespace) -> dict[str, object]:
    return {
        "model": values.model,
        "device": values.device,
        "compute": values.compute,
        "dtype": values.dtype,
        "kv_dtype": values.kv_dtype,
        "block_size": values.block_size,
        "num_blocks": values.num_blocks,
        "kv_memory": values.kv_memory,
        "max_step_tokens": values.chunk_size,
        "max_sequences": values.max_sequences,
        "prefix_cache": not values.no_prefix_cache,
        "share_weights": not values.no_share_weights,
        "max_context": values.max_context,
        "graphs": not values.no_graphs,
        "gpu_share": values.gpu_share,
        "attention": values.attention,
        "threads": values.threads,
    }


def _transports(wanted: str | None) -> tuple[str, ...]:
    """What this worker may use, best first. The network always works; shared memory is left out by `grpc`.

    KV goes over a network in clear only where that transport was asked for by name.
    """
    here = available()
    if wanted is not None:
        try:
            require(wanted)
        except ConfigError as exc:
            raise ConfigError(f"--transport: {exc.message}") from exc
        here = here[here.index(wanted) :]
    return tuple(name for name in here if name == wanted or name not in IN_CLEAR)
