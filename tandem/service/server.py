"""The shell around every gRPC server of Tandem.

Life cycle: ServerShell(...) -> add servicers to `.server` and names by `add_service` -> `await start()` (bound,
NOT_SERVING) -> `set_serving(True)` -> `await run_until_signal(drain, grace)`: on SIGTERM or SIGINT first NOT_SERVING,
then `drain(grace)`, which takes nothing new and finishes what it can, then the server stops and streams that are left
end. A second signal skips the rest.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.errors import ConfigError
from tandem.service import address as addresses
from tandem.service.channel import BULK_WINDOW_BYTES, MAX_MESSAGE_BYTES
from tandem.service.health import Health
from tandem.service.interceptor import ErrorInterceptor
from tandem.service.logging import get_logger
from tandem.service.peers import Admit
from tandem.service.tls import Tls

_log = get_logger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_HEALTH_BYTES = 4096
DRAIN_MARGIN = 5.0
FINAL_GRACE = 1.0
"""Seconds that streams get to send their last status after the drain."""


def server_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, Any]]:
    """Options of a server: limits, keepalive that allows the pings our clients send, windows for KV in streams."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_metadata_size", 64 << 10),
        ("grpc.max_concurrent_streams", 4096),
        # Two servers must never share a port in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A peer whose host is gone without a word holds what is its own for so long. Its answer to a ping may stand
        # behind KV that it sends over a slow network.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.lookahead_bytes", BULK_WINDOW_BYTES),
    ]


class ServerShell:
    """One gRPC server with error mapping, health, reflection and an orderly end. Belongs to the running event loop."""

    def __init__(
        self,
        role: str,
        listen: str,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        tls: Tls | None = None,
        client_certificates: bool = True,
        admit: Admit | None = None,
        health: str | None = None,
    ) -> None:
        """`listen` is HOST:PORT, port 0 for any. Raises ConfigError when it isn't. Call inside a running loop.

        `tls`: serve TLS, to clients with a certificate only unless `client_certificates` is False. `admit` is asked
        before each RPC. `health` is another HOST:PORT, where health alone is served, always in clear: those who probe
        a process, such as Kubernetes, have no certificates.
        """
        self.role = role
        self._listen = addresses.parse(listen, flag="--listen")
        self._tls, self._client_certificates = tls, client_certificates
        self.server: grpc.aio.Server = grpc.aio.server(
            interceptors=[ErrorInterceptor(admit)], options=server_options(max_message_bytes)
        )
        self._health = Health()
        self._health_listen = addresses.parse(health, flag="--health") if health is not None else None
        self._health_server: grpc.aio.Server | None = None
        self.health_address = ""
        self._stop = asyncio.Event()
        self._signals = 0
        self._leaving: asyncio.Future[None] | None = None

    def add_service(self, full_name: str) -> None:
        """Makes a service known to health and reflection, for example "tandem.v1.DecodeService". Before `start`."""
        self._health.services.add(full_name)

    async def start(self) -> str:
        """Binds and accepts; returns the bound HOST:PORT. Health says NOT_SERVING until `set_serving(True)`."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = [*sorted(self._health.services - {""}), health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._health.services.add(health.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        try:
            port = self._add_port()
        except RuntimeError as exc:
            raise ConfigError(f"can't listen on {self._listen}: is the address right and the port free?") from exc
        await self.server.start()
        if self._health_listen is not None:
            await self._start_health(self._health_listen)
        return str(self._listen.with_port(port))

    async def _start_health(self, listen: addresses.Address) -> None:
        self._health_server = grpc.aio.server(options=server_options(MAX_HEALTH_BYTES))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
        try:
            port = self._health_server.add_insecure_port(str(listen))
        except RuntimeError as exc:
            raise ConfigError(f"--health: can't listen on {listen}: is the address right and the port free?") from exc
        await self._health_server.start()
        self.health_address = str(listen.with_port(port))

    def send_clients_on(self, grace: float) -> None:
        """Before a drain of `grace` seconds: takes no more connections and calls, and tells those who have one to call
        elsewhere. What runs goes on. Behind one address of many servers a client would else stay with this one.
        """
        self._leaving = asyncio.ensure_future(self.server.stop(grace + DRAIN_MARGIN))

    async def stop(self, grace: float) -> None:
        """Ends both servers; calls get `grace` seconds to end. Idempotent."""
        await self.server.stop(grace)
        if self._leaving is not None:
            await self._leaving
        if self._health_server is not None:
            await self._health_server.stop(0)

    def _add_port(self) -> int:
        if self._tls is None:
            return self.server.add_insecure_port(str(self._listen))
        credentials = self._tls.server_credentials(client_certificates=self._client_certificates)
        return self.server.add_secure_port(str(self._listen), credentials)

    def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 says for every service."""
        self._health.set_serving(serving)

    def set_life(self, alive: Callable[[], bool]) -> None:
        """What health says of "liveness", asked each time: false means that only a restart helps."""
        self._health.alive = alive

    def request_stop(self) -> None:
        """What a signal does: the first asks for an orderly end, the second for an end at once."""
        self._signals += 1
        self._stop.set()

    async def run_until_signal(self, drain: Callable[[float], Awaitable[None]], grace: float) -> int:
        """Serves until SIGTERM or SIGINT, drains for at most `grace` seconds, stops. Returns 0, or 1 when cut short.

        A failing `drain` is logged and the server still stops.
        """
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            # Installed even where the shell set SIGINT to be ignored, as it does for background jobs.
            loop.add_signal_handler(number, self.request_stop)
        try:
            await self._stop.wait()
            _log.info("draining", grace_seconds=grace)
            self.set_serving(False)
            finished = await self._drain(drain, grace)
            await self.stop(FINAL_GRACE if finished else 0)
            return 0 if finished else 1
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    async def _drain(self, drain: Callable[[float], Awaitable[None]], grace: float) -> bool:
        """Runs `drain` beside a watch for the second signal. False when that came first."""
        self._stop.clear()
        if self._signals > 1:
            return False
        work = asyncio.ensure_future(drain(grace))
        second = asyncio.ensure_future(self._stop.wait())
        # `drain` keeps to its grace itself; the margin is for one that hangs.
        await asyncio.wait({work, second}, timeout=grace + DRAIN_MARGIN, return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if not work.done():
            work.cancel()
        results = await asyncio.gather(work, second, return_exceptions=True)
        if isinstance(results[0], Exception):
            _log.error("drain failed", exc_info=results[0])
        return self._signals < 2


def run(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Runs a process's main coroutine on uvloop (asyncio where there is none); returns its exit code.

    A ConfigError becomes one line on stderr and exit code 2. SIGTERM ends what doesn't serve yet at once, with code 0.
    """
    before = signal.signal(signal.SIGTERM, _end_at_once)
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main())
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        return 2
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _end_at_once(_number: int, _frame: object) -> NoReturn:
    """Until `run_until_signal` there is nothing to drain, and a model that a thread is loading can't be called off.

    Without a handler the first process of a container would not hear the signal at all.
    """
    os._exit(0)
