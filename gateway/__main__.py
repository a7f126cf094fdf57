"""`python -m gateway`: one gateway process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gateway.breaker import Ejecting
from gateway.config import GatewayConfig, Limits, Patience
from gateway.discovery.flags import add_discovery_flags, source_of
from gateway.wiring import Bindings, Gateway
from tandem.errors import ConfigError
from tandem.service import logging, server
from tandem.service.collector import freeze_loaded
from tandem.service.tls import add_tls_flags, tls_files


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _grace(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return value


def parser() -> argparse.ArgumentParser:
    """All flags of the gateway."""
    flags = argparse.ArgumentParser("python -m gateway", description="Tandem's gateway", allow_abbrev=False)
    add = flags.add_argument
    add("--model", required=True, help="GGUF file, Hugging Face folder, default or hub:ORG/NAME; for its tokenizer")
    add("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="gRPC; port 0 for any")
    add("--http", default="127.0.0.1:0", metavar="HOST:PORT", help="/metrics and /healthz; port 0 for any")
    add("--health", metavar="HOST:PORT", help="where health alone is served too, in clear, for probes")
    add_discovery_flags(flags)
    _add_limits(flags, GatewayConfig())
    _add_access(flags)
    add("--drain-grace", type=_grace, default=30.0, help="seconds that running requests get after SIGTERM")
    add("--log-level", default="info", choices=logging.LEVELS)
    return flags


def _add_limits(flags: argparse.ArgumentParser, config: GatewayConfig) -> None:
    """What a request may take, and what it may cost others."""
    add = flags.add_argument
    add("--max-queue", type=_positive, default=config.max_queue, help="requests that may wait for workers")
    add(
        "--default-timeout", type=_seconds, default=config.patience.default_timeout, help="seconds, where none is given"
    )
    add("--max-prompt-bytes", type=_positive, default=config.limits.max_prompt_bytes, help="most bytes of text")
    add(
        "--local-prefill-threshold",
        type=_not_negative,
        default=config.local_prefill_threshold,
        help="prompts that lack at most this many tokens are computed by the decode worker",
    )
    add(
        "--max-migrations",
        type=_not_negative,
        default=config.patience.max_migrations,
        help="decode workers that one request may lose",
    )
    add(
        "--max-deaths",
        type=_positive,
        default=config.patience.max_deaths,
        help="a request aboard so many workers that died is taken for the cause and fails",
    )
    add(
        "--eject-after",
        type=_not_negative,
        default=config.patience.ejecting.after,
        help="a worker at which so many requests in a row failed gets nothing new for a while; 0: never",
    )


def _add_access(flags: argparse.ArgumentParser) -> None:
    """Who may call."""
    add = flags.add_argument
    add_tls_flags(flags)
    add(
        "--tls-client-auth",
        choices=("none", "required"),
        default="none",
        help="required: only clients with a certificate of --tls-ca connect",
    )
    add(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="JSON or TOML: tenants and SHA-256 hashes of their keys; every call then needs a key",
    )


def _bindings(flags: argparse.Namespace) -> Bindings:
    source = source_of(flags)
    tls = tls_files(flags.tls_cert, flags.tls_key, flags.tls_ca)
    if tls is None and flags.tls_client_auth != "none":
        raise ConfigError("--tls-client-auth: it needs --tls-cert, --tls-key and --tls-ca")
    return Bindings(
        flags.model,
        flags.listen,
        flags.http,
        source=source,
        tls=tls,
        client_certificates=flags.tls_client_auth == "required",
        api_keys=flags.api_keys,
        health=flags.health,
    )


async def _main(flags: argparse.Namespace) -> int:
    config = GatewayConfig(
        max_queue=flags.max_queue,
        local_prefill_threshold=flags.local_prefill_threshold,
        limits=replace(Limits(), max_prompt_bytes=flags.max_prompt_bytes),
        patience=replace(
            Patience(),
            default_timeout=flags.default_timeout,
            max_migrations=flags.max_migrations,
            max_deaths=flags.max_deaths,
            ejecting=replace(Ejecting(), after=flags.eject_after),
        ),
    )
    gateway = Gateway(_bindings(flags), config)
    try:
        await gateway.start()
        freeze_loaded()
        print(gateway.ready_line(), flush=True)  # noqa: T201
        return await gateway.run(flags.drain_grace)
    finally:
        await gateway.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; the exit code."""
    flags = parser().parse_args(argv)
    logging.configure("gateway", flags.log_level)
    return server.run(lambda: _main(flags))


if __name__ == "__main__":
    sys.exit(main())
