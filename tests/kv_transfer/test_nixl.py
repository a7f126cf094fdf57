"""What only NIXL can suffer: reads under way when a copy ends, peers that restart, endpoints that lie, no wheel."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nixl
import pytest

from kv_transfer import nixl, nixl_agent, nixl_copy, nixl_memory, nixl_peer, segments
from kv_transfer.copying import checksums
from kv_transfer.messages import Offer
from kv_transfer.nixl import NixlTarget
from kv_transfer.nixl_endpoint import MAX_BLOCKS, Endpoint
from kv_transfer.nixl_source import NixlSource
from kv_transfer.pool import LocalPool, PoolMemory, SharedPool
from kv_transfer.segments import Segment
from kv_transfer.unsettled import UnsettledError, lent
from tandem.errors import (
    ConfigError,
    IncompatibleError,
    InvalidRequestError,
    OverloadedError,
    StaleError,
    UnavailableError,
)
from tandem.kv_layout import KvLayout

LAYOUT = KvLayout(block_size=4, dtype="float32", num_layers=2, num_kv_heads=3, head_dim=8)
BLOCKS = 8
INSTALLED = nixl_agent.installed()


@pytest.mark.parametrize("wheel", ["the real agent is tested" if INSTALLED else "no NIXL wheel here: only the fake is"])
def test_which_agents_the_contract_is_tested_with(tools: Any, wheel: str) -> None:
    assert ("nixl-real" in tools.NIXL) == wheel.startswith("the real")


@pytest.fixture
def fake(tools: Any, monkeypatch: pytest.MonkeyPatch) -> type[fake_nixl.nixl_agent]:
    """Agents are the fake's."""
    tools.use_fake_nixl(monkeypatch)
    return fake_nixl.nixl_agent


@pytest.fixture
def pool() -> LocalPool:
    return LocalPool(BLOCKS, LAYOUT.block_bytes)


@pytest.fixture
def target(fake: Any) -> Iterator[NixlTarget]:
    made = NixlTarget()
    yield made
    made.close()


def offer(source: PoolMemory, *blocks: int) -> Offer:
    """As a sender makes it."""
    held = tuple(source.generations[block] for block in blocks)
    return Offer(0, 0, 4 * len(blocks), blocks, held, checksums=checksums(source, blocks))


# Reads.


def test_reads_that_take_a_while(fake: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "polls", 5)
    monkeypatch.setattr(nixl_copy, "PIECE_BYTES", 1)
    ends = tools.make_ends("nixl")
    blocks = list(range(tools.NUM_BLOCKS))
    sent = [tools.fill(ends.source_pool, block, block) for block in blocks]
    view = ends.target.connect(ends.source.endpoint(), "source-1", LAYOUT)
    view.copy(offer(ends.source_pool, *blocks), ends.target_pool, blocks[::-1])
    assert [tools.read(ends.target_pool, block) for block in blocks[::-1]] == sent
    tools.close_ends(ends)


def test_no_copy_ends_under_its_reads(fake: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped with reads under way: what was posted has arrived before the blocks may go to somebody else."""
    monkeypatch.setattr(fake, "polls", 5)
    monkeypatch.setattr(nixl_copy, "PIECE_BYTES", 1)
    ends = tools.make_ends("nixl")
    sent = [tools.fill(ends.source_pool, block, block) for block in range(4)]
    view = ends.target.connect(ends.source.endpoint(), "source-1", LAYOUT)
    asked = iter([False, False, True])
    with pytest.raises(StaleError):
        view.copy(offer(ends.source_pool, 0, 1, 2, 3), ends.target_pool, [4, 5, 6, 7], lambda: next(asked))
    assert [tools.read(ends.target_pool, block) for block in (4, 5)] == sent[:2]
    assert tools.read(ends.target_pool, 6) == bytes(LAYOUT.block_bytes)
    tools.close_ends(ends)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", ["before the bytes", "after the bytes"])
def test_generation_that_changes_during_the_reads(
    nixl_ends: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, victim: int, when: str
) -> None:
    plain: Callable[..., None] = nixl_copy.read_blocks

    def with_reuse(*args: Any) -> None:
        if when == "after the bytes":
            plain(*args)
        tools.reuse(nixl_ends.source_pool, victim)
        if when == "before the bytes":
            plain(*args)

    monkeypatch.setattr(nixl_copy, "read_blocks", with_reuse)
    view = nixl_ends.target.connect(nixl_ends.source.endpoint(), "source-1", LAYOUT)
    with pytest.raises(StaleError) as caught:
        view.copy(offer(nixl_ends.source_pool, 0, 1), nixl_ends.target_pool, [0, 1])
    assert caught.value.reason == "STALE_GENERATION"
    # The peer isn't to blame: its next block can be had.
    view.copy(offer(nixl_ends.source_pool, 2), nixl_ends.target_pool, [2])


@pytest.mark.parametrize("page", [1, 3, 5, 32, 64])
@pytest.mark.parametrize("slot_pages", [2, 64])
def test_generations_are_read_page_by_page(
    nixl_ends: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, page: int, slot_pages: int
) -> None:
    monkeypatch.setattr(nixl_peer, "PAGE", page)
    monkeypatch.setattr(nixl_peer, "_SLOT_PAGES", slot_pages)
    generations = nixl_ends.source_pool.generations
    for block in range(tools.NUM_BLOCKS):
        generations[block] = 1000 + block
    view = nixl_ends.target.connect(nixl_ends.source.endpoint(), "source-1", LAYOUT)
    for blocks in ([31, 0, 7, 7], list(range(32))[::-1], [30]):
        assert view._peer.generations.read(blocks) == [1000 + block for block in blocks]


# Memory is registered once.


def test_memory_is_registered_and_cut_once(fake: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("register_memory", "prep_xfer_dlist", "add_remote_agent"):
        plain = getattr(fake, name)
        monkeypatch.setattr(fake, name, lambda *a, plain=plain, name=name: (calls.append(name), plain(*a))[1])
    ends = tools.make_ends("nixl")
    endpoint = ends.source.endpoint()
    for _ in range(3):
        assert ends.source.endpoint() == endpoint
        view = ends.target.connect(endpoint, "source-1", LAYOUT)
        view.copy(offer(ends.source_pool, 0), ends.target_pool, [0])
        view.close()
    # Blocks and generations there; scratch and one pool here; descriptors of both on each side.
    assert calls.count("register_memory") == 4
    assert calls.count("prep_xfer_dlist") == 4
    assert calls.count("add_remote_agent") == 1
    tools.close_ends(ends)


def test_idle_destination_pools_make_room(nixl_ends: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any pool may be a copy's destination; those used longest ago are registered anew when they come again."""
    monkeypatch.setattr(nixl_memory, "MOST_POOLS", 2)
    sent = tools.fill(nixl_ends.source_pool, 3, 9)
    view = nixl_ends.target.connect(nixl_ends.source.endpoint(), "source-1", LAYOUT)
    pools = [LocalPool(BLOCKS, LAYOUT.block_bytes) for _ in range(4)]
    for each in (*pools, *pools):
        each.buffer[:] = bytes(len(each.buffer))
        view.copy(offer(nixl_ends.source_pool, 3), each, [5])
        assert tools.read(each, 5) == sent
    assert len(nixl_ends.target._memory._pools) == 2


def test_a_pool_on_a_gpu_says_so() -> None:
    tensor = SimpleNamespace(
        device=SimpleNamespace(type="cuda", index=3), numel=lambda: 8, element_size=lambda: 2, data_ptr=lambda: 4096
    )
    where = segments.of_pool(SimpleNamespace(tensor=tensor))  # type: ignore[arg-type]
    assert where == Segment(4096, 16, "VRAM", 3)
    endpoint = Endpoint("i", "a", where, 8192, 2, b"metadata")
    assert Endpoint.decode(endpoint.encode()) == endpoint


# Peers that go, come again, and are too many.


def test_a_restarted_peer_is_met_anew(target: NixlTarget, pool: LocalPool, tools: Any) -> None:
    old = NixlSource(pool, "life-1")
    view = target.connect(old.endpoint(), "life-1", LAYOUT)
    view.copy(offer(pool, 0), pool, [1])
    old_endpoint = old.endpoint()
    old.close()
    with pytest.raises(UnavailableError) as caught:
        view.copy(offer(pool, 0), pool, [1])
    assert caught.value.reason == "SOURCE_GONE"
    assert target.sources == 0
    with pytest.raises(UnavailableError):
        view.verify(offer(pool, 0))
    with pytest.raises(UnavailableError):
        target.connect(old_endpoint, "life-1", LAYOUT)
    view.close()
    new = NixlSource(pool, "life-2")
    again = target.connect(new.endpoint(), "life-2", LAYOUT)
    again.copy(offer(pool, 0), pool, [1])
    assert target.sources == 1
    new.close()


def test_lost_peers_that_nobody_reads_from_are_forgotten(target: NixlTarget, pool: LocalPool) -> None:
    for life in ("1", "2", "3"):
        source = NixlSource(pool, life)
        target.connect(source.endpoint(), life, LAYOUT).close()
        assert target.sources == 1
        source.close()


def test_peers_are_bounded(target: NixlTarget, pool: LocalPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "MOST_PEERS", 2)
    sources = [NixlSource(pool, str(i)) for i in range(3)]
    views = [target.connect(source.endpoint(), source.incarnation, LAYOUT) for source in sources[:2]]
    with pytest.raises(OverloadedError):
        target.connect(sources[2].endpoint(), "2", LAYOUT)
    views[0].close()
    target.connect(sources[2].endpoint(), "2", LAYOUT)
    assert target.sources == 2
    views[1].copy(offer(pool, 0), pool, [1])
    for source in sources:
        source.close()


def test_closed_ends_start_nothing(target: NixlTarget, pool: LocalPool) -> None:
    source = NixlSource(pool, "s")
    endpoint = source.endpoint()
    target.close()
    with pytest.raises(UnavailableError) as caught:
        target.connect(endpoint, "s", LAYOUT)
    assert caught.value.reason == "CLOSING"
    source.close()
    with pytest.raises(UnavailableError):
        source.endpoint()


# Endpoints that lie.


def test_an_endpoint_of_anothers_agent_is_refused_and_harms_nobody(target: NixlTarget, pool: LocalPool) -> None:
    honest, liar = NixlSource(pool, "honest"), NixlSource(pool, "liar")
    view = target.connect(honest.endpoint(), "honest", LAYOUT)
    stolen = Endpoint.decode(honest.endpoint())
    lie = replace(Endpoint.decode(liar.endpoint()), metadata=stolen.metadata).encode()
    with pytest.raises(InvalidRequestError, match="another agent"):
        target.connect(lie, "liar", LAYOUT)
    with pytest.raises(IncompatibleError) as caught:
        target.connect(replace(stolen, incarnation="liar").encode(), "liar", LAYOUT)
    assert caught.value.reason == "UNSAFE_MEMORY"
    view.copy(offer(pool, 0), pool, [1])
    honest.close()
    liar.close()


def test_memory_that_was_not_registered_cannot_be_read(target: NixlTarget, pool: LocalPool) -> None:
    source = NixlSource(pool, "s")
    true = Endpoint.decode(source.endpoint())
    lie = replace(true, generations=true.generations + (1 << 30)).encode()
    with pytest.raises(UnavailableError):
        target.connect(lie, "s", LAYOUT)
    assert target.sources == 0
    source.close()


HEAD = fake_nixl.metadata("a", [])
GOOD = Endpoint("i", "a", Segment(4096, 64), 8192, 2, HEAD)


@pytest.mark.parametrize(
    "endpoint",
    [
        b"",
        b"tandem-nixl-1:",
        GOOD.encode()[:-1],
        GOOD.encode() + b"x",
        b"T" + GOOD.encode()[1:],
        replace(GOOD, incarnation="").encode(),
        replace(GOOD, incarnation="i" * 300).encode(),
        replace(GOOD, agent="").encode(),
        replace(GOOD, metadata=b"").encode(),
        replace(GOOD, metadata=b"m" * (1 << 17)).encode(),
        replace(GOOD, num_blocks=0).encode(),
        replace(GOOD, num_blocks=3).encode(),
        replace(GOOD, num_blocks=MAX_BLOCKS + 1, blocks=Segment(4096, MAX_BLOCKS + 1)).encode(),
        replace(GOOD, num_blocks=1 << 63, blocks=Segment(0, 1 << 63)).encode(),
        replace(GOOD, blocks=Segment(4096, 0)).encode(),
        replace(GOOD, blocks=Segment((1 << 64) - 8, 64)).encode(),
        replace(GOOD, generations=(1 << 64) - 8).encode(),
        GOOD.encode()[:14] + b"\x07" + GOOD.encode()[15:],
        replace(GOOD, agent="\x80" * 2).encode().replace("\x80\x80".encode(), b"\xff\xfe\xff\xfe"),
    ],
)
def test_malformed_endpoints(target: NixlTarget, endpoint: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        target.connect(endpoint, "i", LAYOUT)
    assert caught.value.field == "open.endpoint"


@pytest.mark.parametrize(
    "metadata",
    [
        b"metadata",
        HEAD[:11],
        HEAD[:20],
        HEAD.replace(b"Agent", b"agent"),
        HEAD.replace(b"\x01\x00\x00\x00\x00\x00\x00\x00a", b"\x01\x00\x00\x00\x00\x00\x00\x7fa"),
        HEAD.replace(b"\x01\x00\x00\x00\x00\x00\x00\x00|", b"\x09\x00\x00\x00\x00\x00\x00\x00|"),
        HEAD.replace(b"\x01\x00\x00\x00\x00\x00\x00\x00|", b"\x00\x00\x00\x00\x00\x00\x00\x00|"),
        HEAD.replace(b"UCX|", b"UCX!"),
        HEAD[: HEAD.index(b"|[")],
        HEAD[: HEAD.index(b"|[") + 1],
        fake_nixl.metadata("b", []),
    ],
)
def test_malformed_metadata_is_the_senders_fault(target: NixlTarget, metadata: bytes) -> None:
    whole = replace(GOOD, blocks=Segment(4096, 2 * LAYOUT.block_bytes), metadata=metadata)
    with pytest.raises(InvalidRequestError) as caught:
        target.connect(whole.encode(), "i", LAYOUT)
    assert caught.value.field == "open.endpoint"


def test_a_pool_has_no_more_blocks_than_receivers_take(fake: Any) -> None:
    with pytest.raises(ConfigError, match="--block-size"):
        NixlSource(LocalPool(MAX_BLOCKS + 1, 1), "s")


# No wheel, or one that doesn't work.


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, pool: LocalPool) -> None:
    monkeypatch.setattr(nixl_agent, "PACKAGES", ("no_such_nixl",))
    for make in (NixlTarget, lambda: NixlSource(pool, "s"), lambda: nixl_agent.NixlAgent("a"), nixl_agent.load):
        with pytest.raises(ConfigError, match="pip install --no-deps nixl-cu12"):
            make()


def test_a_wheel_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: LocalPool) -> None:
    package = tmp_path / "broken_nixl"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libucp.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(nixl_agent, "PACKAGES", ("broken_nixl",))
    source = NixlSource(pool, "s")
    with pytest.raises(UnavailableError, match=r"libucp\.so is missing"):
        source.endpoint()
    source.close()


def test_an_agent_without_ucx_is_no_agent(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "BACKEND", "UCX")
    plain = fake.__init__

    def init(self: Any, *args: Any) -> None:
        plain(self, *args)
        self.backends = {}

    monkeypatch.setattr(fake, "__init__", init)
    with pytest.raises(ConfigError, match="UCX"):
        nixl_agent.NixlAgent("a")


def test_incarnations_have_a_length(fake: Any, pool: LocalPool) -> None:
    for incarnation in ("", "x" * 300):
        with pytest.raises(ConfigError, match="incarnation"):
            NixlSource(pool, incarnation)


if INSTALLED:
    # Real processes; test_which_agents_the_contract_is_tested_with says in its name whether they are.

    class Worker:
        """The process of nixl_worker.py."""

        def __init__(self, incarnation: str) -> None:
            script = str(Path(__file__).with_name("nixl_worker.py"))
            command = [sys.executable, script, str(BLOCKS), str(LAYOUT.block_bytes), incarnation]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.process.stdout is not None
            self.endpoint = bytes.fromhex(self.process.stdout.readline())

        def reuse(self, block: int) -> None:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(block, file=self.process.stdin, flush=True)
            assert self.process.stdout.readline() == "done\n"

        def kill(self) -> None:
            self.process.kill()
            self.process.communicate()

    def held(*blocks: int) -> Offer:
        sums = tuple(zlib.crc32(bytes([block + 1]) * LAYOUT.block_bytes) for block in blocks)
        return Offer(0, 0, 4 * len(blocks), blocks, tuple(100 + block for block in blocks), checksums=sums)

    def test_another_process_is_read_killed_and_met_again(tools: Any) -> None:
        target, into = NixlTarget(), SharedPool(BLOCKS, LAYOUT.block_bytes)
        for life in ("life-1", "life-2"):
            worker = Worker(life)
            view = target.connect(worker.endpoint, life, LAYOUT)
            view.copy(held(2, 1, 3), into, [0, 5, 6])
            assert [tools.read(into, block)[:1] for block in (0, 5, 6)] == [b"\x03", b"\x02", b"\x04"]
            worker.reuse(2)
            with pytest.raises(StaleError):
                view.verify(held(2))
            worker.kill()
            with pytest.raises(UnavailableError) as caught:
                view.copy(held(1), into, [7])
            assert caught.value.reason == "SOURCE_GONE"
            assert target.sources == 0
            view.close()
        target.close()
        into.close()

    def test_a_stopped_process_holds_nobody_up_and_writes_before_its_blocks_are_free(
        tools: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Over TCP: within one machine the system copies, whatever the other process does."""
        monkeypatch.setenv("UCX_TLS", "tcp")
        monkeypatch.setattr(nixl_peer, "READ_SECONDS", 0.3)
        target, into, worker = NixlTarget(), SharedPool(BLOCKS, LAYOUT.block_bytes), Worker("life-1")
        view = target.connect(worker.endpoint, "life-1", LAYOUT)
        view.copy(held(1), into, [0])
        seen: list[bytes] = []
        free = threading.Event()

        def give_back() -> None:
            seen.append(tools.read(into, 5))
            free.set()

        plain = nixl_copy.read_blocks

        def of_a_stopped_process(*args: Any) -> Any:
            worker.process.send_signal(signal.SIGSTOP)
            return plain(*args)

        monkeypatch.setattr(nixl_copy, "read_blocks", of_a_stopped_process)
        with pytest.raises(UnsettledError) as caught, lent(give_back):
            view.copy(held(2), into, [5])
        assert caught.value.reason == "SOURCE_SILENT"
        assert not free.is_set()
        monkeypatch.setattr(nixl_copy, "read_blocks", plain)
        worker.process.send_signal(signal.SIGCONT)
        assert free.wait(20)
        assert seen == [b"\x03" * LAYOUT.block_bytes]
        again = target.connect(worker.endpoint, "life-1", LAYOUT)
        again.copy(held(3), into, [6])
        worker.kill()
        target.close()
        into.close()

    def test_closing_does_not_wait_for_a_stopped_process(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")
        monkeypatch.setattr(nixl_peer, "READ_SECONDS", 0.3)
        target, into, worker = NixlTarget(), SharedPool(BLOCKS, LAYOUT.block_bytes), Worker("life-1")
        view = target.connect(worker.endpoint, "life-1", LAYOUT)
        worker.process.send_signal(signal.SIGSTOP)
        free = threading.Event()
        with pytest.raises(UnsettledError), lent(free.set):
            view.copy(held(2), into, [5])
        closing = threading.Thread(target=target.close, daemon=True)
        closing.start()
        closing.join(20)
        assert free.is_set()
        assert not closing.is_alive()
        worker.kill()
        into.close()

    def test_nothing_is_said_on_stdout(tmp_path: Path) -> None:
        """It belongs to the worker, whose first line there is read by whoever started it."""
        code = "from kv_transfer.nixl_agent import NixlAgent as A; a = A('a'); a.close()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", "")
