"""The loads that `tandem status` shows, from services that report one, none, or nothing at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tandem.service.server import ServerShell
from tandem.supervisor import load, settings
from tandem.v1 import decode_pb2, decode_pb2_grpc, types_pb2


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    """Reports `reports` and then hangs, or ends when there are none."""

    def __init__(self, *reports: types_pb2.WorkerLoad, hang: bool) -> None:
        self.reports, self.hang = reports, hang

    async def WatchDecodeLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for report in self.reports:
            yield decode_pb2.WatchDecodeLoadResponse(load=report)
        if self.hang:
            await asyncio.Event().wait()


async def ask(servicer: Decode) -> Any:
    shell = ServerShell("decode", "127.0.0.1:0")
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, shell.server)
    address = await shell.start()
    try:
        (worker,) = await load.with_loads([{"role": "decode", "address": address, "name": "decode-0"}])
    finally:
        await shell.server.stop(0)
    assert worker["name"] == "decode-0"
    return worker["load"]


async def test_first_report_is_shown() -> None:
    """All fields, zeros included."""
    report = types_pb2.WorkerLoad(free_blocks=7, total_blocks=9, running_sequences=2, draining=True, steps=5)
    assert await ask(Decode(report, types_pb2.WorkerLoad(), hang=True)) == {
        "free_blocks": 7,
        "total_blocks": 9,
        "running_sequences": 2,
        "waiting_requests": 0,
        "receiving_requests": 0,
        "queued_prefill_tokens": 0,
        "draining": True,
        "steps": 5,
    }


@pytest.mark.parametrize("hang", [True, False])
async def test_no_report_is_none(monkeypatch: pytest.MonkeyPatch, hang: bool) -> None:
    """After the timeout, or at once when the stream ends."""
    monkeypatch.setattr(load, "LOAD_SECONDS", 0.2)
    assert await ask(Decode(hang=hang)) is None


async def test_who_is_not_asked() -> None:
    """Gateways, and workers that have no address yet."""
    workers = [{"role": "gateway", "address": "127.0.0.1:1"}, {"role": "prefill", "address": ""}]
    assert await load.with_loads(workers) == [{**worker, "load": None} for worker in workers]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_spin_little(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    """Unless the user said how OpenMP should wait."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert settings.environment().get("GOMP_SPINCOUNT") == expected
