"""Flags, the wiring of the process, its signals; and small parts that have no better place."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from certificates import Authority
from prefill_scheduling import VOCAB
from prefill_serving import BLOCK_SIZE, FakeDecode, GatedRunner, collect, layout, record_of, until

from engine.config import EngineConfig
from engine.fake import SLOT_BYTES
from kv_transfer import registry
from kv_transfer.pool import SharedPool
from prefill_service import wiring
from prefill_service.__main__ import main
from prefill_service.blame import target_error
from prefill_service.channels import LANES, Channels
from prefill_service.flags import parse_flags
from tandem.errors import ConfigError, DeadlineError, DrainingError, RequestCancelledError, UnavailableError
from tandem.record import Record
from tandem.service import pulse, wire
from tandem.service.call_status import CallStatus
from tandem.service.channel import open_channel
from tandem.service.tls import Tls, TlsFiles
from tandem.service.wire import layout_to_pb
from tandem.v1 import prefill_pb2, prefill_pb2_grpc
from worker import process as worker_process


def test_flags_become_settings() -> None:
    flags = parse_flags(["--model", "m", "--chunk-size", "64", "--no-prefix-cache", "--kv-dtype", "bf16"])
    assert flags.engine["max_step_tokens"] == 64
    assert flags.engine["prefix_cache"] is False
    assert flags.engine["kv_dtype"] == "bf16"
    assert flags.transports == tuple(name for name in registry.available() if name not in registry.IN_CLEAR)
    assert parse_flags(["--model", "m", "--transport", "grpc"]).transports == ("grpc",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model"),
        (["--model", "m", "--unknown"], "--unknown"),
        (["--model", "m", "--listen", "nowhere"], "--listen"),
        (["--model", "m", "--metrics", "1.2.3.4:99999"], "--metrics"),
        (["--model", "m", "--transport", "pigeon"], "pigeon"),
        (["--model", "m", "--drain-grace", "-1"], "--drain-grace"),
        (["--model", "m", "--drain-grace", "nan"], "--drain-grace"),
        (["--model", "m", "--log-level", "loud"], "--log-level"),
        (["--model", "m", "--chunk-size", "many"], "--chunk-size"),
    ],
)
def test_bad_flags_end_with_one_line_and_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize(
    "arguments", [["--model", "/nowhere/model.gguf"], ["--model", "/dev/null", "--compute", "int8"]]
)
def test_a_model_that_is_not_there_ends_with_one_line_and_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def fake_engine(num_blocks: int = 32) -> tuple[Any, Any]:
    """An engine as `load_engine` gives it, over shared memory."""
    memory = SharedPool(num_blocks, BLOCK_SIZE * SLOT_BYTES)
    model = SimpleNamespace(
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        name="",
        vocab_size=VOCAB,
        eos_token_ids=(0,),
        max_context=128,
        architecture="fake",
        quantization="none",
    )
    config = EngineConfig("models/tiny.gguf", block_size=BLOCK_SIZE, num_blocks=num_blocks, max_step_tokens=16)
    runner = GatedRunner(num_blocks, BLOCK_SIZE, vocab_size=VOCAB, buffer=memory.buffer)
    engine = SimpleNamespace(
        model_config=model,
        engine_config=config,
        model_id="model-1",
        numerics_id="numerics-1",
        kv_cache=SimpleNamespace(order="plain"),
        runner=runner,
        degree=1,
    )
    return engine, memory


def prefill_request(decode: FakeDecode, record: Record, incarnation: str) -> prefill_pb2.PrefillRequest:
    """A request to send to `decode`."""
    lease = decode.grant(record)
    target = prefill_pb2.TransferTarget(
        lease_id=lease.lease_id,
        address=decode.address,
        incarnation=decode.incarnation,
        needed_end=lease.needed_end,
        layout=layout_to_pb(layout()),
        transports=["shm"],
    )
    return prefill_pb2.PrefillRequest(record=wire.record_to_pb(record), incarnation=incarnation, target=target)


async def test_sigterm_drains_and_exits_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine, memory = fake_engine()
    monkeypatch.setattr(wiring, "load", lambda *_: (engine, [memory]))
    decode = FakeDecode()
    await decode.start()
    process = asyncio.create_task(wiring.serve(parse_flags(["--model", "m", "--log-level", "warning"])))
    lines: list[str] = []
    await until(lambda: bool(lines.extend(capsys.readouterr().out.splitlines()) or lines) or process.done())
    ready = json.loads(lines[0])
    assert {**ready, "incarnation": 0, "address": 0, "metrics": 0} == {
        "event": "ready",
        "role": "prefill",
        "address": 0,
        "metrics": 0,
        "pid": os.getpid(),
        "incarnation": 0,
    }
    async with open_channel(ready["address"]) as channel:
        stub: Any = prefill_pb2_grpc.PrefillServiceStub(channel)
        info = (await stub.GetPrefillInfo(prefill_pb2.GetPrefillInfoRequest())).info
        assert (info.model_name, info.metrics_address, info.incarnation) == (
            "tiny",
            ready["metrics"],
            ready["incarnation"],
        )
        engine.runner.hold()
        request = prefill_request(decode, record_of(9, seed=1), info.incarnation)
        call = asyncio.create_task(collect(stub.Prefill(request)))
        await until(engine.runner.waiting.is_set)
        os.kill(os.getpid(), signal.SIGTERM)
        watch = stub.WatchPrefillLoad(prefill_pb2.WatchPrefillLoadRequest())
        while not (await watch.read()).load.draining:
            pass
        watch.cancel()
        assert not process.done()
        engine.runner.free()
        assert (await call).done is not None
    assert await asyncio.wait_for(process, 20) == 0
    await decode.stop()


async def test_sigterm_ends_a_worker_whose_engine_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pulse, "STEP_SECONDS", 0.5)
    engine, memory = fake_engine()
    monkeypatch.setattr(wiring, "load", lambda *_: (engine, [memory]))
    decode = FakeDecode()
    await decode.start()
    flags = parse_flags(["--model", "m", "--log-level", "warning", "--drain-grace", "0.2"])
    process = asyncio.create_task(wiring.serve(flags))
    lines: list[str] = []
    await until(lambda: bool(lines.extend(capsys.readouterr().out.splitlines()) or lines) or process.done())
    ready = json.loads(lines[0])
    try:
        async with open_channel(ready["address"]) as channel:
            stub: Any = prefill_pb2_grpc.PrefillServiceStub(channel)
            engine.runner.hold()
            request = prefill_request(decode, record_of(9, seed=1), ready["incarnation"])
            call = asyncio.create_task(collect(stub.Prefill(request)))
            await until(engine.runner.waiting.is_set)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(DrainingError):
                await call
        assert await asyncio.wait_for(process, 10) == 0
    finally:
        engine.runner.free()
        await decode.stop()


async def test_announcing_to_nobody_is_a_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_text: str) -> None:
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=broken))
    with pytest.raises(ConfigError, match="nobody reads"):
        worker_process.announce("prefill", "127.0.0.1:1", "127.0.0.1:2", "x")


async def test_idle_channels_are_bounded() -> None:
    channels = Channels(most_idle=1)
    async with channels.borrow("127.0.0.1:1") as first, channels.borrow("127.0.0.1:2"):
        async with channels.borrow("127.0.0.1:1") as beside:
            assert beside is not first
        assert len(channels) == 3
    assert len(channels) == 1
    async with channels.borrow("127.0.0.1:1") as later:
        assert later is beside, "the one taken last is kept"
    await channels.close()
    assert len(channels) == 0
    assert first.get_state() is beside.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_transfers_at_one_time_have_connections_of_their_own_up_to_a_bound() -> None:
    channels = Channels()
    async with AsyncExitStack() as stack:
        taken = [await stack.enter_async_context(channels.borrow("127.0.0.1:1")) for _ in range(LANES + 1)]
        assert len(set(taken)) == len(channels) == LANES
    async with channels.borrow("127.0.0.1:1") as later:
        assert later in taken, "an idle one before a new one"
    assert len(channels) == LANES
    await channels.close()


async def test_a_renewed_certificate_opens_another_channel(authority: Authority) -> None:
    """A transfer that runs keeps its channel until its end; then it is closed, whatever the bound of idle ones."""
    issued = authority.issue("p", "tandem-prefill")
    tls = Tls(TlsFiles(issued.cert, issued.key, issued.ca), "tandem-prefill")
    channels = Channels(tls=tls)
    async with channels.borrow("127.0.0.1:1") as old:
        authority.issue("p", "tandem-prefill")
        async with channels.borrow("127.0.0.1:1") as new:
            assert new is not old
        assert len(channels) == 2
        assert old.get_state() is not grpc.ChannelConnectivity.SHUTDOWN
    assert old.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    async with channels.borrow("127.0.0.1:1") as later:
        assert later is new
    await channels.close()


class EndedCall:
    """A call of grpc.aio, as far as its status goes."""

    def __init__(self) -> None:
        self.callbacks: list[Any] = []
        self.status = (grpc.StatusCode.OK, "")

    def add_done_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def end(self, code: grpc.StatusCode, details: str) -> None:
        self.status = code, details
        for callback in self.callbacks:
            callback(self)

    async def code(self) -> grpc.StatusCode:
        return self.status[0]

    async def details(self) -> str:
        return self.status[1]

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        return grpc.aio.Metadata(("key", "value"))


@pytest.mark.parametrize("order", ["peer first", "peer last", "peer never", "no failed write"])
async def test_a_failed_write_does_not_hide_what_the_peer_said(order: str) -> None:
    call, metadata = EndedCall(), grpc.aio.Metadata()
    status = CallStatus(call)
    ends = [(grpc.StatusCode.DATA_LOSS, "checksum"), (grpc.StatusCode.INTERNAL, "Internal error from Core")]
    for end in {"peer first": ends, "peer last": ends[::-1], "peer never": ends[1:]}.get(order, ends[:1]):
        call.end(*end)
    seen = grpc.aio.AioRpcError(*call.status[:1], metadata, metadata, call.status[1])
    if order == "peer last":
        seen = grpc.aio.AioRpcError(ends[1][0], metadata, metadata, ends[1][1])
    found = await status.error(seen, 0.01)
    assert found.code() is (grpc.StatusCode.INTERNAL if order == "peer never" else grpc.StatusCode.DATA_LOSS)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (UnavailableError("x"), UnavailableError, "TARGET_LOST"),
        (UnavailableError("x", reason="COPY_IN_FLIGHT"), UnavailableError, "TARGET_COPY_IN_FLIGHT"),
        (RequestCancelledError("x"), UnavailableError, "TARGET_LOST"),
        (DeadlineError("x"), DeadlineError, "DEADLINE_EXCEEDED"),
    ],
)
def test_blame(error: Exception, kind: type, reason: str) -> None:
    blamed = target_error(error, "127.0.0.1:7")
    assert (type(blamed), blamed.reason) == (kind, reason)
    assert blamed.metadata == {"side": "target", "target": "127.0.0.1:7"}
    assert "127.0.0.1:7" in blamed.message
