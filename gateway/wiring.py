"""Puts the gateway together and runs it.

Life cycle: `Gateway.start` (tokenizer, ports, worker watches) -> serves -> `close`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.access import Access
from gateway.catalog import Catalog
from gateway.config import GatewayConfig
from gateway.discovery.listed import ListedWorkers
from gateway.discovery.source import Source
from gateway.dispatch import Dispatcher
from gateway.http import HttpServer
from gateway.pairing import Pairing
from gateway.pool import WorkerPool
from gateway.pool_metrics import PoolMetrics
from gateway.request import Services
from gateway.servicer import InferenceServicer
from gateway.text import TextService
from tandem.models import resolve_model
from tandem.service import address as addresses
from tandem.service.logging import get_logger
from tandem.service.metrics import Metrics
from tandem.service.server import ServerShell
from tandem.service.tls import ROLE_NAMES, Tls, TlsFiles
from tandem.v1 import inference_pb2_grpc

_log = get_logger(__name__)
SERVICE = "tandem.v1.InferenceService"


@dataclass(frozen=True)
class Bindings:
    """Where the gateway finds its model and its workers, and where it listens."""

    model: str
    listen: str
    http: str
    prefill: Sequence[str] = ()
    decode: Sequence[str] = ()
    source: Source | None = None
    """Where workers come from; None: from the two lists."""
    tls: TlsFiles | None = None
    client_certificates: bool = False
    """With TLS: only clients with a certificate of the authorities connect."""
    health: str | None = None
    """Where health alone is served too, in clear."""
    api_keys: Path | None = None


class Gateway:
    """All parts of one gateway."""

    def __init__(self, bindings: Bindings, config: GatewayConfig, text: TextService | None = None) -> None:
        """Loads the tokenizer unless `text` is given. Inside a running loop. Raises ConfigError."""
        self._bindings = bindings
        self.text = text or TextService.load(resolve_model(bindings.model, weights=False))
        tls = Tls(bindings.tls, ROLE_NAMES["gateway"]) if bindings.tls is not None else None
        self.pool = WorkerPool(silence=config.patience.heartbeat_timeout, tls=tls, ejecting=config.patience.ejecting)
        self._source = bindings.source or ListedWorkers(bindings.prefill, bindings.decode)
        self.metrics = Metrics("gateway")
        pairing = Pairing(self.pool, config)
        dispatcher = Dispatcher(self.pool, pairing, config)
        self.metrics.registry.register(PoolMetrics(self.pool, dispatcher))
        services = Services(config, dispatcher, pairing, self.text.tokenizer, self.metrics)
        self.access = Access(bindings.api_keys, certificates=bindings.client_certificates)
        catalog = Catalog(self.pool, self.text.tokenizer)
        self.servicer = InferenceServicer(services, self.text, catalog, self.access)
        self.shell = ServerShell(
            "gateway",
            bindings.listen,
            tls=tls,
            client_certificates=bindings.client_certificates,
            admit=None if self.access.open else self.access.admit,
            health=bindings.health,
        )
        self.http = HttpServer(bindings.http, self.metrics.registry, lambda: self.serving, catalog.workers)
        self.address = self.http_address = ""

    async def start(self) -> None:
        """Binds both ports, then looks for workers; health follows them."""
        self.shell.add_service(SERVICE)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.servicer, self.shell.server)
        self.address = await self.shell.start()
        self.http_address = await self.http.start()
        self._warn()
        self.pool.on_change(self._on_change)
        self._source.start(self.pool)

    def _warn(self) -> None:
        """What an operator should know of a port that other machines reach."""
        if addresses.parse(self.address).is_loopback:
            return
        if self.access.open:
            _log.warning("everybody who reaches this address may use it: no --api-keys", address=self.address)
        if self._bindings.tls is None:
            _log.warning("prompts and keys travel in clear to this address: no --tls-cert", address=self.address)

    @property
    def serving(self) -> bool:
        """What health says: new requests are welcome."""
        return self.pool.serving and not self.servicer.draining

    def _on_change(self) -> None:
        self.shell.set_serving(self.serving)

    def ready_line(self) -> str:
        """What the process that started us reads."""
        return json.dumps(
            {
                "event": "ready",
                "role": "gateway",
                "address": self.address,
                "http": self.http_address,
                "pid": os.getpid(),
            }
        )

    async def run(self, grace: float) -> int:
        """Serves until a signal, finishes what runs. Returns the exit code."""
        return await self.shell.run_until_signal(self._drain, grace)

    async def _drain(self, grace: float) -> None:
        self.servicer.draining = True
        self._on_change()
        self.shell.send_clients_on(grace)
        await self.servicer.drain(grace)

    async def close(self) -> None:
        """Ends the server, watches and channels."""
        await self.shell.stop(0)
        await self.http.close()
        await self._source.close()
        await self.pool.close()
        self.text.close()
