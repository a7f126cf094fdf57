"""Both clients against a fake gateway."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

import tandem
from tandem import errors
from tandem.client import AsyncClient, Client, Delta, End, Finished, PromptAccepted
from tandem.record import FinishReason, TokenLogprobs

HELLO = [{"role": "system", "content": "s"}, {"role": "user", "content": "one two"}]


@pytest.fixture(params=["blocking", "async"])
def call(request: pytest.FixtureRequest, fake_gateway: Any) -> Any:
    """`call(method, *args, **options)` on either client; streams come as lists."""

    def blocking(method: str, *args: Any, **options: Any) -> Any:
        with Client(fake_gateway[1], timeout=20) as client:
            result = getattr(client, method)(*args, **options)
            return list(result) if method == "stream" else result

    def asynchronous(method: str, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(fake_gateway[1], timeout=20) as client:
                result = getattr(client, method)(*args, **options)
                return [event async for event in result] if method == "stream" else await result

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


def test_generate(call: Any) -> None:
    """Typed, whole."""
    result = call("generate", "one two", max_tokens=4)
    assert (result.text, result.token_ids, result.finish_reason) == ("one two ", (0, 1), FinishReason.STOP)
    assert (result.usage.prompt_tokens, result.usage.cached_tokens, result.usage.completion_tokens) == (3, 1, 2)
    assert result.choices[0].stop_match == "x"
    assert result.timings.migrations == 0


def test_stream(call: Any) -> None:
    """First the prompt, then deltas with log probabilities, finished, end."""
    events = call("stream", "one two")
    assert [type(event) for event in events] == [PromptAccepted, Delta, Delta, Finished, End]
    assert events[0] == PromptAccepted("r", "fake", 2, 7)
    assert events[2] == Delta(0, "two ", (1,), (TokenLogprobs(-0.5, (1, 9), (-0.5, -1.5)),))
    assert events[3].finish_reason is FinishReason.LENGTH


def test_inputs(call: Any, fake_gateway: Any) -> None:
    """Text, token ids, messages."""
    assert call("generate", token_ids=[5, 6]).text == "<5><6>"
    assert call("chat", HELLO).text == "one two "
    assert call("tokenize", "a b c") == [0, 1, 2]
    assert call("tokenize", messages=HELLO) == [0, 1]
    assert call("detokenize", [7, 8]) == "7 8"
    (model,) = call("models")
    assert (model.name, model.max_context, model.eos_token_ids) == ("fake", 10, (2,))


def test_options_reach_the_wire(call: Any, fake_gateway: Any) -> None:
    """Set ones are set, absent ones absent: zero is a value."""
    call(
        "generate",
        "x",
        temperature=0.0,
        top_k=3,
        logit_bias={7: -1.5},
        seed=2**63,
        n=2,
        stop="end",
        stop_token_ids=[4],
        ignore_eos=False,
        logprobs=0,
        priority=-1,
        request_id="mine",
        model="m",
    )
    sent = fake_gateway[0].requests[-1]
    assert sent.sampling.HasField("temperature")
    assert not sent.sampling.HasField("top_p")
    assert dict(sent.sampling.logit_bias) == {7: -1.5}
    assert sent.sampling.seed == 2**63
    assert list(sent.stopping.stop) == ["end"]
    assert sent.stopping.HasField("ignore_eos")
    assert sent.output.HasField("logprobs")
    assert (sent.priority, sent.request_id, sent.model) == (-1, "mine", "m")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "input"),
        ({"prompt": "a", "token_ids": [1]}, "input"),
        ({"prompt": "a", "temprature": 1.0}, "temprature"),
        ({"prompt": "a", "seed": -1}, "sampling.seed"),
        ({"prompt": "a", "max_tokens": "many"}, "stopping.max_tokens"),
        ({"prompt": "a", "priority": 0.5}, "priority"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"messages": [{"role": "user"}]}, "messages.messages[0]"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.messages[0]"),
        ({"messages": ["hello"]}, "messages.messages[0]"),
        ({"prompt": "a", "timeout": math.nan}, "timeout"),
        ({"prompt": "broken \ud800"}, "text"),
    ],
)
def test_what_cannot_be_sent(call: Any, arguments: dict[str, Any], field: str) -> None:
    """Refused before anything is sent, and the field is named, as the server would."""
    with pytest.raises(errors.InvalidRequestError) as caught:
        call("generate", **arguments)
    assert caught.value.field == field


def test_what_cannot_be_tokenized(call: Any) -> None:
    """The same of the two smaller calls."""
    for method, argument in (("tokenize", "broken \ud800"), ("detokenize", [-1]), ("detokenize", ["a"])):
        with pytest.raises(errors.InvalidRequestError):
            call(method, argument)


@pytest.mark.parametrize("timeout", [math.inf, 1e12])
def test_long_timeouts_are_no_short_ones(call: Any, timeout: float) -> None:
    """gRPC's clock overflows there."""
    assert call("generate", "one two", timeout=timeout).text


def test_server_errors_come_back_as_they_were(call: Any, fake_gateway: Any) -> None:
    """Unary and streamed."""
    fake_gateway[0].fail = lambda n: errors.OverloadedError("full", retry_after=3.0)
    for method in ("generate", "stream", "models"):
        with pytest.raises(errors.OverloadedError, match="full") as caught:
            call(method, *([] if method == "models" else ["x"]))
        assert caught.value.retry_after == 3.0


def test_unavailable_is_retried_before_the_answer_begins(call: Any, fake_gateway: Any) -> None:
    """Two refusals, then the answer."""
    servicer = fake_gateway[0]
    for method in ("generate", "stream"):
        before = len(servicer.requests)
        servicer.fail = lambda n, before=before: (
            errors.UnavailableError("not yet", retry_after=0.01) if n - before < 3 else None
        )
        assert call(method, "one")
        assert len(servicer.requests) - before == 3


def test_other_errors_are_not_retried(call: Any, fake_gateway: Any) -> None:
    """A full server is not asked again by itself."""
    fake_gateway[0].fail = lambda n: errors.OverloadedError("full")
    with pytest.raises(errors.OverloadedError):
        call("generate", "x")
    assert len(fake_gateway[0].requests) == 1


def test_timeout(call: Any, fake_gateway: Any) -> None:
    """The call's own, in place of the client's; the server's work is cancelled."""
    fake_gateway[0].hang = True
    with pytest.raises(errors.DeadlineError):
        call("generate", "x", timeout=0.3)
    assert fake_gateway[0].cancelled.wait(10)


def test_nobody_there() -> None:
    """UnavailableError, not a hang."""
    with Client("127.0.0.1:9", timeout=10) as client, pytest.raises(errors.UnavailableError):
        client.generate("x")


def test_leaving_a_stream_cancels_it(fake_gateway: Any) -> None:
    """The server's handler ends."""
    fake_gateway[0].hang = True
    with Client(fake_gateway[1]) as client, client.stream("one") as events:
        assert isinstance(next(events), PromptAccepted)
        assert isinstance(next(events), Delta)
    assert fake_gateway[0].cancelled.wait(10)
    assert list(events) == []


async def test_leaving_an_async_stream_cancels_it(fake_gateway: Any) -> None:
    """Also when the task is cancelled."""
    fake_gateway[0].hang = True
    async with AsyncClient(fake_gateway[1]) as client:

        async def read() -> None:
            async with client.stream("one") as events:
                async for _event in events:
                    pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.3)  # so that the stream stands
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake_gateway[0].cancelled.wait, 10)


async def test_closing_an_async_stream_ends_its_reader(fake_gateway: Any) -> None:
    """Another task's loop ends; that task isn't cancelled."""
    fake_gateway[0].hang = True
    async with AsyncClient(fake_gateway[1]) as client:
        stream = client.stream("one")
        begun = asyncio.Event()

        async def read() -> int:
            count = 0
            async for _event in stream:
                begun.set()
                count += 1
            return count

        task = asyncio.create_task(read())
        await begun.wait()
        await stream.close()
        assert await task >= 1
        assert [event async for event in stream] == []


def test_top_level_names() -> None:
    """`from tandem import Client, AsyncClient`, lazily."""
    assert tandem.Client is Client
    assert tandem.AsyncClient is AsyncClient
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = tandem.nothing_such
