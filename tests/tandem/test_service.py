"""The gRPC server shell: error mapping, malformed requests, health, limits, the orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem import errors
from tandem.errors import ConfigError
from tandem.service import interceptor, malformed, server, status
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as pb_grpc

SERVICE = "tandem.v1.InferenceService"
ALL_ERRORS = [
    (errors.InvalidRequestError("bad", field="sampling.top_p"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnauthenticatedError("who"), grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDeniedError("no"), grpc.StatusCode.PERMISSION_DENIED),
    (errors.NotFoundError("gone"), grpc.StatusCode.NOT_FOUND),
    (errors.OverloadedError("full", retry_after=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.OverloadedError("never", retry_after=None, reason="TOO_LARGE"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.UnavailableError("none"), grpc.StatusCode.UNAVAILABLE),
    (errors.DrainingError("soon"), grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineError("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.RequestCancelledError("left"), grpc.StatusCode.CANCELLED),
    (errors.IncompatibleError("layouts", metadata={"ours": "a"}), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.StaleError("old"), grpc.StatusCode.ABORTED),
    (errors.DataCorruptionError("crc"), grpc.StatusCode.DATA_LOSS),
    (errors.InternalError("ours"), grpc.StatusCode.INTERNAL),
]


class Raising(pb_grpc.InferenceServiceServicer):
    """Raises what it is given, at once or after a message."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.ended: list[str] = []

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:
        if self.error is not None:
            raise self.error
        return pb.GenerateResponse(model=request.text)

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield pb.GenerateStreamResponse(request_id="first")
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.ended.append("generator")

    async def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append("unary")
        raise AssertionError("unreachable")


async def call_error(call: Any) -> errors.TandemError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return status.from_rpc_error(caught.value)


@pytest.mark.parametrize(("error", "code"), ALL_ERRORS, ids=lambda value: getattr(value, "message", ""))
async def test_errors_travel_whole(served: Any, error: errors.TandemError, code: grpc.StatusCode) -> None:
    """Class, message, reason, field and delay arrive as they were raised, in unary calls and amid streams."""
    _shell, channel = await served(Raising(error))
    stub = pb_grpc.InferenceServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Generate(pb.GenerateRequest())
    assert caught.value.code() is code
    stream = stub.GenerateStream(pb.GenerateStreamRequest())
    assert (await stream.read()).request_id == "first"
    for arrived in (status.from_rpc_error(caught.value), await call_error(stream.read())):
        assert type(arrived) is type(error)
        assert (arrived.message, arrived.reason, arrived.metadata) == (error.message, error.reason, error.metadata)
        assert getattr(arrived, "retry_after", 0) == getattr(error, "retry_after", 0)
        assert getattr(arrived, "field", 0) == getattr(error, "field", 0)


async def test_who_may_not_call_is_told_before_the_request_is_read(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's request costs no memory: neither of a single request nor of a stream is anything parsed."""
    read: list[Any] = []

    def noting(deserialize: Any) -> Any:
        return lambda data: (read.append(data), malformed.checked(deserialize)(data))[1]

    def admit(method: str, context: Any) -> None:
        if ("who", "friend") not in (context.invocation_metadata() or ()):
            raise errors.UnauthenticatedError(f"no {method}")

    monkeypatch.setattr(interceptor, "checked", noting)
    _shell, channel = await served(Raising(), admit=admit, max_message_bytes=1000)
    stub = pb_grpc.InferenceServiceStub(channel)
    for call in (stub.Generate(pb.GenerateRequest()), stub.GenerateStream(pb.GenerateStreamRequest()).read()):
        assert isinstance(await call_error(call), errors.UnauthenticatedError)
    assert read == []
    friend = (("who", "friend"),)
    assert (await stub.Generate(pb.GenerateRequest(text="x"), metadata=friend)).model == "x"
    stream = stub.GenerateStream(pb.GenerateStreamRequest(), metadata=friend)
    assert (await stream.read()).request_id == "first"
    stream.cancel()
    assert len(read) == 2
    raw = channel.stream_unary(f"/{SERVICE}/Generate")
    missing = await call_error(raw(iter(()), metadata=friend))
    assert isinstance(missing, errors.InvalidRequestError)
    broken = await call_error(channel.unary_unary(f"/{SERVICE}/Generate")(b"\xff", metadata=friend))
    assert isinstance(broken, errors.InvalidRequestError)
    huge = await call_error(stub.Generate(pb.GenerateRequest(text="x" * 2000), metadata=friend))
    assert isinstance(huge, errors.OverloadedError)


async def test_unknown_exception_leaks_nothing(served: Any) -> None:
    """INTERNAL without the exception's text, and the server goes on."""
    servicer = Raising(ValueError("secret path /etc"))
    _shell, channel = await served(servicer)
    stub = pb_grpc.InferenceServiceStub(channel)
    arrived = await call_error(stub.Generate(pb.GenerateRequest()))
    assert isinstance(arrived, errors.InternalError)
    assert "secret" not in arrived.message
    servicer.error = None
    assert (await stub.Generate(pb.GenerateRequest(text="x"))).model == "x"


async def test_error_of_a_downstream_call_keeps_its_kind(served: Any) -> None:
    """A handler that lets an RpcError through answers with the same kind."""
    _shell, inner = await served(Raising(errors.DrainingError("soon")))

    class Forwarding(pb_grpc.InferenceServiceServicer):
        async def Generate(self, request: Any, context: Any) -> Any:
            return await pb_grpc.InferenceServiceStub(inner).Generate(request)

    _shell, outer = await served(Forwarding())
    arrived = await call_error(pb_grpc.InferenceServiceStub(outer).Generate(pb.GenerateRequest()))
    assert isinstance(arrived, errors.DrainingError)


async def test_huge_message_is_cut(served: Any) -> None:
    """Trailers hold a few KiB; a longer message must not break the status."""
    _shell, channel = await served(Raising(errors.InvalidRequestError("é" * 100_000, field="x" * 10_000)))
    arrived = await call_error(pb_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest()))
    assert isinstance(arrived, errors.InvalidRequestError)
    assert arrived.message.endswith("é...")
    assert len(arrived.message.encode()) <= status.MAX_MESSAGE_BYTES


STOPS = pb.GenerateRequest(stopping={"stop": ["a", "bb"]}).SerializeToString().replace(b"bb", b"\xff\xff")
CHAT = pb.GenerateRequest(messages={"messages": [{"role": "user"}, {"content": "zz"}]}).SerializeToString()


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"\x1a\x02\xff\xfe", "text"),
        (b"\x1a\x10\xff", "text"),
        (STOPS, "stopping.stop[1]"),
        (CHAT.replace(b"zz", b"\x80z"), "messages.messages[1].content"),
        (b"\x32\x02\x09\x00", "sampling.temperature"),
        (b"\xff" * 12, ""),
        (b"\x0b", ""),
    ],
)
async def test_malformed_request_names_the_field(served: Any, data: bytes, field: str) -> None:
    """INVALID_ARGUMENT, not INTERNAL, unary and streamed."""
    _shell, channel = await served(Raising())
    for method in (channel.unary_unary(f"/{SERVICE}/Generate"), channel.unary_stream(f"/{SERVICE}/GenerateStream")):
        call = method(data)
        arrived = await call_error(call.read() if hasattr(call, "read") else call)
        assert isinstance(arrived, errors.InvalidRequestError)
        if field:
            assert arrived.field == field


async def test_message_over_the_limit(served: Any) -> None:
    """RESOURCE_EXHAUSTED from the server; the next call works."""
    _shell, channel = await served(Raising(), max_message_bytes=1000)
    stub = pb_grpc.InferenceServiceStub(channel)
    arrived = await call_error(stub.Generate(pb.GenerateRequest(text="x" * 2000)))
    assert isinstance(arrived, errors.OverloadedError)
    assert (await stub.Generate(pb.GenerateRequest(text="x"))).model == "x"


async def test_cancel_reaches_handlers_at_once(served: Any) -> None:
    """A generator's `finally` runs when the client goes, not when it is collected."""
    servicer = Raising()
    _shell, channel = await served(servicer)
    stub = pb_grpc.InferenceServiceStub(channel)
    stream = stub.GenerateStream(pb.GenerateStreamRequest())
    await stream.read()
    stream.cancel()
    unary = stub.Tokenize(pb.TokenizeRequest())
    await asyncio.sleep(0.2)  # so that the handler runs before it is cancelled
    unary.cancel()
    async with asyncio.timeout(5):
        while sorted(servicer.ended) != ["generator", "unary"]:  # noqa: ASYNC110  # set by handlers of another task
            await asyncio.sleep(0.01)


async def test_health_watch_tells_each_change(served: Any) -> None:
    """For "" and the service; an unknown one is NOT_FOUND for Check and SERVICE_UNKNOWN for Watch."""
    shell, channel = await served(Raising())
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))
        for serving in (False, True, False):
            shell.set_serving(serving)
            assert (await watch.read()).status == (1 if serving else 2)
        watch.cancel()
    assert isinstance(await call_error(stub.Check(health_pb2.HealthCheckRequest(service="no"))), errors.NotFoundError)
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="no"))
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


async def test_liveness_is_not_readiness(served: Any) -> None:
    """A process that serves nothing, or no more, is alive until what it is made of says otherwise."""
    shell, channel = await served(Raising())
    check = health_pb2_grpc.HealthStub(channel).Check
    question = health_pb2.HealthCheckRequest(service="liveness")
    assert (await check(question)).status == health_pb2.HealthCheckResponse.SERVING
    shell.set_life(lambda: False)
    shell.set_serving(True)
    assert (await check(question)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_taken_health_port_is_told(served: Any) -> None:
    """With the flag's name: the process has three ports."""
    shell, _channel = await served(Raising(), health="127.0.0.1:0")
    again = server.ServerShell("x", "127.0.0.1:0", health=shell.health_address)
    with pytest.raises(ConfigError, match="--health: can't listen on"):
        await again.start()
    await again.stop(0)


async def test_reflection_lists_the_service(served: Any) -> None:
    """grpcurl works without proto files."""
    _shell, channel = await served(Raising())
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    stream = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await stream.read()
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {SERVICE, "grpc.health.v1.Health"}
    assert "liveness" not in names


async def test_unknown_method_is_incompatible(served: Any) -> None:
    """The other side is of another version."""
    _shell, channel = await served(Raising())
    arrived = await call_error(channel.unary_unary(f"/{SERVICE}/Nope")(b""))
    assert isinstance(arrived, errors.IncompatibleError)


async def test_port_in_use(served: Any) -> None:
    """Two servers never share a port."""
    shell, _channel = await served(Raising())
    taken = server.ServerShell("x", "127.0.0.1:0")
    address = await taken.start()
    with pytest.raises(ConfigError, match="can't listen on"):
        await server.ServerShell("x", address).start()
    await taken.server.stop(0)
    assert shell.role == "gateway"


async def test_signal_drains_then_stops(served: Any) -> None:
    """NOT_SERVING comes before the drain; the code is 0."""
    shell, channel = await served(Raising())
    shell.set_serving(True)
    seen: list[Any] = []

    async def drain(grace: float) -> None:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        seen.extend([grace, answer.status])

    asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
    assert await shell.run_until_signal(drain, 3.0) == 0
    assert seen == [3.0, health_pb2.HealthCheckResponse.NOT_SERVING]


async def test_second_signal_cuts_the_drain_short(served: Any) -> None:
    """Code 1, and the drain's task is cancelled."""
    shell, _channel = await served(Raising())
    cancelled = asyncio.Event()

    async def drain(grace: float) -> None:
        shell.request_stop()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    asyncio.get_running_loop().call_later(0.05, shell.request_stop)
    assert await shell.run_until_signal(drain, 60.0) == 1
    assert cancelled.is_set()


async def test_failing_drain_still_stops(served: Any) -> None:
    """Our own bug must not keep a process alive."""
    shell, _channel = await served(Raising())

    async def drain(grace: float) -> None:
        raise ValueError("bug")

    shell.request_stop()
    assert await shell.run_until_signal(drain, 1.0) == 0


LOADING = """
import asyncio, os, signal, threading
from tandem.service import server

async def main():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    await asyncio.to_thread(threading.Event().wait)  # a model that takes long

raise SystemExit(server.run(main))
"""
CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork")


def _may_unshare() -> bool:
    try:
        return subprocess.run([*CONTAINER, "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("first", [False, True], ids=["of-many", "first-of-a-container"])
def test_a_process_that_still_loads_ends_at_once(first: bool) -> None:
    """The first process of a container hears no signal that it has no handler for."""
    if first and not _may_unshare():
        pytest.skip("this machine gives no user namespaces")
    command = [*(CONTAINER if first else ()), sys.executable, "-c", LOADING]
    root = Path(server.__file__).parents[2]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, timeout=30, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_run_maps_config_errors_to_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr."""

    async def main() -> int:
        raise ConfigError("--model: no such file")

    assert server.run(main) == 2
    assert capsys.readouterr().err == "error: --model: no such file\n"
