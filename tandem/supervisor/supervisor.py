"""Starts, watches, scales and stops the processes of one `tandem up`.

Life cycle: `await start()` (all processes at once; returns when the gateway serves and sees its workers) -> scale and
status at any time -> `await stop()` (gateways, then prefill, then decode, so that no stage loses the next one under
it). `kill()` ends all at once. Whatever happened before, after `stop` no process and no file is left.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import ConfigError, InvalidRequestError, UnavailableError
from tandem.service.address import Address, parse
from tandem.service.channel import open_service_channel
from tandem.service.logging import get_logger
from tandem.service.tls import ROLE_NAMES, Tls
from tandem.supervisor.control import ControlServer
from tandem.supervisor.listing import listed
from tandem.supervisor.load import with_loads
from tandem.supervisor.process import LogLine
from tandem.supervisor.runtime import Instance, answers, control_socket
from tandem.supervisor.settings import (
    Role,
    UpSettings,
    check_count,
    gateway_arguments,
    gpu_variables,
    worker_arguments,
)
from tandem.supervisor.slot import Slot, State

_log = get_logger(__name__)

SERVING_SECONDS = 60.0
REWRITE_SECONDS = 1.0
KILL_MARGIN = 3.0
"""Seconds a worker gets beyond its drain grace before it is killed."""
STOP_ORDER: tuple[Role, ...] = ("gateway", "prefill", "decode")

Progress = Callable[[str], None]


class Supervisor:
    """All slots of one machine. Belongs to the event loop."""

    def __init__(self, settings: UpSettings, log: LogLine, progress: Progress) -> None:
        """`log` takes workers' log lines; `progress` what to tell a waiting person."""
        self.settings = settings
        self._log, self._progress = log, progress
        # Before anything is started: every service gets this certificate, so it must have the names of all.
        found = [Tls(settings.tls, name) for name in ROLE_NAMES.values()] if settings.tls is not None else []
        self._tls = found[0] if found else None
        self._instance = Instance()
        self._control: ControlServer | None = None
        self._slots: dict[Role, list[Slot]] = {"gateway": [], "prefill": [], "decode": []}
        self._scaling = asyncio.Lock()
        self._rewrite: asyncio.TimerHandle | None = None
        self._started = time.monotonic()
        self.gateways: list[Address] = []
        self.https: list[Address] = []

    async def start(self) -> None:
        """Returns when requests can be served. Raises ConfigError with the failing worker's own message."""
        settings = self.settings
        try:
            self._instance.write_workers({"prefill": [], "decode": []})
        except OSError as exc:
            raise ConfigError(f"can't write {self._instance.workers_file}: {exc.strerror}") from exc
        _refuse_twin(settings.gateway)
        self.gateways = _ports(settings.gateway, settings.gateways, "--gateway")
        self.https = _ports(settings.http, settings.gateways, "--http")
        counts: dict[Role, int] = {
            "gateway": settings.gateways,
            "prefill": settings.prefill,
            "decode": settings.decode,
        }
        for role, count in counts.items():
            self._slots[role] = [self._slot(role, index) for index in range(count)]
        await self._start_all()
        self._progress("waiting for the gateway to see its workers")
        await asyncio.gather(*(self._serving(*each) for each in zip(self.gateways, self.https, strict=True)))
        self._control = ControlServer(control_socket(self.gateways[0].port), self._handle)
        await self._control.start()

    async def _start_all(self) -> None:
        """Starts every slot at once. The first failure ends the start; `stop` then clears away what came up."""
        slots = self._all()
        self._progress(f"starting {', '.join(slot.name for slot in slots)}")
        try:
            async with asyncio.TaskGroup() as group:
                for slot in slots:
                    group.create_task(self._start_slot(slot))
        except* ConfigError as failures:
            failure = failures.exceptions[0]
            raise ConfigError(str(failure)) from failure
        # Port 0 becomes the port that a restarted gateway must have again.
        for slot in self._slots["gateway"]:
            assert slot.said is not None
            self.gateways[slot.index] = parse(slot.said.address)
            self.https[slot.index] = parse(slot.said.http)

    async def stop(self) -> None:
        """Ends everything in order and removes this run's files. Again: nothing."""
        if self._control is not None:
            await self._control.close()
        for role in STOP_ORDER:
            if self._slots[role]:
                self._progress(f"stopping {role}")
            await asyncio.gather(*(slot.stop(self._grace()) for slot in self._slots[role]))
            self._slots[role] = []
        if self._rewrite is not None:
            self._rewrite.cancel()
        self._instance.close()

    def kill(self) -> None:
        """SIGKILL to every process; a `stop` that runs then ends quickly."""
        for slot in self._all():
            slot.kill()

    async def scale(self, role: Role, count: int) -> None:
        """Starts or drains workers until there are `count`. Raises ConfigError when one doesn't start."""
        if role not in ("prefill", "decode"):
            raise InvalidRequestError(f"can't scale {role!r}; allowed are prefill and decode", field="role")
        check_count(role, count)
        async with self._scaling:
            slots = self._slots[role]
            used = {slot.index for slot in slots}
            free = (index for index in range(count + len(slots)) if index not in used)
            fresh = [self._slot(role, next(free)) for _ in range(count - len(slots))]
            slots += fresh
            results = await asyncio.gather(*(self._start_slot(slot) for slot in fresh), return_exceptions=True)
            failed = [slot for slot, result in zip(fresh, results, strict=True) if isinstance(result, BaseException)]
            await self._drop(role, failed or slots[count:])
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def status(self) -> dict[str, Any]:
        """For `tandem status`, which adds the workers' loads."""
        return {
            "model": str(self.settings.model),
            "gateways": [str(address) for address in self.gateways],
            "http": [str(address) for address in self.https],
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "workers": [slot.describe() for slot in self._all()],
        }

    async def _handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request of the control socket."""
        command = request.get("command")
        if command == "scale":
            count = request.get("count")
            if not isinstance(count, int) or isinstance(count, bool):
                raise InvalidRequestError("count must be a number", field="count")
            await self.scale(request.get("role"), count)  # type: ignore[arg-type]  # scale checks it
        elif command != "status":
            raise InvalidRequestError(f"unknown command {command!r}; allowed are status and scale", field="command")
        status = self.status()
        return {**status, "workers": await with_loads(status["workers"], self._tls)}

    async def _start_slot(self, slot: Slot) -> None:
        began = time.monotonic()
        await slot.start()
        self._progress(f"{slot.name} ready after {time.monotonic() - began:.1f} s")

    async def _drop(self, role: Role, slots: list[Slot]) -> None:
        """Drains and forgets workers: out of the workers file first, so that gateways stop choosing them."""
        gone = list(slots)
        for slot in gone:
            slot.retire()
        await asyncio.gather(*(slot.stop(self._grace()) for slot in gone))
        self._slots[role] = [slot for slot in self._slots[role] if slot not in gone]

    async def _serving(self, gateway: Address, http: Address) -> None:
        """Waits until a gateway's health is SERVING and it knows its workers."""
        deadline = time.monotonic() + SERVING_SECONDS
        while not await self._serves(gateway, http):
            if time.monotonic() > deadline:
                raise UnavailableError(f"gateway {gateway} does not serve after {SERVING_SECONDS:.0f} s; see the log")
            await asyncio.sleep(0.05)

    async def _serves(self, gateway: Address, http: Address) -> bool:
        try:
            async with open_service_channel(str(gateway), "gateway", self._tls) as channel:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            return False
        wanted = (self.settings.prefill, self.settings.decode)
        return any(prefill >= wanted[0] and decode >= wanted[1] for prefill, decode in await listed(http))

    def _slot(self, role: Role, index: int) -> Slot:
        def arguments() -> list[str]:
            if role != "gateway":
                return worker_arguments(self.settings, role)
            return gateway_arguments(
                self.settings, self.gateways[index], self.https[index], self._instance.workers_file
            )

        return Slot(role, index, arguments, self._write_workers, self._log, gpu_variables(self.settings, role, index))

    def _write_workers(self) -> None:
        """Where the disk is full, again and again until it isn't: workers that gateways don't know of are lost."""
        if self._rewrite is not None:
            self._rewrite.cancel()
            self._rewrite = None
        try:
            self._instance.write_workers(
                {
                    role: [slot.said.address for slot in self._slots[role] if slot.state is State.READY and slot.said]
                    for role in ("prefill", "decode")
                }
            )
        except OSError as exc:
            _log.error("the workers file can't be written; trying again", error=str(exc), path=str(exc.filename))
            self._rewrite = asyncio.get_running_loop().call_later(REWRITE_SECONDS, self._write_workers)

    def _all(self) -> list[Slot]:
        return [slot for role in STOP_ORDER for slot in self._slots[role]]

    def _grace(self) -> float:
        return self.settings.drain_grace + KILL_MARGIN


def _refuse_twin(gateway: Address) -> None:
    """`tandem status` and `scale` find a `tandem up` by its port alone, so one at another host with the same port would
    take the first one's place. Raises ConfigError.
    """
    if gateway.port and answers(control_socket(gateway.port)):
        raise ConfigError(f"--gateway: a `tandem up` of yours runs at port {gateway.port}; take another port")


def _ports(first: Address, count: int, flag: str) -> list[Address]:
    """`count` addresses: the given port and those after it, or port 0 throughout. Raises ConfigError for one in use."""
    addresses = [first.with_port(first.port + offset if first.port else 0) for offset in range(count)]
    for address in addresses:
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(found[0]) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(found[4])
        except OSError as exc:
            raise ConfigError(f"{flag}: can't listen on {address}: {exc.strerror or exc}") from exc
    return addresses
