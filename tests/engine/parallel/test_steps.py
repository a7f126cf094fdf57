"""What goes over the line between ranks: steps, memory, and the ends; without a process group."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Batch, SampleSpec, Slice
from engine.parallel import line
from engine.parallel.group import Ranks
from engine.parallel.step import Step, Way, decode, encode, step_of
from engine.parallel.world import World
from kv_transfer.pool import SharedPool, map_lent
from tandem.errors import ConfigError, InternalError
from tandem.record import SamplingParams

SPEC = SampleSpec(0, SamplingParams(temperature=0.0), 0)


class EndedError(Exception):
    """In place of a process's end."""


def fail(problem: str) -> NoReturn:
    """In place of `end_process`."""
    raise EndedError(problem)


@pytest.fixture
def pair() -> Iterator[tuple[Ranks, Ranks]]:
    """Rank 0 and rank 1."""
    ends = socket.socketpair()
    ranks = [Ranks(World(rank, 2, rank, "127.0.0.1", 1), [end], fail) for rank, end in enumerate(ends)]
    with ExitStack() as stack:
        for end in ends:
            stack.callback(end.close)
        for one in ranks:
            stack.callback(one.close)
        yield ranks[0], ranks[1]


def batch() -> Batch:
    """A chunk of a prompt, a decode row with drafts, and copies."""
    slices = [Slice("a", [5, 6, 7], 4, [3, 1]), Slice("b", [9, 2, 2], 9, [0, 2, 5], [SPEC] * 3, drafts=2)]
    return Batch(slices, [(3, 4), (4, 1)])


def same(one: Step, other: Step) -> bool:
    fields = ("token_ids", "positions", "slots", "block_tables", "query_starts", "context_lens")
    pairs = [(getattr(one.placing, name), getattr(other.placing, name)) for name in fields] if one.placing else []
    pairs.append((one.rows, other.rows))
    return list(one.copies) == list(other.copies) and all(
        a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b) for a, b in pairs
    )


@pytest.mark.parametrize("sent", [batch(), Batch([], [(1, 2)]), Batch(batch().slices[:1])])
def test_a_step_arrives_as_it_was(sent: Batch) -> None:
    step = step_of(sent, 4)
    assert same(step, decode(bytearray(encode(step))))
    for way in Way:
        assert decode(bytearray(encode(replace(step, way=way)))).way is way


@given(st.data())
def test_what_is_no_step_is_refused(data: Any) -> None:
    message = bytearray(encode(step_of(batch(), 4)))
    if data.draw(st.booleans()):
        decoded = message[: data.draw(st.integers(0, len(message) - 1))]
    else:
        at = data.draw(st.integers(0, 63))  # the header
        decoded = bytearray(message)
        decoded[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(InternalError):
        decode(decoded)


def test_steps_come_in_order_until_the_end(pair: tuple[Ranks, Ranks]) -> None:
    leader, other = pair
    other.agree(b"alike")
    leader.agree(b"alike")
    leader.ready()
    leader.send(b"first")
    leader.send(b"second")
    leader.close()
    assert [other.receive(), other.receive(), other.receive()] == [b"first", b"second", None]


def test_what_holds_the_group_is_released_once_when_it_ends(pair: tuple[Ranks, Ranks]) -> None:
    leader, _ = pair
    released: list[str] = []
    leader.at_close(lambda: released.append("graphs"))
    leader.close()
    leader.close()
    assert released == ["graphs"]


def test_who_loaded_something_else_is_named(pair: tuple[Ranks, Ranks]) -> None:
    leader, other = pair
    other.agree(b"other")
    with pytest.raises(ConfigError, match="rank 1 was started with other flags"):
        leader.agree(b"alike")


def test_a_rank_that_ends_while_it_loads_is_named(pair: tuple[Ranks, Ranks]) -> None:
    leader, other = pair
    other.close()
    with pytest.raises(ConfigError, match="rank 1 ended while it loaded"):
        leader.agree(b"alike")
    with pytest.raises(ConfigError, match="rank 1 ended while it loaded"):
        leader.lend(1, 0)


def test_a_leader_that_ends_is_named(pair: tuple[Ranks, Ranks]) -> None:
    leader, other = pair
    leader.close()
    with pytest.raises(ConfigError, match="rank 1: rank 0 ended while it loaded"):
        other.borrow(lambda fd: memoryview(b""))
    with pytest.raises(EndedError, match="rank 0 has ended"):
        other.receive()


def test_a_rank_that_ends_is_noticed_while_nothing_is_sent(pair: tuple[Ranks, Ranks]) -> None:
    leader, other = pair
    noticed, said = threading.Event(), []

    def note(problem: str) -> None:
        said.append(problem)
        noticed.set()

    leader.fail = note  # type: ignore[assignment]
    other.agree(b"alike")
    leader.agree(b"alike")
    leader.ready()
    other.close()
    assert noticed.wait(20)
    assert "rank 1 of 2 has ended" in said[0]


def test_memory_is_lent_before_it_is_sealed(pair: tuple[Ranks, Ranks]) -> None:
    leader, other = pair
    found: list[memoryview] = []
    borrowing = threading.Thread(target=lambda: found.append(other.borrow(lambda fd: map_lent(fd, 3, 100))))
    borrowing.start()
    pool = SharedPool(3, 100, lambda fd: leader.lend(1, fd))
    borrowing.join()
    found[0][150] = 7
    pool.buffer[299] = 9
    assert (pool.buffer[150], found[0][299], len(found[0])) == (7, 9, 300)
    with pytest.raises(ConfigError, match="can't reserve"):
        map_lent(pool.read_only_fd, 3, 100)
    with pytest.raises(ConfigError, match="lent"):
        map_lent(pool.read_only_fd, 4000, 100)
    pool.close()


def test_ranks_find_each_other_and_nobody_else() -> None:
    name = os.urandom(line.NAME_BYTES)
    listener = line.listen(name, 3)
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.connect("\0tandem-ranks-" + name.hex())
    line.send(stranger, bytes([7]))
    calls = [line.call_leader(name, rank) for rank in (2, 1)]
    lines = line.accept_ranks(listener, 3)
    for rank, one in enumerate(lines, 1):
        line.send(one, bytes([rank]))
    assert [line.receive(call) for call in calls] == [bytes([2]), bytes([1])]
    assert line.receive(stranger) is None
    line.close_all([listener, stranger, *calls, *lines])


def test_a_message_over_the_limit_is_refused() -> None:
    one, other = socket.socketpair()
    one.sendall((line.MOST_BYTES + 1).to_bytes(4, "little"))
    assert line.receive(other) is None
    line.close_all([one, other])
