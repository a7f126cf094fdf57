"""The supervisor with fake services: real processes, no model."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from certificates import Issued

from tandem.errors import ConfigError, InvalidRequestError, UnavailableError
from tandem.service.address import Address
from tandem.service.tls import TlsFiles
from tandem.supervisor import control, process, runtime, slot
from tandem.supervisor import supervisor as supervisor_
from tandem.supervisor.listing import listed
from tandem.supervisor.settings import UpSettings, environment, gpu_variables, worker_arguments
from tandem.supervisor.supervisor import Supervisor

Up = Callable[..., Supervisor]


def settings(**changes: Any) -> UpSettings:
    anywhere = Address("127.0.0.1", 0)
    fixed: dict[str, Any] = {"model": Path("m"), "gateway": anywhere, "http": anywhere, "drain_grace": 2.0}
    return UpSettings(**{**fixed, **changes})


def events(log: Path, **wanted: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def live(log: Path) -> list[int]:
    def runs(pid: int) -> bool:
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    return [event["pid"] for event in events(log, event="start") if runs(event["pid"])]


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # other processes have no events
            await asyncio.sleep(0.02)


@pytest.fixture
async def up(fake_services: Path) -> AsyncIterator[Up]:
    """Makes supervisors; kills what a failing test leaves."""
    made: list[Supervisor] = []
    lines: list[tuple[str, str]] = []

    def make(**changes: Any) -> Supervisor:
        supervisor = Supervisor(settings(**changes), lambda name, line: lines.append((name, line)), lambda step: None)
        supervisor.lines = lines  # type: ignore[attr-defined]
        made.append(supervisor)
        return supervisor

    yield make
    for supervisor in made:
        supervisor.kill()
        await supervisor.stop()


def following(argv: list[str], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


async def test_certificates_and_keys_reach_the_services(up: Up, fake_services: Path, all_roles: Issued) -> None:
    """The same files for all; keys and clients' certificates are the gateway's matter. Wrong files start nothing."""
    files = TlsFiles(all_roles.cert, all_roles.key, all_roles.ca)
    with pytest.raises(ConfigError, match="--tls-key"):
        up(tls=TlsFiles(all_roles.cert, all_roles.ca, all_roles.ca))
    with pytest.raises(ConfigError, match="--tls-client-auth"):
        settings(tls_client_auth="required")
    supervisor = up(tls=files, tls_client_auth="required", api_keys=Path("/keys.json"))
    starting = asyncio.create_task(supervisor.start())
    await until(lambda: len(events(fake_services, event="start")) == 3)
    starting.cancel()  # the fake gateway speaks no TLS
    await asyncio.gather(starting, return_exceptions=True)
    for event in events(fake_services, event="start"):
        argv, gateway = event["argv"], event["role"] == "gateway"
        assert following(argv, "--tls-cert") == str(files.cert)
        assert following(argv, "--tls-key") == str(files.key)
        assert following(argv, "--tls-ca") == str(files.ca)
        assert following(argv, "--tls-client-auth") == ("required" if gateway else None)
        assert following(argv, "--api-keys") == ("/keys.json" if gateway else None)


def test_a_clients_key_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "secret")
    monkeypatch.setenv("TANDEM_OTHER", "kept")
    assert "secret" not in environment().values()
    assert environment()["TANDEM_OTHER"] == "kept"


async def test_listing_a_gateway_that_answers_otherwise() -> None:
    """Nothing there, no HTTP, another status, no JSON: no workers are seen, and nothing is raised."""
    assert await listed(Address("127.0.0.1", 1)) == []
    answers = [
        b"",
        b"hello",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ]
    good = b'HTTP/1.1 200 OK\r\n\r\n{"models": [{"prefill_workers": 2, "decode_workers": 3}]}'
    left = [*answers, good]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(left.pop(0))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        http = Address(*server.sockets[0].getsockname()[:2])
        assert [await listed(http) for _ in answers] == [[]] * len(answers)
        assert await listed(http) == [(2, 3)]


async def test_starts_serves_and_stops_in_order(up: Up, fake_services: Path) -> None:
    """All processes are in our session, in groups of their own; they end gateway, prefill, decode; no file is left."""
    supervisor = up(prefill=1, decode=2)
    await supervisor.start()
    workers = supervisor.status()["workers"]
    assert [worker["name"] for worker in workers] == ["gateway-0", "prefill-0", "decode-0", "decode-1"]
    assert all(worker["ready"] for worker in workers)
    assert supervisor.gateways[0].port > 0
    for event in events(fake_services, event="start", role="decode"):
        assert event["session"] == os.getsid(0)
        assert event["group"] == event["pid"]
        assert event["ppid"] == os.getpid()
    assert ("decode-0", "a note that is not ready") in supervisor.lines  # type: ignore[attr-defined]
    await supervisor.stop()
    assert [event["role"] for event in events(fake_services, event="stop")] == [
        "gateway",
        "prefill",
        "decode",
        "decode",
    ]
    assert live(fake_services) == []
    assert list(runtime.runtime_folder().iterdir()) == []


async def test_flags_reach_the_workers(up: Up, fake_services: Path) -> None:
    """Only flags that were given are passed, so that a worker's defaults hold."""
    sizes = {"block_size": 32, "prefill_block_size": 16, "kv_dtype": "int8", "prefill_kv_dtype": "bf16"}
    off = {"prefix_cache": False, "share_weights": False, "graphs": False}
    supervisor = up(compute="exact", device="cpu", max_context=99, attention="auto", **sizes, **off)
    await supervisor.start()
    (decode,) = events(fake_services, event="start", role="decode")
    flags = decode["argv"]
    assert flags[flags.index("--compute") + 1] == "exact"
    assert flags[flags.index("--block-size") + 1] == "32"
    assert flags[flags.index("--kv-dtype") + 1] == "int8"
    switches = {"--no-prefix-cache", "--no-share-weights", "--convert-kv-dtype", "--no-graphs"}
    assert switches <= set(flags)
    assert flags[flags.index("--device") + 1] == "cpu"
    assert flags[flags.index("--max-context") + 1] == "99"
    assert flags[flags.index("--attention") + 1] == "auto"
    assert "--num-blocks" not in flags
    (prefill,) = events(fake_services, event="start", role="prefill")
    assert prefill["argv"][prefill["argv"].index("--block-size") + 1] == "16"
    assert prefill["argv"][prefill["argv"].index("--kv-dtype") + 1] == "bf16"
    assert "--convert-kv-dtype" not in prefill["argv"]


async def test_dead_worker_comes_back(up: Up, fake_services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9: out of the workers file at once, back in it with a new address after the wait."""
    monkeypatch.setattr(slot, "FIRST_WAIT", 0.3)
    supervisor = up()
    await supervisor.start()
    workers_file = supervisor._instance.workers_file
    before = json.loads(workers_file.read_text())["decode"]
    (decode,) = events(fake_services, event="start", role="decode")
    os.kill(decode["pid"], signal.SIGKILL)
    await until(lambda: json.loads(workers_file.read_text())["decode"] == [])
    await until(lambda: len(json.loads(workers_file.read_text())["decode"]) == 1)
    assert json.loads(workers_file.read_text())["decode"] != before
    assert [w["restarts"] for w in supervisor.status()["workers"] if w["role"] == "decode"] == [1]


async def test_a_full_disk_hides_no_worker(up: Up, fake_services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers file can't be written when a worker comes back: it is once there is room."""
    monkeypatch.setattr(slot, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(supervisor_, "REWRITE_SECONDS", 0.05)
    supervisor = up()
    await supervisor.start()
    instance = supervisor._instance
    before = json.loads(instance.workers_file.read_text())["decode"]
    write, refused = instance.write_workers, []

    def full(workers: Any) -> None:
        refused.append(workers)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(instance.workers_file))

    monkeypatch.setattr(instance, "write_workers", full)
    (decode,) = events(fake_services, event="start", role="decode")
    os.kill(decode["pid"], signal.SIGKILL)
    await until(lambda: any(workers["decode"] not in (before, []) for workers in refused))
    assert json.loads(instance.workers_file.read_text())["decode"] == before
    monkeypatch.setattr(instance, "write_workers", write)
    await until(lambda: json.loads(instance.workers_file.read_text())["decode"] == refused[-1]["decode"])


async def test_a_full_disk_is_told_at_the_start(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = up()

    def full(_workers: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(supervisor._instance, "write_workers", full)
    with pytest.raises(ConfigError, match="No space left"):
        await supervisor.start()


async def test_dead_gateway_keeps_its_port(up: Up, fake_services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients know the address."""
    monkeypatch.setattr(slot, "FIRST_WAIT", 0.05)
    supervisor = up()
    await supervisor.start()
    os.kill(events(fake_services, event="start", role="gateway")[0]["pid"], signal.SIGKILL)
    await until(lambda: len(events(fake_services, event="start", role="gateway")) == 2)
    argv = events(fake_services, event="start", role="gateway")[1]["argv"]
    assert argv[argv.index("--listen") + 1] == str(supervisor.gateways[0])


async def test_worker_that_cannot_start(up: Up, fake_services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the worker's own line, and the rest is cleared away."""
    monkeypatch.setenv("FAKE_DECODE", "fail")
    supervisor = up()
    with pytest.raises(ConfigError, match="decode-0 did not start: --model: the file is no model"):
        await supervisor.start()
    await supervisor.stop()
    assert live(fake_services) == []


async def test_how_a_worker_ended_that_gives_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's killer, for one, leaves it no time: what it logged before is no reason."""
    dies = "import os, signal, sys; print('loading', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr("tandem.supervisor.settings.command_line", lambda *_: [sys.executable, "-c", dies])
    worker = await process.Process.launch("decode-0", "decode", [], lambda *_: None)
    assert await worker.ready() is None
    assert worker.error_line() == "exit code -9; it last wrote: loading"


async def test_stubborn_worker_is_killed(up: Up, fake_services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ignores SIGTERM is gone after its grace."""
    monkeypatch.setenv("FAKE_PREFILL", "stubborn")
    monkeypatch.setattr("tandem.supervisor.supervisor.KILL_MARGIN", 0.1)
    supervisor = up(drain_grace=0.1)
    await supervisor.start()
    await supervisor.stop()
    assert live(fake_services) == []


async def test_scale_up_and_down(up: Up, fake_services: Path) -> None:
    """Through the control socket, as `tandem scale` does."""
    supervisor = up()
    await supervisor.start()
    port = supervisor.gateways[0].port

    async def ask(request: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(control.ask, port, request, 30)

    answer = await ask({"command": "scale", "role": "decode", "count": 3})
    assert [w["name"] for w in answer["workers"] if w["role"] == "decode"] == ["decode-0", "decode-1", "decode-2"]
    answer = await ask({"command": "scale", "role": "decode", "count": 1})
    assert [w["name"] for w in answer["workers"] if w["role"] == "decode"] == ["decode-0"]
    answer = await ask({"command": "scale", "role": "prefill", "count": 0})
    assert not [w for w in answer["workers"] if w["role"] == "prefill"]
    assert len(live(fake_services)) == 2
    for bad in ({"role": "decode", "count": 0}, {"role": "gateway", "count": 2}, {"role": "decode", "count": "x"}):
        with pytest.raises(ConfigError):
            await ask({"command": "scale", **bad})
    with pytest.raises(ConfigError, match="unknown command"):
        await ask({"command": "dance"})


async def test_failed_scale_leaves_the_pool_as_it_was(
    up: Up, fake_services: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that did not start is forgotten; the others go on."""
    supervisor = up()
    await supervisor.start()
    monkeypatch.setenv("FAKE_DECODE", "fail")
    with pytest.raises(ConfigError, match="the file is no model"):
        await supervisor.scale("decode", 2)
    assert [w["name"] for w in supervisor.status()["workers"] if w["role"] == "decode"] == ["decode-0"]
    assert supervisor.status()["workers"][-1]["ready"]


async def test_stop_breaks_off_a_scale(
    up: Up, fake_services: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C while a new worker loads: it goes with the others, who asked is told, and nothing is written any more."""
    supervisor = up()
    await supervisor.start()
    monkeypatch.setenv("FAKE_DECODE", "slow")
    request = {"command": "scale", "role": "decode", "count": 2}
    scaling = asyncio.create_task(asyncio.to_thread(control.ask, supervisor.gateways[0].port, request, 30))
    await until(lambda: len(events(fake_services, event="start", role="decode")) == 2)
    await supervisor.stop()
    with pytest.raises(ConfigError, match="is stopping"):
        await scaling
    assert live(fake_services) == []
    assert not caplog.records


async def test_control_refuses_rubbish(up: Up) -> None:
    """A line that is no JSON, and no line at all, leave the server as it was."""
    supervisor = up()
    await supervisor.start()
    path = runtime.control_socket(supervisor.gateways[0].port)
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"garbage\n")
    assert json.loads(await reader.readline())["ok"] is False
    writer.close()
    _reader, silent = await asyncio.open_unix_connection(path)
    silent.close()
    for ports in (supervisor.gateways[0].port, [5, supervisor.gateways[0].port]):
        assert (await asyncio.to_thread(control.ask, ports, {"command": "status"}, 10))["workers"]


async def test_port_in_use_is_told_before_anything_starts(up: Up, fake_services: Path) -> None:
    """No process was started in vain."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(ConfigError, match=f"--gateway: can't listen on 127.0.0.1:{port}"):
            await up(gateway=Address("127.0.0.1", port)).start()
    assert events(fake_services) == []


async def test_one_port_is_one_tandem_up(up: Up, fake_services: Path) -> None:
    """The same port at another host: it would take the control socket from the first."""
    first = await asyncio.start_unix_server(lambda reader, writer: writer.close(), runtime.control_socket(45678))
    async with first:
        with pytest.raises(ConfigError, match="of yours runs at port 45678"):
            await up(gateway=Address("127.0.0.2", 45678)).start()
    assert events(fake_services) == []


def test_kill_dash_nine_leaves_no_worker_and_the_next_sweeps(fake_services: Path, tmp_path: Path) -> None:
    """Workers die with the supervisor; its files go when the next one starts."""
    script = tmp_path / "up.py"
    script.write_text(
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tandem.service.address import Address\n"
        "from tandem.supervisor import settings\n"
        "settings.MODULES = dict(prefill='fake_prefill', decode='fake_decode', gateway='fake_gateway')\n"
        "from tandem.supervisor.supervisor import Supervisor\n"
        "async def main():\n"
        "    anywhere = Address('127.0.0.1', 0)\n"
        "    config = settings.UpSettings(model=Path('m'), gateway=anywhere, http=anywhere)\n"
        "    supervisor = Supervisor(config, lambda *a: None, lambda s: None)\n"
        "    await supervisor.start()\n"
        "    print('up', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert len(live(fake_services)) == 3
        process.kill()
    asyncio.run(until(lambda: not live(fake_services)))
    root = runtime.runtime_folder()
    assert len(list(root.iterdir())) == 2
    runtime.sweep(root)
    assert list(root.iterdir()) == []


def test_sweep_spares_the_living(fake_services: Path) -> None:
    """A running `tandem up` keeps its folder."""
    instance = runtime.Instance()
    try:
        runtime.sweep(runtime.runtime_folder())
        assert instance.folder.exists()
    finally:
        instance.close()


def test_runtime_folder_must_be_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that others can enter is refused."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "tandem").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="only you can read"):
        runtime.runtime_folder()


def test_runtime_folder_must_have_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at once, and not once everything has started and the control socket can't be made."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR to a shorter folder"):
        runtime.runtime_folder()


def test_ask_names_the_running_ones(fake_services: Path) -> None:
    """No `tandem up` at that port: the error says where one is."""
    (runtime.runtime_folder() / "gateway-1234.sock").touch()
    with pytest.raises(UnavailableError, match=r"port 5\b.*--gateway 127.0.0.1:1234"):
        control.ask(5, {"command": "status"})
    with pytest.raises(UnavailableError, match=r"port 5 or 1234\b"):
        control.ask([5, 1234], {"command": "status"})


@pytest.mark.parametrize("changes", [{"decode": 0}, {"prefill": -1}, {"prefill": 65}, {"gateways": 0}])
def test_settings_refuse_counts(changes: dict[str, int]) -> None:
    """Named in the error."""
    with pytest.raises(ConfigError, match=next(iter(changes))):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": -5}, "--chunk-size: must be 1 or more, got -5"),
        ({"block_size": 0}, "--block-size: must be 1 or more, got 0"),
        ({"prefill_block_size": 0}, "--prefill-block-size: must be 1 or more, got 0"),
        ({"drain_grace": -1.0}, "--drain-grace: must be 0 or more, got -1"),
        ({"drain_grace": float("nan")}, "--drain-grace: must be 0 or more, got nan"),
        ({"default_timeout": 0.0}, "--default-timeout: must be more than 0 seconds, got 0"),
    ],
)
def test_settings_refuse_numbers(changes: dict[str, float], message: str) -> None:
    """By the flag that was given, before any process starts."""
    with pytest.raises(ConfigError, match=message):
        settings(**changes)
    settings(drain_grace=0.0, local_prefill_threshold=0)


@pytest.mark.parametrize(
    ("changes", "gpus", "share"),
    [
        ({}, [None, None], "0.5"),
        ({"gpus": ("0", "1")}, ["0", "1"], None),
        ({"prefill": 2, "gpus": ("3", "1")}, ["3", "1", "3"], "0.5"),
        ({"prefill": 2}, [None, None, None], "0.333"),
        ({"prefill": 0}, [None], None),
        ({"device": "cpu"}, [None, None], None),
        ({"gpu_share": 0.4, "gpus": ("0", "1")}, ["0", "1"], "0.4"),
    ],
)
def test_workers_share_out_the_gpus(changes: dict[str, Any], gpus: list[str | None], share: str | None) -> None:
    """All that start on one GPU may take as much of it as the others."""
    up = settings(**changes)
    workers = [("prefill", index) for index in range(up.prefill)] + [("decode", index) for index in range(up.decode)]
    found = [gpu_variables(up, role, index).get("CUDA_VISIBLE_DEVICES") for role, index in workers]  # type: ignore[arg-type]
    assert found == gpus
    assert gpu_variables(up, "gateway", 0) == {}
    assert following(worker_arguments(up, "decode"), "--gpu-share") == share


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu_share": 0.0}, "--gpu-share: must be over 0, at most 1, got 0"),
        ({"gpu_share": 1.5}, "--gpu-share: .*1.5"),
        ({"gpus": ("0", "")}, "--gpus: must be numbers or names"),
    ],
)
def test_settings_refuse_shares_of_gpus(changes: dict[str, Any], message: str) -> None:
    """By the flag."""
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


async def test_scale_refuses_gateways(up: Up) -> None:
    """Only prefill and decode scale."""
    with pytest.raises(InvalidRequestError, match="allowed are prefill and decode"):
        await up().scale("gateway", 2)
