"""Where workers come from: flags, the file, names in DNS; and a gateway that follows."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_kubernetes import FakeKubernetes
from gateway_fakes import Cluster, Heard, expected, tokens_of, until

from gateway.__main__ import parser
from gateway.discovery.dns import DnsWorkers, Pace, resolve
from gateway.discovery.endpoint_slices import EndpointSlices
from gateway.discovery.file import WorkersFile, read_workers_file
from gateway.discovery.flags import source_of
from gateway.discovery.listed import ListedWorkers
from gateway.discovery.source import Addresses
from tandem.errors import ConfigError
from tandem.service.address import Address

NAMES: dict[Any, Address] = {"prefill": Address("p.example", 1), "decode": Address("d.example", 2)}
FAST = Pace(interval=0.01, keep=0.2)


def _flags(*given: str) -> Any:
    return parser().parse_args(["--model", "m", *given])


def test_flags_name_one_source(tmp_path: Path) -> None:
    assert isinstance(source_of(_flags("--decode-worker", "a:1")), ListedWorkers)
    assert isinstance(source_of(_flags("--workers-file", "f")), WorkersFile)
    assert isinstance(source_of(_flags("--workers-dns", "decode=d:1", "--workers-dns", "prefill=p:1")), DnsWorkers)
    (tmp_path / "namespace").write_text("models\n")
    pod = ["--kubernetes-api", "http://127.0.0.1:1", "--kubernetes-credentials", str(tmp_path)]
    assert isinstance(source_of(_flags("--workers-endpointslices", "decode=tandem-decode", *pod)), EndpointSlices)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--decode-worker: at least one"),
        (["--prefill-worker", "a:1"], "--decode-worker: at least one"),
        (["--workers-file", "f", "--decode-worker", "a:1"], "give one of"),
        (["--workers-file", "f", "--workers-dns", "decode=a:1"], "give one of"),
        (["--workers-dns", "prefill=a:1"], "decode is missing"),
        (["--workers-dns", "decode=a"], "HOST:PORT"),
        (["--workers-dns", "gateway=a:1"], "begin with prefill= or decode="),
        (["--workers-dns", "decode"], "begin with prefill= or decode="),
        (["--workers-dns", "decode=a:1", "--workers-dns", "decode=b:1"], "twice"),
        (["--workers-endpointslices", "decode=", "--kubernetes-api", "http://a"], "begin with"),
        (["--workers-endpointslices", "decode=d", "--kubernetes-api", "http://a"], "--kubernetes-namespace"),
        (
            ["--workers-endpointslices", "decode=d", "--kubernetes-api", "http://a", "--kubernetes-namespace", "../x"],
            "no namespace's name",
        ),
    ],
)
def test_flags_that_cannot_work(given: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        source_of(_flags(*given))


async def test_the_workers_file_is_followed(tmp_path: Path) -> None:
    """Replaced by rename: workers come and go; a bad file, or none, changes nothing."""
    file, part = tmp_path / "workers.json", tmp_path / "part"

    def write(text: str) -> None:
        part.write_text(text)
        os.replace(part, file)

    write('{"prefill": [], "decode": ["127.0.0.1:1"]}')
    source, heard = WorkersFile(file), Heard()
    source.start(heard)
    try:
        assert heard.last == Addresses((), ("127.0.0.1:1",))
        write('{"prefill": ["127.0.0.1:3"], "decode": ["127.0.0.1:2"]}')
        await until(lambda: heard.last == Addresses(("127.0.0.1:3",), ("127.0.0.1:2",)))
        write("{")
        await until(lambda: heard.troubles)
        assert heard.last.decode == ("127.0.0.1:2",)
        troubles = len(heard.troubles)
        file.unlink()
        await until(lambda: len(heard.troubles) > troubles)
        assert heard.last.decode == ("127.0.0.1:2",)
        write('{"decode": ["127.0.0.1:4"]}')
        await until(lambda: heard.last == Addresses((), ("127.0.0.1:4",)))
    finally:
        await source.close()


@pytest.mark.parametrize(
    "text",
    ["[]", '{"decode": 3}', '{"decode": ["x"]}', '{"other": []}', "nonsense", pytest.param("[" * 100_000, id="deep")],
)
def test_bad_workers_files(tmp_path: Path, text: str) -> None:
    """Each is a ConfigError that names the flag."""
    file = tmp_path / "workers.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="--workers-file"):
        read_workers_file(file)


async def test_names_are_resolved_again_and_again() -> None:
    """Only a changed answer is reported; the order of an answer is no change."""
    answers = {"p.example": ["10.0.1.1"], "d.example": ["10.0.0.2", "10.0.0.1"]}
    asked = 0

    async def resolver(name: Address) -> list[Address]:
        nonlocal asked
        asked += 1
        answers[name.host].reverse()
        return [Address(host, name.port) for host in answers[name.host]]

    source, heard = DnsWorkers(NAMES, FAST, resolver=resolver), Heard()
    source.start(heard)
    try:
        await until(lambda: heard.last == Addresses(("10.0.1.1:1",), ("10.0.0.1:2", "10.0.0.2:2")))
        before = asked
        await until(lambda: asked > before + 8)
        assert heard.reports == 2
        answers["d.example"] = ["10.0.0.3"]
        await until(lambda: heard.last == Addresses(("10.0.1.1:1",), ("10.0.0.3:2",)))
    finally:
        await source.close()


NONE = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
SILENCE = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


async def test_a_name_without_an_address_keeps_its_workers_for_a_while() -> None:
    """An empty Service and a name server that has just started say the same."""
    answer: list[str] | None = ["10.0.0.1"]

    async def resolver(name: Address) -> list[Address]:
        if answer is None:
            raise NONE
        return [Address(host, name.port) for host in answer]

    source, heard = DnsWorkers({"decode": Address("d", 2)}, Pace(0.01, keep=0.3), resolver=resolver), Heard()
    source.start(heard)
    try:
        await until(lambda: heard.last.decode == ("10.0.0.1:2",))
        answer = None
        await until(lambda: len(heard.troubles) > 3)
        assert heard.last.decode == ("10.0.0.1:2",)
        assert "not known" in heard.troubles[0]
        await until(lambda: heard.last.decode == ())
        answer = ["10.0.0.1"]
        await until(lambda: heard.last.decode == ("10.0.0.1:2",))
    finally:
        await source.close()


@pytest.mark.parametrize("silence", [SILENCE, OSError(24, "Too many open files")])
async def test_workers_are_not_lost_with_the_name_server(silence: OSError) -> None:
    """However long it gives no answer; and its first word after that isn't believed at once either."""
    asked = 0

    async def resolver(name: Address) -> list[Address]:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise silence if asked < 80 else NONE
        return [Address("10.0.0.1", name.port)]

    source, heard = DnsWorkers({"decode": Address("d", 2)}, Pace(0.01, keep=0.5), resolver=resolver), Heard()
    source.start(heard)
    try:
        await until(lambda: heard.reports == 2)
        assert heard.last.decode == ()
        assert asked > 81
    finally:
        await source.close()


async def test_no_address_at_all_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lookup(host: str, port: int, **_: Any) -> Any:
        return []

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
    with pytest.raises(socket.gaierror, match="no address"):
        await resolve(Address("x", 7))


async def test_one_family_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod with an address of each family is one worker, and stays that one when the other family has more."""
    four, six = ["10.0.0.1"], ["fd00::1"]

    async def lookup(host: str, port: int, **_: Any) -> Any:
        found = [(socket.AF_INET6, 1, 6, "", (host, port, 0, 0)) for host in six]
        return [*found, *((socket.AF_INET, 1, 6, "", (host, port)) for host in four)]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
    assert await resolve(Address("x", 7)) == [Address("fd00::1", 7), Address("10.0.0.1", 7)]
    source, heard = DnsWorkers({"decode": Address("x", 7)}, FAST), Heard()
    source.start(heard)
    try:
        await until(lambda: heard.last.decode == ("[fd00::1]:7",))
        four.append("10.0.0.2")
        six.append("fd00::2")
        six[0] = "fd00::3"
        four.append("10.0.0.3")
        await until(lambda: heard.reports == 2)
        assert heard.last.decode == ("[fd00::2]:7", "[fd00::3]:7")
        six.clear()
        await until(lambda: heard.last.decode == ("10.0.0.1:7", "10.0.0.2:7", "10.0.0.3:7"))
    finally:
        await source.close()


NAMESPACE = ["unshare", "--user", "--map-root-user", "--net", "--mount"]


def _may_unshare() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _may_unshare(), reason="this machine gives no user namespaces: no port 53 of our own")
def test_a_real_name_server(tmp_path: Path) -> None:
    """The system's resolver asks a name server over UDP, in a network of its own."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    script = Path(__file__).with_name("real_dns.py")
    inside = (
        f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && mount --bind {tmp_path}/hosts /etc/hosts && "
        f"exec {sys.executable} {script}"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", inside],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["10.0.0.1:7001,10.0.0.2:7001", "10.0.0.3:7001"]


async def test_pods_join_and_leave_under_streams(cluster: Cluster, serve: Any) -> None:
    """Through a watch of EndpointSlices: streams run over while their pods terminate, later ones go to new pods."""
    await cluster.start(prefill=1, decode=1)
    cluster.decode[0].pause = 0.02
    api = FakeKubernetes()
    await api.start()
    _put(api, "p", cluster.prefill)
    _put(api, "d", cluster.decode)
    pod = ["--kubernetes-api", f"http://127.0.0.1:{api.port}", "--kubernetes-namespace", "models"]
    given = ["--workers-endpointslices", "prefill=p", "--workers-endpointslices", "decode=d"]
    front = await serve(bindings={"source": source_of(_flags(*given, *pod))})
    old = asyncio.ensure_future(front.collect(front.stream(40)))
    await until(lambda: cluster.decode[0].tokens_sent > 2)
    new = await cluster.add_decode()
    _put(api, "d", cluster.decode)
    await until(lambda: any(w.ready and w.address == new.address for w in front.gateway.pool.decode))
    _put(api, "d", cluster.decode, terminating=cluster.decode[0].address)
    await until(lambda: [w.address for w in front.gateway.pool.decode] == [new.address])
    assert tokens_of(await front.collect(front.stream(8))) == expected(8)
    assert len(new.records) == 1
    assert tokens_of(await old) == expected(40)
    assert len(cluster.decode[0].records) == 1
    await api.close()


def _put(api: FakeKubernetes, service: str, workers: Any, terminating: str = "") -> None:
    """A slice for each worker: ports differ on one machine."""
    for number, worker in enumerate(workers):
        host, _, port = worker.address.rpartition(":")
        ending = worker.address == terminating
        conditions = {"ready": not ending, "serving": True, "terminating": ending}
        ports = [{"name": "grpc", "port": int(port), "protocol": "TCP"}]
        api.put(f"{service}-{number}", service, {"addresses": [host], "conditions": conditions}, ports=ports)
