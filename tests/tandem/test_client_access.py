"""Clients and commands with TLS and API keys, against a gateway that notes who calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority, Issued
from click.testing import CliRunner, Result

from tandem.cli import cli
from tandem.client import AsyncClient, Client
from tandem.errors import ConfigError, TandemError, UnavailableError
from tandem.service.peers import peer_of
from tandem.service.server import ServerShell
from tandem.service.tls import Tls, TlsFiles
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as pb_grpc

KEY = "a-key-that-nobody-guesses"
MODEL = pb.Model(name="fake", max_context=10)


class Noting(pb_grpc.InferenceServiceServicer):
    """Answers every method, and notes the caller's key and certificate."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, str]] = []
        self.go_on = asyncio.Event()
        """Before that a stream stays at its beginning."""
        self.go_on.set()

    def _note(self, context: Any) -> None:
        keys = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        self.seen.append((keys, peer_of(context).common_name))

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:
        self._note(context)
        return pb.GenerateResponse(choices=[pb.Choice(text=request.text)])

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._note(context)
        yield pb.GenerateStreamResponse(prompt=pb.PromptAccepted(model="fake", seed=1))
        await self.go_on.wait()
        yield pb.GenerateStreamResponse(delta=pb.ChoiceDelta(text=f"{request.text}{request.cache_salt}"))
        yield pb.GenerateStreamResponse(end=pb.GenerationEnd())

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        self._note(context)
        return pb.ListModelsResponse(models=[MODEL])

    async def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:
        self._note(context)
        return pb.TokenizeResponse(token_ids=[1])

    async def Detokenize(self, request: Any, context: Any) -> pb.DetokenizeResponse:
        self._note(context)
        return pb.DetokenizeResponse(text="x")


@asynccontextmanager
async def gateway(issued: Issued | None = None, *, client_certificates: bool = False) -> AsyncIterator[tuple[Any, str]]:
    """A servicer and its address."""
    tls = Tls(TlsFiles(issued.cert, issued.key, issued.ca), "tandem-gateway") if issued else None
    servicer = Noting()
    shell = ServerShell("gateway", "127.0.0.1:0", tls=tls, client_certificates=client_certificates)
    pb_grpc.add_InferenceServiceServicer_to_server(servicer, shell.server)
    address = await shell.start()
    try:
        yield servicer, address
    finally:
        await shell.server.stop(0)


def use_all(address: str, **access: Any) -> None:
    """Every method of the blocking client."""
    with Client(address, timeout=10, **access) as client:
        client.generate("a")
        with client.stream("a") as events:
            assert len(list(events)) == 3
        client.models()
        client.tokenize("a")
        client.detokenize([1])


async def use_all_async(address: str, **access: Any) -> None:
    async with AsyncClient(address, timeout=10, **access) as client:
        await client.generate("a")
        async with client.stream("a") as events:
            assert len([event async for event in events]) == 3
        await client.models()
        await client.tokenize("a")
        await client.detokenize([1])


async def test_the_key_and_the_certificate_go_with_every_call(authority: Authority) -> None:
    issued, mine = authority.issue("g", "tandem-gateway"), authority.issue("me")
    access = {"api_key": KEY, "tls_ca": issued.ca, "tls_cert": mine.cert, "tls_key": mine.key}
    async with gateway(issued, client_certificates=True) as (servicer, address):
        await asyncio.to_thread(use_all, address, **access)
        await use_all_async(address, **access, tls_server_name="tandem-gateway")
    assert servicer.seen == [([f"Bearer {KEY}"], "me")] * 10


def renew(mine: Issued, renewed: Issued) -> None:
    """In place of the files."""
    for old, new in ((mine.key, renewed.key), (mine.cert, renewed.cert)):
        old.write_bytes(new.read_bytes())


def stream_across_a_renewal(address: str, change: Callable[[], None], go_on: Callable[[], None], **access: Any) -> int:
    """Calls before and after `change`, with a stream over both; how many channels are open in the end."""
    with Client(address, timeout=10, **access) as client:
        client.models()
        events = client.stream("a")
        next(events)
        change()
        client.models()
        go_on()
        assert len(list(events)) == 2
        client.models()
        return len(client._route.connections.all())


async def stream_across_a_renewal_async(
    address: str, change: Callable[[], None], go_on: Callable[[], None], **access: Any
) -> int:
    async with AsyncClient(address, timeout=10, **access) as client:
        await client.models()
        events = client.stream("a")
        await anext(events)
        change()
        await client.models()
        go_on()
        assert len([event async for event in events]) == 2
        await client.models()
        return len(client._route.connections.all())


@pytest.mark.parametrize("kind", ["blocking", "async"])
async def test_a_renewed_certificate_is_for_new_calls(authority: Authority, kind: str) -> None:
    """Running ones go on with the old one, whose connection is closed with the last of them."""
    issued, mine, renewed = authority.issue("g", "tandem-gateway"), authority.issue("me"), authority.issue("renewed")
    access = {"tls_ca": issued.ca, "tls_cert": mine.cert, "tls_key": mine.key}
    loop = asyncio.get_running_loop()
    async with gateway(issued, client_certificates=True) as (servicer, address):
        servicer.go_on.clear()

        def change() -> None:
            renew(mine, renewed)

        def go_on() -> None:
            loop.call_soon_threadsafe(servicer.go_on.set)

        if kind == "async":
            left = await stream_across_a_renewal_async(address, change, go_on, **access)
        else:
            left = await asyncio.to_thread(stream_across_a_renewal, address, change, go_on, **access)
    assert left == 1
    assert [name for _, name in servicer.seen] == ["me", "me", "renewed", "renewed"]


async def test_files_that_cannot_work_leave_the_certificate_as_it_was(
    authority: Authority, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a word: stdout and stderr are the program's."""
    issued, mine = authority.issue("g", "tandem-gateway"), authority.issue("me")
    access = {"tls_ca": issued.ca, "tls_cert": mine.cert, "tls_key": mine.key}
    async with gateway(issued, client_certificates=True) as (servicer, address):
        capfd.readouterr()
        async with AsyncClient(address, timeout=10, **access) as client:
            await client.models()
            mine.key.write_bytes(issued.key.read_bytes())
            await client.models()
            mine.cert.unlink()
            await client.models()
        assert capfd.readouterr() == ("", "")
    assert [name for _, name in servicer.seen] == ["me"] * 3


async def test_in_clear_and_without_a_key(authority: Authority) -> None:
    async with gateway() as (servicer, address):
        await use_all_async(address)
    assert servicer.seen == [([], "")] * 5


async def test_a_gateway_of_another_name_or_authority_gets_nothing(authority: Authority, tmp_path: Path) -> None:
    """The key leaves only for the gateway that was meant."""
    issued = authority.issue("g", "tandem-gateway")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "stranger")
    async with gateway(issued) as (servicer, address):
        for access in ({"tls_ca": stranger.ca}, {"tls_ca": issued.ca, "tls_server_name": "other"}, {}):
            async with AsyncClient(address, timeout=10, api_key=KEY, **access) as client:
                with pytest.raises(UnavailableError):
                    await client.models()
    assert servicer.seen == []


@pytest.mark.parametrize("key", ["", "with space", "line\nbreak", "späť"])
def test_what_can_be_no_key(key: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        Client("127.0.0.1:9", api_key=key)
    assert not key or key not in str(caught.value)


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """A command of ours in this process."""
    return CliRunner().invoke(cli, arguments, env={"TANDEM_API_KEY": "", **(env or {})})


async def test_generate_and_chat_with_flags_and_environment(
    authority: Authority, tmp_path: Path, make_file: Callable[[str, str], Path]
) -> None:
    """The key comes from a file or from $TANDEM_API_KEY; the file wins."""
    issued = authority.issue("g", "tandem-gateway")
    file = make_file("key", f"{KEY}\n")
    async with gateway(issued) as (servicer, address):
        where = ["--gateway", address, "--tls-ca", str(issued.ca)]
        said = await asyncio.to_thread(
            run,
            "generate",
            "hi",
            *where,
            "--cache-salt",
            "!",
            "--api-key-file",
            str(file),
            env={"TANDEM_API_KEY": "no"},
        )
        assert (said.exit_code, said.output) == (0, "hi!\n")
        env = {"TANDEM_API_KEY": "from-the-environment", "TANDEM_TLS_CA": str(issued.ca)}
        said = await asyncio.to_thread(run, "chat", "--gateway", address, env=env)
        assert said.exit_code == 0
    assert [keys for keys, _ in servicer.seen] == [[f"Bearer {KEY}"], ["Bearer from-the-environment"]]


async def test_commands_say_what_is_wrong_with_a_connection(authority: Authority, tmp_path: Path) -> None:
    issued = authority.issue("g", "tandem-gateway")
    async with gateway(issued, client_certificates=True) as (_, address):
        for flags, words in (
            (["--tls-ca", str(issued.ca), "--tls-server-name", "other"], "isn't the one that --tls-ca and"),
            ([], "does it speak TLS (--tls-ca)"),
            (["--tls-ca", str(issued.ca)], "does it want --tls-cert?"),
        ):
            said = await asyncio.to_thread(run, "generate", "hi", "--gateway", address, *flags)
            assert isinstance(said.exception, TandemError)
            assert words in str(said.exception)


def test_a_key_file_that_is_none(make_file: Callable[[str, str], Path]) -> None:
    said = run("generate", "hi", "--api-key-file", str(make_file("key", "ключ")))
    assert "--api-key-file: " in str(said.exception)
    assert "ключ" not in str(said.exception)


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[str, str], Path]:
    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make
