"""What only shared memory can suffer: real processes that die, foreign users, descriptors that lie."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kv_transfer import copying, shm, shm_map
from kv_transfer.messages import Offer
from kv_transfer.pool import HEADER, MAGIC, LocalPool, SharedPool
from kv_transfer.shm import ShmSource, ShmTarget, peer_uid
from kv_transfer.shm_handshake import ReaderHandshake, SourceHandshake
from kv_transfer.shm_map import map_pool
from kv_transfer.watcher import SocketWatcher
from tandem.errors import (
    ConfigError,
    IncompatibleError,
    InvalidRequestError,
    PermissionDeniedError,
    StaleError,
    TandemError,
    UnavailableError,
)
from tandem.kv_layout import KvLayout

LAYOUT = KvLayout(block_size=16, dtype="float32", num_layers=4, num_kv_heads=2, head_dim=32)
BLOCKS = 8


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for another thread or process to notice."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


class Worker:
    """The process of shm_worker.py."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("shm_worker.py"))
        self.process = subprocess.Popen(
            [sys.executable, script, str(BLOCKS), str(LAYOUT.block_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        self.endpoint = self.line().encode()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()

    def ask(self, words: str) -> None:
        self.tell(words)
        assert self.line() == "done"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.end()


@pytest.fixture
def target() -> Iterator[ShmTarget]:
    made = ShmTarget()
    yield made
    made.close()


@pytest.fixture
def target_pool() -> LocalPool:
    return LocalPool(BLOCKS, LAYOUT.block_bytes)


@pytest.fixture
def shared() -> Iterator[SharedPool]:
    made = SharedPool(BLOCKS, LAYOUT.block_bytes)
    yield made
    made.close()


def offer(*blocks: int) -> Offer:
    return Offer(0, 0, 16 * len(blocks), blocks, tuple(100 + block for block in blocks))


def block_of(pool: LocalPool, block: int) -> bytes:
    return bytes(pool.buffer[block * pool.block_bytes : (block + 1) * pool.block_bytes])


# Real processes.


def test_blocks_of_another_process(worker: Worker, target: ShmTarget, target_pool: LocalPool) -> None:
    view = target.connect(worker.endpoint, "child-1", LAYOUT)
    view.copy(offer(5, 2), target_pool, [0, 1])
    assert block_of(target_pool, 0) == bytes([6]) * LAYOUT.block_bytes
    assert block_of(target_pool, 1) == bytes([3]) * LAYOUT.block_bytes
    worker.ask("reuse 2")
    with pytest.raises(StaleError):
        view.verify(offer(5, 2))
    with pytest.raises(StaleError):
        view.copy(offer(2), target_pool, [1])
    view.verify(offer(5))


def test_kill_9_in_the_middle_of_a_copy(
    worker: Worker, target: ShmTarget, target_pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map outlives the process: the copy under way ends well, the next transfer fails clearly."""
    monkeypatch.setattr(copying, "PIECE_BYTES", LAYOUT.block_bytes)
    view = target.connect(worker.endpoint, "child-1", LAYOUT)
    asked = []

    def kill_before_the_second() -> bool:
        asked.append(1)
        if len(asked) == 2:
            worker.kill()
            eventually(lambda: target.sources == 0)
        return False

    view.copy(offer(*range(BLOCKS)), target_pool, list(range(BLOCKS)), kill_before_the_second)
    for block in range(BLOCKS):
        assert block_of(target_pool, block) == bytes([block + 1]) * LAYOUT.block_bytes
    with pytest.raises(UnavailableError) as caught:
        target.connect(worker.endpoint, "child-1", LAYOUT)
    assert caught.value.reason == "SOURCE_GONE"


def test_an_owner_in_full_swing_never_gives_mixed_blocks(
    worker: Worker, target: ShmTarget, target_pool: LocalPool
) -> None:
    """Whatever the reader keeps is one generation's bytes, whole; what was torn is refused."""
    view = target.connect(worker.endpoint, "child-1", LAYOUT)
    generations = view._pool.generations
    worker.tell("churn 10000")
    # 100 is what block 0's generation is before the first offer.
    eventually(lambda: generations[0] != 100)
    kept = 0
    for _ in range(3000):
        generation, block = divmod(generations[0], BLOCKS)
        with contextlib.suppress(StaleError):
            view.copy(Offer(0, 0, 16, (block,), (generation,)), target_pool, [0])
            kept += 1
            assert set(block_of(target_pool, 0)) == {generation % 251}
    assert kept > 0
    assert worker.line() == "done"


def test_a_source_that_closes_is_forgotten(worker: Worker, target: ShmTarget) -> None:
    target.connect(worker.endpoint, "child-1", LAYOUT)
    assert target.sources == 1
    worker.ask("close")
    eventually(lambda: target.sources == 0)
    with pytest.raises(UnavailableError):
        target.connect(worker.endpoint, "child-1", LAYOUT)


def test_restarts_of_the_source_leak_nothing(target: ShmTarget, target_pool: LocalPool) -> None:
    def maps() -> int:
        return sum("tandem-kv" in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    files, mapped = len(os.listdir("/proc/self/fd")), maps()
    for _ in range(3):
        worker = Worker()
        view = target.connect(worker.endpoint, "child-1", LAYOUT)
        view.copy(offer(1), target_pool, [0])
        assert maps() == mapped + 1
        worker.end()
        view.close()
        eventually(lambda: target.sources == 0)
    target.close()
    gc.collect()
    assert maps() == mapped
    assert len(os.listdir("/proc/self/fd")) == files


# Sharing and closing.


def test_one_map_per_incarnation(shared: SharedPool, target: ShmTarget) -> None:
    source = ShmSource(shared, "s")
    views = [target.connect(source.endpoint(), "s", LAYOUT) for _ in range(5)]
    assert target.sources == 1
    eventually(lambda: source.readers == 1)
    assert len({id(view._pool) for view in views}) == 1
    other = ShmTarget()
    other.connect(source.endpoint(), "s", LAYOUT)
    eventually(lambda: source.readers == 2)
    other.close()
    eventually(lambda: source.readers == 1)
    source.close()
    assert source.readers == 0


def test_two_transfers_that_map_at_once_share_one_map(
    shared: SharedPool, target: ShmTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, both, plain = ShmSource(shared, "s"), threading.Barrier(2), shm._receive_pool

    def slow(*args: Any) -> Any:
        pool = plain(*args)
        both.wait(20)
        return pool

    monkeypatch.setattr(shm, "_receive_pool", slow)
    views: list[Any] = []
    threads = [
        threading.Thread(target=lambda: views.append(target.connect(source.endpoint(), "s", LAYOUT))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert views[0]._pool is views[1]._pool
    assert target.sources == 1
    eventually(lambda: source.readers == 1)
    source.close()


def test_a_closed_target_connects_no_more(shared: SharedPool, target: ShmTarget) -> None:
    source = ShmSource(shared, "s")
    target.close()
    with pytest.raises(UnavailableError) as caught:
        target.connect(source.endpoint(), "s", LAYOUT)
    assert caught.value.reason == "CLOSING"
    assert target.sources == 0
    source.close()


def test_readers_are_bounded(shared: SharedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_MAX_READERS", 1)
    source, targets = ShmSource(shared, "s"), [ShmTarget(), ShmTarget()]
    targets[0].connect(source.endpoint(), "s", LAYOUT)
    with pytest.raises(UnavailableError):
        targets[1].connect(source.endpoint(), "s", LAYOUT)
    for end in (*targets, source):
        end.close()


def test_a_source_needs_a_shared_open_pool(shared: SharedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="SharedPool"):
        ShmSource(LocalPool(1, 1), "s")
    for incarnation in ("", "x" * 300):
        with pytest.raises(ConfigError, match="incarnation"):
            ShmSource(shared, incarnation)
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 32)
    source = ShmSource(shared, "s")
    with pytest.raises(ConfigError, match="listen"):
        ShmSource(shared, "s")
    source.close()


def test_a_pool_closed_under_its_source(shared: SharedPool, target: ShmTarget) -> None:
    source = ShmSource(shared, "s")
    shared.close()
    with pytest.raises(UnavailableError):
        target.connect(source.endpoint(), "s", LAYOUT)
    source.close()


@pytest.mark.parametrize("after", [0, 1])
def test_what_cannot_be_watched_is_not_kept(
    shared: SharedPool, target: ShmTarget, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """No descriptors for the watcher, or no room to watch one more: an error, and nothing stays mapped or open."""
    source = ShmSource(shared, "s")
    if after:
        target.connect(source.endpoint(), "s", LAYOUT)
        target._pools.clear()
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(target._watcher, "_start", fail) if after else patch.setattr(socket, "socketpair", fail)
        with pytest.raises(UnavailableError) as caught:
            target.connect(source.endpoint(), "s", LAYOUT)
    assert caught.value.reason == "WATCH_FAILED"
    assert target.sources == 0
    del caught  # its traceback holds the map
    gc.collect()
    eventually(lambda: source.readers == after)
    eventually(lambda: len(os.listdir("/proc/self/fd")) == files)
    assert target.connect(source.endpoint(), "s", LAYOUT)
    source.close()


def test_a_source_survives_a_reader_that_it_cannot_watch(
    shared: SharedPool, target: ShmTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one thread that answers readers doesn't die of it."""
    source, plain, failures = ShmSource(shared, "s"), SocketWatcher._start, iter([OSError(errno.ENOSPC, "no room")])

    def start(self: SocketWatcher) -> Any:
        for failure in failures if self is source._watcher else ():
            raise failure
        return plain(self)

    monkeypatch.setattr(SocketWatcher, "_start", start)
    with pytest.raises(UnavailableError) as caught:
        target.connect(source.endpoint(), "s", LAYOUT)
    assert (caught.value.reason, target.sources) == ("SOURCE_GONE", 0)
    assert target.connect(source.endpoint(), "s", LAYOUT)
    eventually(lambda: source.readers == 1)
    assert target.sources == 1
    source.close()


def test_a_source_that_cannot_watch_is_refused(shared: SharedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))

    def fail(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "no descriptors")

    monkeypatch.setattr(socket, "socketpair", fail)
    with pytest.raises(ConfigError, match="can't listen"):
        ShmSource(shared, "s")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ECONNABORTED])
def test_accept_that_fails_is_tried_again(
    shared: SharedPool, target: ShmTarget, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plain, failures = socket.socket.accept, iter([OSError(number, "no")])

    def accept(self: socket.socket) -> Any:
        for failure in failures:
            raise failure
        return plain(self)

    monkeypatch.setattr(socket.socket, "accept", accept)
    source = ShmSource(shared, "s")
    assert target.connect(source.endpoint(), "s", LAYOUT)
    source.close()


# Who is there.


def test_peer_uid_is_what_the_kernel_says() -> None:
    left, right = socket.socketpair()
    assert peer_uid(left) == os.geteuid()
    left.close()
    right.close()


@pytest.mark.parametrize("liar", ["kv-shm-source", "MainThread"])
def test_another_user_is_refused_at_either_end(
    shared: SharedPool, target: ShmTarget, monkeypatch: pytest.MonkeyPatch, liar: str
) -> None:
    def uid(connection: socket.socket) -> int:
        return os.geteuid() + (threading.current_thread().name == liar)

    monkeypatch.setattr(shm, "peer_uid", uid)
    source = ShmSource(shared, "s")
    with pytest.raises((UnavailableError, IncompatibleError)) as caught:
        target.connect(source.endpoint(), "s", LAYOUT)
    assert caught.value.reason == ("PEER_CREDENTIALS" if liar == "MainThread" else "SOURCE_GONE")
    assert source.readers == 0 or liar == "MainThread"
    source.close()


@pytest.mark.parametrize(
    "endpoint",
    [
        b"",
        b"tandem-shm-2:",
        b"tandem-shm-2:" + b"A" * 96,
        b"tandem-shm-2:" + b"0" * 32,
        b"tandem-shm-2:" + b"0" * 97,
        b"tandem-shm-1:" + b"0" * 96,
        b"0" * 109,
        b"tandem-shm-2:" + b"../" * 32,
        b"tandem-shm-2:" + b"0" * 95 + b"\0",
    ],
    ids=repr,
)
def test_malformed_endpoints(target: ShmTarget, endpoint: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        target.connect(endpoint, "s", LAYOUT)
    assert caught.value.field == "open.endpoint"


# Sources that lie.


class Liar:
    """Listens like a source, goes through the handshake and answers with `greeting` and `fds`."""

    def __init__(self, greeting: bytes | None, fds: list[int]) -> None:
        name, self.secret = secrets.token_hex(16), secrets.token_bytes(32)
        self.endpoint = b"tandem-shm-2:" + name.encode() + self.secret.hex().encode()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(b"\0tandem-kv-" + name.encode())
        self.listener.listen(1)
        self.connections: list[socket.socket] = []
        self.thread = threading.Thread(target=self.serve, args=(greeting, fds))
        self.thread.start()

    def serve(self, greeting: bytes | None, fds: list[int]) -> None:
        connection, _ = self.listener.accept()
        self.connections.append(connection)
        if greeting is not None:
            handshake = SourceHandshake(self.secret)
            connection.send(handshake.answer(connection.recv(1000)))
            handshake.answer(connection.recv(1000))
            assert handshake.proven
            socket.send_fds(connection, [greeting], fds)

    def close(self) -> None:
        self.thread.join()
        for sock in (self.listener, *self.connections):
            sock.close()


def memfd(header: bytes = b"", size: int = 0, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("liar", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    os.pwrite(fd, header, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def lie(target: ShmTarget, greeting: bytes | None, fds: list[int]) -> TandemError:
    """The error that a connect to a liar gives; nothing may leak, neither a descriptor nor a map."""
    liar = Liar(greeting, fds)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TandemError) as caught:
        target.connect(liar.endpoint, "s", LAYOUT)
    liar.thread.join()
    after = len(os.listdir("/proc/self/fd")) - len(liar.connections)
    liar.close()
    for fd in fds:
        os.close(fd)
    assert after == before
    assert target.sources == 0
    return caught.value


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (b"", 0),
        (HEADER.pack(MAGIC, 1, 64, 64, 128), 20),
        (b"", 1 << 16),
        (HEADER.pack(b"x" * 8, 1, 64, 64, 128), 192),
        (HEADER.pack(MAGIC, 1, 64, 64, 128), 191),
        (HEADER.pack(MAGIC, 1 << 50, 1 << 50, 64, 1 << 60), 4096),
        (HEADER.pack(MAGIC, (1 << 64) - 1, (1 << 64) - 1, (1 << 64) - 8, (1 << 64) - 1), 4096),
        (HEADER.pack(MAGIC, 1, 64, 0, 128), 4096),
        (HEADER.pack(MAGIC, 1, 64, 65, 128), 4096),
        (HEADER.pack(MAGIC, 9, 64, 64, 128), 4096),
        (HEADER.pack(MAGIC, 0, 64, 64, 128), 4096),
        (HEADER.pack(MAGIC, 1, 0, 64, 128), 4096),
    ],
    ids=[
        "empty",
        "cut",
        "zeros",
        "magic",
        "short",
        "huge",
        "overflow",
        "in the header",
        "odd",
        "overlap",
        "none",
        "0 B",
    ],
)
def test_memory_that_does_not_hold_what_it_says(target: ShmTarget, header: bytes, size: int) -> None:
    error = lie(target, b"TNDMSHM1s", [memfd(header[:size], size)])
    assert error.reason == "UNSAFE_MEMORY"


def test_memory_that_could_shrink_is_refused(target: ShmTarget, tmp_path: Path) -> None:
    header = HEADER.pack(MAGIC, 1, 64, 64, 128)
    assert lie(target, b"TNDMSHM1s", [memfd(header, 192, 0)]).reason == "UNSAFE_MEMORY"
    assert lie(target, b"TNDMSHM1s", [memfd(header, 192, fcntl.F_SEAL_GROW)]).reason == "UNSAFE_MEMORY"
    path = tmp_path / "file"
    path.write_bytes(header.ljust(192, b"\0"))
    on_disk = lie(target, b"TNDMSHM1s", [os.open(path, os.O_RDONLY)])
    device = lie(target, b"TNDMSHM1s", [os.open("/dev/zero", os.O_RDONLY)])
    assert (on_disk.reason, device.reason) == ("UNSAFE_MEMORY", "UNSAFE_MEMORY")


@pytest.mark.parametrize(
    ("greeting", "count"), [(b"hello", 1), (b"TNDMSHM1s", 0), (b"TNDMSHM1s", 2), (b"TNDMSHM1s", 3)]
)
def test_malformed_greetings(target: ShmTarget, greeting: bytes, count: int) -> None:
    assert lie(target, greeting, [memfd() for _ in range(count)]).reason == "UNSAFE_MEMORY"


def test_greeting_of_another_incarnation(target: ShmTarget) -> None:
    assert lie(target, b"TNDMSHM1other", [memfd()]).reason == "STALE_INCARNATION"


def test_a_source_that_says_nothing_is_given_up(target: ShmTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_CONNECT_SECONDS", 0.1)
    assert lie(target, None, []).reason == "SOURCE_GONE"


def test_maps_are_bounded_and_come_again(
    shared: SharedPool, target: ShmTarget, target_pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one used longest ago goes; whoever copies from it goes on, and the next transfer maps it anew."""
    monkeypatch.setattr(shm, "MOST_SOURCES", 2)
    sources = [ShmSource(shared, str(number)) for number in range(3)]
    views = [target.connect(source.endpoint(), source.incarnation, LAYOUT) for source in sources[:2]]
    target.connect(sources[0].endpoint(), "0", LAYOUT)
    target.connect(sources[2].endpoint(), "2", LAYOUT)
    assert target.sources == 2
    eventually(lambda: [source.readers for source in sources] == [1, 0, 1])
    views[1].copy(replace(offer(0), generations=(0,)), target_pool, [0])
    target.connect(sources[1].endpoint(), "1", LAYOUT)
    assert target.sources == 2
    eventually(lambda: [source.readers for source in sources] == [0, 1, 1])
    for source in sources:
        source.close()
    eventually(lambda: target.sources == 0)


def test_map_that_fails_is_an_error(shared: SharedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(shm_map.mmap, "mmap", fail)
        with pytest.raises(UnavailableError):
            map_pool(shared.read_only_fd)
    assert map_pool(shared.read_only_fd).num_blocks == BLOCKS


def test_what_the_reader_maps_is_read_only(shared: SharedPool) -> None:
    view = map_pool(shared.read_only_fd)
    assert view.buffer.readonly
    assert view.generations.readonly


def dial(source: ShmSource) -> tuple[socket.socket, bytes]:
    """A connection to a source, and the secret."""
    digits = source.endpoint().removeprefix(b"tandem-shm-2:")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    connection.connect(b"\0tandem-kv-" + digits[:32])
    return connection, bytes.fromhex(digits[32:].decode())


def is_cut_off(connection: socket.socket) -> bool:
    """Nothing comes but the end; closes the connection."""
    with connection, contextlib.suppress(ConnectionResetError):
        return connection.recv(1000) == b""
    return True


def test_a_reader_that_speaks_is_cut_off(shared: SharedPool, target: ShmTarget) -> None:
    source = ShmSource(shared, "s")
    rude, secret = dial(source)
    handshake = ReaderHandshake(secret)
    rude.send(handshake.hello())
    rude.send(handshake.proof(rude.recv(1000)))
    greeting, fds, _, _ = socket.recv_fds(rude, 100, 1)
    assert (greeting, len(fds)) == (b"TNDMSHM1s", 1)
    os.close(fds[0])
    rude.send(struct.pack("<Q", 1))
    assert is_cut_off(rude)
    assert target.connect(source.endpoint(), "s", LAYOUT)
    source.close()


@pytest.mark.parametrize("words", ["nothing first", "no hello", "a wrong proof", "its own challenge", "a cut proof"])
def test_a_reader_without_the_secret_gets_no_descriptor(shared: SharedPool, target: ShmTarget, words: str) -> None:
    """A process of the same user that found the socket's name: it is cut off, others are served."""
    source = ShmSource(shared, "s")
    connection, secret = dial(source)
    handshake = ReaderHandshake(secrets.token_bytes(32) if words == "a wrong proof" else secret)
    if words == "no hello":
        connection.send(b"TNDMSHM1s")
    elif words != "nothing first":
        connection.send(handshake.hello())
        challenge = connection.recv(1000)
        if words == "its own challenge":
            connection.send(b"TNDMPRF1" + challenge[-32:])
        elif words == "a cut proof":
            connection.send(handshake.proof(challenge)[:-1])
        else:
            with pytest.raises(PermissionDeniedError, match="doesn't know its own secret"):
                handshake.proof(challenge)
            connection.send(b"TNDMPRF1" + secrets.token_bytes(32))
    assert words == "nothing first" or is_cut_off(connection)
    assert target.connect(source.endpoint(), "s", LAYOUT)
    connection.close()
    source.close()


def test_another_process_at_the_sockets_name_is_found_out(target: ShmTarget) -> None:
    """It can listen there once the source is gone, but it doesn't know the secret: nothing is mapped."""
    liar = Liar(b"TNDMSHM1s", [memfd()])
    liar.secret = secrets.token_bytes(32)
    before = threading.excepthook
    threading.excepthook = lambda _: None  # the liar's thread is cut off in the middle
    try:
        with pytest.raises(PermissionDeniedError) as caught:
            target.connect(liar.endpoint, "s", LAYOUT)
        liar.close()
    finally:
        threading.excepthook = before
    assert caught.value.reason == "SHM_HANDSHAKE"
    assert target.sources == 0


def test_idlers_in_the_handshake_are_bounded(
    shared: SharedPool, target: ShmTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever connects and says nothing gives way to those who come later."""
    monkeypatch.setattr(shm, "_MAX_UNPROVEN", 2)
    source = ShmSource(shared, "s")
    idlers = [dial(source)[0] for _ in range(5)]
    assert all(is_cut_off(idler) for idler in idlers[:3])
    assert target.connect(source.endpoint(), "s", LAYOUT)
    for idler in idlers[3:]:
        idler.close()
    eventually(lambda: source.readers == 1)
    source.close()


def test_watcher_forgets_once_and_refuses_after_close() -> None:
    watcher, (left, right) = SocketWatcher("w"), socket.socketpair()
    assert watcher.watch(left, lambda: None)
    watcher.forget(left)
    watcher.forget(left)
    assert len(watcher) == 0
    assert left.fileno() == -1
    watcher.close()
    assert not watcher.watch(right, lambda: None)
    assert right.fileno() == -1
    idle = SocketWatcher("idle")
    idle.close()
    idle.close()
