"""A worker's process: parse flags, load the engine, assemble, announce, serve until a signal, drain.

Torch-free: a wrong flag is told before torch is imported. `serve` is given what loads and what assembles.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from kv_transfer.registry import IN_CLEAR
from tandem.errors import ConfigError
from tandem.service import address as addresses
from tandem.service.logging import configure, get_logger
from tandem.service.metrics import Metrics, start_metrics_server
from tandem.service.server import run
from tandem.service.tls import ROLE_NAMES, Tls
from worker.assembly import Assembly
from worker.flags import Flags

_log = get_logger(__name__)
OPENMP_SPINS = "2000"
"""How long OpenMP's idle threads spin for the next parallel region: some 20 microseconds, the time between two of one
step. Its default is milliseconds, of a core that the event loop, the gateway and other workers could use."""
F = TypeVar("F", bound=Flags)
T = TypeVar("T")


def main(
    argv: Sequence[str] | None,
    parse_flags: Callable[[Sequence[str]], F],
    serve_flags: Callable[[F], Coroutine[Any, Any, int]],
) -> int:
    """Exit code: 0 after an orderly end, 2 with one line on stderr when it can't start."""
    try:
        flags = parse_flags(sys.argv[1:] if argv is None else argv)
    except ConfigError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)  # read when torch is loaded
    return run(lambda: serve_flags(flags))


async def serve(
    role: str,
    flags: Flags,
    load: Callable[[], T],
    build: Callable[[T, str, Metrics, Tls | None], Assembly],
) -> int:
    """The whole life of the process. Returns its exit code; raises ConfigError at start.

    `load` blocks; `build` gets what it gave, the bound address of /metrics, the metrics and the certificates.
    """
    configure(role, flags.log_level)
    # Before the model: a wrong certificate is told at once.
    tls = Tls(flags.tls, ROLE_NAMES[role]) if flags.tls is not None else None
    if tls is not None and (clear := IN_CLEAR.intersection(flags.transports)):
        _log.warning("KV travels in clear: its network must be nobody else's", transports=sorted(clear))
    engine = await asyncio.to_thread(load)
    metrics = Metrics(role)
    metrics_address = start_metrics_server(flags.metrics, metrics.registry)
    assembly = build(engine, metrics_address, metrics, tls)
    try:
        address = await assembly.start()
        if tls is None and not addresses.parse(address).is_loopback:
            _log.warning(
                "prompts and KV travel in clear, and nobody is asked who they are: no --tls-cert", address=address
            )
        announce(role, address, metrics_address, assembly.worker.identity.incarnation)
        return await assembly.shell.run_until_signal(assembly.worker.drain, flags.drain_grace)
    finally:
        await assembly.close()


def announce(role: str, address: str, metrics_address: str, incarnation: str) -> None:
    """The one line on stdout that says where this worker serves. Raises ConfigError when nobody can read it."""
    ready = {
        "event": "ready",
        "role": role,
        "address": address,
        "metrics": metrics_address,
        "pid": os.getpid(),
        "incarnation": incarnation,
    }
    try:
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
    except OSError as exc:
        raise ConfigError(f"can't announce on stdout: {exc}") from exc
