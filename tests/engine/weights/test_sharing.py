"""How processes meet over one memory: who is first, what happens when somebody dies, and what is not believed."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from engine.weights import sharing
from engine.weights.sharing import Panel, Share

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd and abstract sockets are Linux's")
CAPACITY = 4096
PANELS = {"head": Panel(64, 128, 2, 64, 8), "0.qkv": Panel(0, 64, 1, 64, 8)}
CONTENT = b"weights"
PROCESS = """
import os, sys
from engine.weights import sharing
share = sharing.join(sys.argv[1], int(sys.argv[2]))
first = share.manifest is None
if first and sys.argv[3] == "packs":
    os.pwrite(share.fd, b"weights", 0)
    share.publish({"head": sharing.Panel(64, 128, 2, 64, 8), "0.qkv": sharing.Panel(0, 64, 1, 64, 8)})
if share.manifest is not None:
    share.start()
print("first" if first else "other", os.fstat(share.fd).st_ino, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def key() -> str:
    """A key that nobody else has."""
    return os.urandom(32).hex()


@pytest.fixture
def joined(key: str) -> Iterator[Callable[..., Share | None]]:
    """`joined(**arguments)` joins; what came of it is closed at the end."""
    with ExitStack() as stack:

        def join(**arguments: Any) -> Share | None:
            share = sharing.join(key, CAPACITY, **arguments)
            if share is not None:
                stack.callback(share.close)
            return share

        yield join


@pytest.fixture(autouse=True)
def leaks_nothing(eventually: Callable[..., None]) -> Iterator[None]:
    """Descriptors and threads are as before; autouse, so it is the last to look."""
    before = descriptors()
    yield
    eventually(lambda: descriptors() == before and not share_threads())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def share_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == sharing.THREAD]


def publish(share: Share | None) -> int:
    """Be the first to its end; the memory's inode."""
    assert share is not None
    assert share.manifest is None
    os.pwrite(share.fd, CONTENT, 0)
    share.publish(PANELS)
    share.start()
    return inode(share)


def inode(share: Share) -> int:
    return os.fstat(share.fd).st_ino


@contextmanager
def process(key: str, role: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A process that joined and holds on: itself, whether it was the first, and its memory's inode."""
    command = [sys.executable, "-c", PROCESS, key, str(CAPACITY), role]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            what, number = child.stdout.readline().split()
            yield child, what, int(number)
        finally:
            child.kill()


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once somebody here is connected and waits."""
    event, original = threading.Event(), sharing._await_memory

    def await_memory(sock: socket.socket) -> int | None:
        event.set()
        return original(sock)

    monkeypatch.setattr(sharing, "_await_memory", await_memory)
    return event


def test_who_comes_while_the_first_packs_gets_its_memory(
    joined: Callable[..., Share | None], waiting: threading.Event
) -> None:
    first = joined()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(joined)
        assert waiting.wait(30)
        assert not coming.done()
        memory = publish(first)
        second = coming.result(30)
    third = joined()
    for share in (second, third):
        assert share is not None
        assert share.manifest == PANELS
        assert inode(share) == memory
        assert os.pread(share.fd, len(CONTENT), 0) == CONTENT
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(share.fd, b"x", 0)
        with open(f"/proc/self/fd/{share.fd}", "r+b", buffering=0) as again:
            with pytest.raises(OSError, match="Operation not permitted"):
                again.write(b"x")
            with pytest.raises(OSError, match="Operation not permitted"):
                mmap.mmap(again.fileno(), CAPACITY)


def test_the_first_is_killed_while_it_packs(
    key: str, joined: Callable[..., Share | None], waiting: threading.Event
) -> None:
    with process(key, "dawdles") as (child, what, _), ThreadPoolExecutor(1) as pool:
        assert what == "first"
        coming = pool.submit(joined)
        assert waiting.wait(30)
        kill(child)
        publish(coming.result(30))


def test_the_first_is_killed_later_and_another_takes_its_place(
    key: str, joined: Callable[..., Share | None], eventually: Callable[..., None]
) -> None:
    def got_memory() -> bool:
        share = joined()
        assert share is not None
        if share.manifest is not None:
            return inode(share) == memory
        share.close()  # the name was free for a moment; who holds the memory waits for it again
        return False

    with process(key, "packs") as (first, one, memory), process(key, "packs") as (_, other, same):
        assert (one, other) == ("first", "other")
        assert same == memory
        kill(first)
        eventually(got_memory)


def test_a_first_that_gives_up_lets_the_next_be_first(
    joined: Callable[..., Share | None], waiting: threading.Event
) -> None:
    first = joined()
    assert first is not None
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(joined)
        assert waiting.wait(30)
        first.close()
        publish(coming.result(30))


def test_waiting_ends(joined: Callable[..., Share | None], caplog: pytest.LogCaptureFixture) -> None:
    joined()
    assert joined(wait_seconds=0) is None
    assert f"process {os.getpid()} is still packing them" in caplog.text


def test_another_key_or_capacity_is_another_memory(joined: Callable[..., Share | None], key: str) -> None:
    publish(joined())
    other = sharing.join(key[::-1], CAPACITY)
    assert other is not None
    assert other.manifest is None
    other.close()
    assert sharing.join(key, 2 * CAPACITY) is None


def memory(manifest: bytes, seals: int | None = None, size: int = CAPACITY) -> int:
    """A memfd with `manifest` after `size` bytes."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.pwrite(fd, manifest, size)
    sharing.fcntl.fcntl(fd, sharing.fcntl.F_ADD_SEALS, sharing._seals() if seals is None else seals)
    return fd


def said(key: str, **panels: object) -> bytes:
    return json.dumps({"key": key, "panels": panels}).encode()


RUBBISH: dict[str, tuple[Callable[[str], int], str]] = {
    "no seals": (lambda key: memory(said(key), seals=0), "not sealed"),
    "may shrink": (lambda key: memory(said(key), seals=sharing.fcntl.F_SEAL_GROW), "not sealed"),
    "no memfd": (lambda _: os.open(os.devnull, os.O_RDONLY), "no memfd"),
    "small": (lambda key: memory(said(key), size=0), "can't be 4096 bytes of weights"),
    "no manifest": (lambda _: memory(b""), "can't be 4096 bytes of weights"),
    "no JSON": (lambda _: memory(b"\xff{"), "malformed manifest"),
    "deep": (lambda _: memory(b"[" * 100_000), "malformed manifest"),
    "a list": (lambda _: memory(b"[]"), "malformed manifest"),
    "no panels": (lambda key: memory(json.dumps({"key": key}).encode()), "malformed manifest"),
    "too few numbers": (lambda key: memory(said(key, head=[1, 2])), "malformed manifest"),
    "another key": (lambda key: memory(said(key[::-1])), "another model"),
    "text": (lambda key: memory(said(key, head="01234")), "head can't be"),
    "negative": (lambda key: memory(said(key, head=[-64, 64, 1, 1, 8])), "head can't be"),
    "too long": (lambda key: memory(said(key, head=[4032, 128, 1, 1, 8])), "weights end at 4160 of 4096"),
    "overlap": (lambda key: memory(said(key, a=[0, 65, 1, 1, 8], b=[64, 64, 1, 1, 8])), "b overlaps another"),
}


@pytest.mark.parametrize("case", RUBBISH)
def test_rubbish_is_refused(
    case: str, key: str, joined: Callable[..., Share | None], caplog: pytest.LogCaptureFixture
) -> None:
    make, words = RUBBISH[case]
    fd = make(key)
    with answering(key, lambda visitor: socket.send_fds(visitor, [sharing.GREETING], [fd])):
        assert joined() is None
    os.close(fd)
    assert words in caplog.text


@pytest.mark.parametrize(("greeting", "count"), [(sharing.GREETING, 0), (sharing.GREETING, 2), (b"TNDMWTS9", 1)])
def test_a_malformed_greeting_is_refused(
    greeting: bytes, count: int, key: str, joined: Callable[..., Share | None], caplog: pytest.LogCaptureFixture
) -> None:
    with open(os.devnull) as file:
        fds = [file.fileno()] * count
        with answering(key, lambda visitor: socket.send_fds(visitor, [greeting], fds)):
            assert joined() is None
    assert "malformed greeting" in caplog.text


@contextmanager
def answering(key: str, answer: Callable[[socket.socket], object]) -> Iterator[None]:
    """Somebody has the name and gives one visitor this."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(sharing._address(key))
        listener.listen()
        listener.settimeout(30)

        def accept() -> None:
            visitor, _ = listener.accept()
            with visitor:
                answer(visitor)

        answered = pool.submit(accept)
        yield
        answered.result(30)


def test_another_user_is_not_believed(
    key: str, joined: Callable[..., Share | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(joined())
    monkeypatch.setattr(sharing, "peer_of", lambda _: (1, os.geteuid() + 1))
    assert joined() is None
    assert "another user has their name" in caplog.text


def test_another_user_gets_nothing(
    key: str, joined: Callable[..., Share | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(joined())
    monkeypatch.setattr(sharing, "peer_of", lambda _: (1, os.geteuid() + 1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
        visitor.settimeout(30)
        visitor.connect(sharing._address(key))
        assert sharing._receive(visitor) == (b"", None)


@pytest.mark.parametrize("what", ["memfd_create", "ftruncate"])
def test_no_memory_is_no_error(
    what: str,
    joined: Callable[..., Share | None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such memory")

    monkeypatch.setattr(os, what, fail)
    assert joined() is None
    assert "weights are not shared: no such memory" in caplog.text


def test_a_name_that_never_answers_is_no_error(
    key: str, joined: Callable[..., Share | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sharing, "_TRIES", 2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as squatter:
        squatter.bind(sharing._address(key))
        assert joined() is None
    assert "does not answer" in caplog.text
