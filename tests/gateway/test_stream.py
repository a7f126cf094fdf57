"""The buffer between a request and its client."""

from __future__ import annotations

import pytest

from gateway.plain import Delta, Finished
from gateway.stream import EventBuffer, SlowReaderError
from tandem.record import FinishReason, TokenLogprobs


def _delta(index: int, token: int, text: str = "") -> Delta:
    return Delta(index, [token], text, [TokenLogprobs(-float(token))])


async def test_deltas_that_wait_are_joined() -> None:
    """Of one choice, in order, nothing lost; what the writer takes at once stays as it is."""
    buffer = EventBuffer(100)
    for event in (_delta(0, 1, "a"), _delta(0, 2), _delta(0, 3, "b"), _delta(1, 9), Delta(1, [], "c", [])):
        buffer.put(event)
    buffer.put(Finished(1, FinishReason.STOP, None))
    buffer.put(_delta(0, 4, "d"))
    buffer.close()
    assert [event async for event in buffer] == [
        Delta(0, [1, 2, 3], "ab", [TokenLogprobs(-1.0), TokenLogprobs(-2.0), TokenLogprobs(-3.0)]),
        Delta(1, [9], "c", [TokenLogprobs(-9.0)]),
        Finished(1, FinishReason.STOP, None),
        _delta(0, 4, "d"),
    ]


async def test_joined_deltas_count_as_their_tokens() -> None:
    """The bound holds for what waits, and a reader makes room."""
    buffer = EventBuffer(4)
    events = aiter(buffer)
    for token in range(4):
        buffer.put(_delta(0, token))
    assert (await anext(events)) == Delta(0, [0, 1, 2, 3], "", [TokenLogprobs(-float(i)) for i in range(4)])
    # One that came as a whole has room whenever anything has.
    buffer.put(Delta(0, list(range(100)), "", []))
    with pytest.raises(SlowReaderError):
        buffer.put(_delta(0, 5))
    buffer.drop()
    buffer.put(_delta(0, 6))
