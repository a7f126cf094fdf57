"""Fakes of the three services for the supervisor's and the CLI's tests, and a gateway whose answers a test chooses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.service.server import ServerShell
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as pb_grpc
from tandem.v1 import types_pb2

SERVICE = "tandem.v1.InferenceService"


class FakeGateway(pb_grpc.InferenceServiceServicer):
    """Echoes: the answer to a text is its words, one delta each. `fail` makes the next calls raise."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.fail: Callable[[int], BaseException | None] = lambda call: None
        self.cancelled = threading.Event()
        self.hang = False
        self.cuts: list[int] = []
        """Of the next streams: after so many events the connection breaks, as far as a client can see."""
        self.seed: int | None = 7

    def _check(self, request: Any) -> None:
        self.requests.append(request)
        error = self.fail(len(self.requests))
        if error is not None:
            raise error

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self._check(request)
        if self.hang:
            await self._hang()
        words = _words(request)
        choice = pb.Choice(
            text="".join(words), token_ids=range(len(words)), finish_reason=types_pb2.FINISH_REASON_STOP, stop_match="x"
        )
        return pb.GenerateResponse(request_id="r", model="fake", choices=[choice], usage=_usage(words))

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: Any) -> AsyncIterator[Any]:
        self._check(request)
        left = self.cuts.pop(0) if self.cuts else None
        async for response in self._answer(request):
            if left == 0:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            left = None if left is None else left - 1
            yield response

    async def _answer(self, request: pb.GenerateStreamRequest) -> AsyncIterator[Any]:
        words = _words(request)
        prompt = pb.PromptAccepted(model="fake", prompt_tokens=len(words), seed=self.seed)
        yield pb.GenerateStreamResponse(request_id="r", prompt=prompt)
        given = request.resume.outputs[0].token_ids if request.resume.outputs else ()
        for token, word in enumerate(words):
            if token < len(given):
                continue
            logprobs = types_pb2.TokenLogprobs(
                token_logprobs=[-0.5], top_count=2, top_token_ids=[token, 9], top_logprobs=[-0.5, -1.5]
            )
            delta = pb.ChoiceDelta(text=word, token_ids=[token], logprobs=logprobs)
            yield pb.GenerateStreamResponse(request_id="r", delta=delta)
        if self.hang:
            await self._hang()
        if not (given and request.resume.outputs[0].finish_reason):
            finished = pb.ChoiceFinished(finish_reason=types_pb2.FINISH_REASON_LENGTH)
            yield pb.GenerateStreamResponse(request_id="r", finished=finished)
        yield pb.GenerateStreamResponse(request_id="r", end=pb.GenerationEnd(usage=_usage(words)))

    async def _hang(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        self._check(request)
        return pb.ListModelsResponse(models=[pb.Model(name="fake", max_context=10, eos_token_ids=[2])])

    async def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=range(len(_words(request))))

    async def Detokenize(self, request: Any, context: Any) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=" ".join(map(str, request.token_ids)))


def _words(request: Any) -> list[str]:
    kind = request.WhichOneof("input")
    if kind == "token_ids":
        return [f"<{token}>" for token in request.token_ids.ids]
    text = request.messages.messages[-1].content if kind == "messages" else request.text
    return [word + " " for word in text.split()]


def _usage(words: list[str]) -> types_pb2.Usage:
    return types_pb2.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=len(words))


class LoopThread:
    """An event loop in a thread, for servers that blocking code under test calls."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def fake_gateways() -> Iterator[list[tuple[FakeGateway, str]]]:
    """Two gateways served from another thread, and their addresses."""
    thread = LoopThread()

    async def start() -> tuple[FakeGateway, ServerShell, str]:
        servicer, shell = FakeGateway(), ServerShell("gateway", "127.0.0.1:0")
        pb_grpc.add_InferenceServiceServicer_to_server(servicer, shell.server)
        shell.add_service(SERVICE)
        address = await shell.start()
        shell.set_serving(True)
        return servicer, shell, address

    served = [thread.run(start()) for _ in range(2)]
    yield [(servicer, address) for servicer, _, address in served]
    for _, shell, _ in served:
        thread.run(shell.server.stop(0))
    thread.close()


@pytest.fixture
def fake_gateway(fake_gateways: list[tuple[FakeGateway, str]]) -> tuple[FakeGateway, str]:
    """The first of them."""
    return fake_gateways[0]


@pytest.fixture
async def served() -> AsyncIterator[Callable[..., Any]]:
    """Starts shells with a servicer on the test's own loop: `await served(servicer)` gives (shell, channel)."""
    open_things: list[Any] = []

    async def start(servicer: Any, **options: Any) -> tuple[ServerShell, grpc.aio.Channel]:
        shell = ServerShell("gateway", "127.0.0.1:0", **options)
        pb_grpc.add_InferenceServiceServicer_to_server(servicer, shell.server)
        shell.add_service(SERVICE)
        address = await shell.start()
        channel = grpc.aio.insecure_channel(address)
        open_things.append((shell, channel))
        return shell, channel

    yield start
    for shell, channel in open_things:
        await channel.close()
        await shell.stop(0)


WORKER = '''
"""Stands in for a worker: says ready, serves nothing, obeys TANDEM_FAKE_<ROLE>."""
import argparse, json, os, signal, sys, threading
role = {role!r}
parser = argparse.ArgumentParser()
parser.add_argument("--model")
known, _ = parser.parse_known_args()
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps(dict(event="start", role=role, pid=os.getpid(), argv=sys.argv[1:], ppid=os.getppid(),
                              session=os.getsid(0), group=os.getpgid(0))) + "\\n")
mode = os.environ.get("FAKE_" + role.upper(), "")
if mode == "fail":
    print("error: --model: the file is no model", file=sys.stderr)
    sys.exit(2)
print("a note that is not ready", file=sys.stderr)
if mode == "slow":
    signal.pause()
stop = threading.Event()
def on_term(*_):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps(dict(event="stop", role=role, pid=os.getpid())) + "\\n")
    stop.set()
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else on_term)
print(json.dumps(dict(event="ready", role=role, address="127.0.0.1:%d" % (os.getpid() % 60000 + 1),
                      metrics="127.0.0.1:2", pid=os.getpid(), incarnation="i")), flush=True)
stop.wait(60)
'''

GATEWAY = '''
"""Stands in for the gateway: serves health, and lists as many workers as its workers file names."""
import argparse, asyncio, json, os, sys
from tandem.service import server
from tandem.v1 import inference_pb2 as pb, inference_pb2_grpc as pb_grpc
parser = argparse.ArgumentParser()
for flag in ("--model", "--listen", "--http", "--workers-file", "--log-level"):
    parser.add_argument(flag)
flags, _ = parser.parse_known_args()
def note(**what):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps(what) + "\\n")
note(event="start", role="gateway", pid=os.getpid(), argv=sys.argv[1:])
class Fake(pb_grpc.InferenceServiceServicer):
    async def GenerateStream(self, request, context):
        yield pb.GenerateStreamResponse(delta=pb.ChoiceDelta(text="It is Paris."))
async def list_workers(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    workers = json.load(open(flags.workers_file))
    models = [dict(prefill_workers=len(workers["prefill"]), decode_workers=len(workers["decode"]))]
    writer.write(b"HTTP/1.1 200 OK\\r\\n\\r\\n" + json.dumps(dict(models=models)).encode())
    writer.close()
async def main():
    http = await asyncio.start_server(list_workers, "127.0.0.1", 0)
    shell = server.ServerShell("gateway", flags.listen)
    pb_grpc.add_InferenceServiceServicer_to_server(Fake(), shell.server)
    address = await shell.start()
    shell.set_serving(True)
    print(json.dumps(dict(event="ready", role="gateway", address=address,
                          http="127.0.0.1:%d" % http.sockets[0].getsockname()[1])), flush=True)
    async def drain(grace):
        note(event="stop", role="gateway", pid=os.getpid())
    return await shell.run_until_signal(drain, 1)
sys.exit(server.run(main))
'''


@pytest.fixture
def fake_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has the supervisor start fakes in place of the services; returns the log of what they did, JSON lines."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    names = {"prefill": "fake_prefill", "decode": "fake_decode", "gateway": "fake_gateway"}
    for role, name in names.items():
        (folder / f"{name}.py").write_text(GATEWAY if role == "gateway" else WORKER.format(role=role))
    log = tmp_path / "log.jsonl"
    log.touch()
    monkeypatch.setattr("tandem.supervisor.settings.MODULES", names)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return log
