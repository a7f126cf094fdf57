"""Both clients with several gateways, of which some are lost."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tandem import errors
from tandem.client import AsyncClient, Client, Delta, End, Finished, PromptAccepted, going_on

WORDS = "one twö three four"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other closely."""
    monkeypatch.setattr(going_on, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(going_on, "LONGEST_PAUSE", 0.01)


@pytest.fixture(params=["blocking", "async"])
def call(request: pytest.FixtureRequest, fake_gateways: Any) -> Any:
    """`call(method, *args, **options)` on either client of both gateways; streams come as lists."""
    addresses = [address for _, address in fake_gateways]

    def settings(options: dict[str, Any]) -> dict[str, Any]:
        given = {name: options.pop(name) for name in ("addresses", "tries") if name in options}
        return {"addresses": addresses, "timeout": 20, **given}

    def blocking(method: str, *args: Any, **options: Any) -> Any:
        with Client(**settings(options)) as client:
            result = getattr(client, method)(*args, **options)
            return list(result) if method == "stream" else result

    def asynchronous(method: str, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(**settings(options)) as client:
                result = getattr(client, method)(*args, **options)
                return [event async for event in result] if method == "stream" else await result

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


@pytest.mark.parametrize("cut", range(7))
def test_another_gateway_goes_on(call: Any, fake_gateways: Any, cut: int) -> None:
    """Whatever had come: each event once, in order; the second is told what the client has."""
    (first, _), (second, _) = fake_gateways
    first.cuts = [cut]
    events = call("stream", WORDS)
    assert [type(event) for event in events] == [PromptAccepted, *[Delta] * 4, Finished, End]
    assert "".join(event.text for event in events if isinstance(event, Delta)) == WORDS + " "
    (asked,), (resumed,) = first.requests, second.requests
    assert asked.request_id == resumed.request_id != ""
    assert not asked.HasField("resume")
    assert resumed.HasField("resume")
    if cut == 0:
        assert not resumed.resume.outputs
        return
    (output,) = resumed.resume.outputs
    given = WORDS.split()[: min(cut - 1, 4)]
    assert list(output.token_ids) == list(range(len(given)))
    assert output.text_bytes == len("".join(word + " " for word in given).encode())
    assert resumed.resume.seed == 7
    assert bool(output.finish_reason) == (cut > 5)


def test_the_same_gateway_goes_on_too(call: Any, fake_gateways: Any) -> None:
    """One address is enough; the count of tries begins again with each token."""
    servicer, address = fake_gateways[0]
    servicer.cuts = [2] * 3
    events = call("stream", WORDS, addresses=[address])
    assert "".join(event.text for event in events if isinstance(event, Delta)) == WORDS + " "
    assert len(servicer.requests) == 4


def test_tries_are_bounded(call: Any, fake_gateways: Any) -> None:
    """Gateways that bring nothing new end the stream."""
    for servicer, _ in fake_gateways:
        servicer.cuts = [1] * 100
    with pytest.raises(errors.UnavailableError, match="Socket closed"):
        call("stream", WORDS)
    assert sum(len(servicer.requests) for servicer, _ in fake_gateways) == going_on.RESUMES
    with pytest.raises(errors.UnavailableError):
        call("stream", WORDS, tries=3)
    assert sum(len(servicer.requests) for servicer, _ in fake_gateways) == going_on.RESUMES + 3


def test_the_deadline_bounds_them_too(call: Any, fake_gateways: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause goes past it."""
    monkeypatch.setattr(going_on, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(going_on, "LONGEST_PAUSE", 60.0)
    fake_gateways[0][0].cuts = [1]
    with pytest.raises(errors.DeadlineError, match="Socket closed"):
        call("stream", WORDS, timeout=10)


def test_what_the_gateway_says_itself_is_final(call: Any, fake_gateways: Any) -> None:
    """Another would say the same of the request; but UNAVAILABLE it may not be."""
    (first, _), (second, _) = fake_gateways
    first.fail = lambda n: errors.InternalError("aboard two workers that died", reason="POISON_REQUEST")
    with pytest.raises(errors.InternalError):
        call("stream", WORDS)
    assert not second.requests
    first.fail = lambda n: errors.DrainingError("about to stop")
    assert call("stream", WORDS)
    assert len(second.requests) == 1


def test_a_full_queue_is_waited_for_once_a_stream_has_begun(call: Any, fake_gateways: Any) -> None:
    """Where the gateway says when to come again; what the caller has would be lost. Before that, it is told at once."""
    (first, _), (second, _) = fake_gateways
    first.cuts = [3]
    second.fail = lambda n: errors.OverloadedError("full", retry_after=0.01) if n == 1 else None
    first.fail = lambda n: errors.OverloadedError("full", retry_after=0.01) if n == 2 else None
    events = call("stream", WORDS)
    assert "".join(event.text for event in events if isinstance(event, Delta)) == WORDS + " "
    assert (len(first.requests), len(second.requests)) == (2, 2)
    second.cuts = [3]
    first.fail = lambda n: errors.OverloadedError("never", retry_after=None)
    with pytest.raises(errors.OverloadedError, match="never"):
        call("stream", WORDS, addresses=[fake_gateways[1][1], fake_gateways[0][1]])


@pytest.mark.parametrize("alone", [True, False])
def test_the_pause_is_what_the_gateway_asks_for(call: Any, fake_gateways: Any, alone: bool) -> None:
    """Never less, nor past the deadline. But a gateway that drains doesn't speak for the next."""
    fake_gateways[0][0].fail = lambda n: errors.DrainingError("about to stop", retry_after=60)
    if not alone:
        assert call("stream", WORDS)
        fake_gateways[0][0].fail = lambda n: errors.UnavailableError("about to stop", retry_after=60)
    with pytest.raises(errors.DeadlineError, match="about to stop"):
        call("stream", WORDS, **({"addresses": [fake_gateways[0][1]]} if alone else {}))


@pytest.mark.parametrize("which", [0, 1])
def test_gateways_that_cannot_resume(call: Any, fake_gateways: Any, which: int) -> None:
    """Of a version before: nothing is given twice, and no other tokens are drawn."""
    fake_gateways[0][0].cuts = [2]
    fake_gateways[which][0].seed = None
    with pytest.raises(errors.UnavailableError if which == 0 else errors.IncompatibleError):
        call("stream", WORDS)


def test_calls_that_answer_at_once(call: Any, fake_gateways: Any) -> None:
    """They begin again at the next gateway, and stay there."""
    addresses = ["127.0.0.1:9", fake_gateways[1][1]]
    assert call("generate", WORDS, addresses=addresses).text == WORDS + " "
    assert call("models", addresses=addresses)
    assert fake_gateways[1][0].requests[0].HasField("resume"), "an old one under its id would be in its way"


def test_a_repeated_call_keeps_its_id(call: Any, fake_gateways: Any) -> None:
    """Chosen before the first try, so that a run which still lives ends when the next begins."""
    servicer, address = fake_gateways[0]
    servicer.fail = lambda n: errors.UnavailableError("not yet", retry_after=0.01) if n == 1 else None
    for given in (None, "mine"):
        servicer.requests.clear()
        call("generate", WORDS, addresses=[address], request_id=given)
        first, second = servicer.requests
        assert first.request_id == second.request_id != ""
        assert not first.HasField("resume")
        assert given in (None, second.request_id)


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Tries follow each other after an hour. Set when somebody is about to pause."""
    paused, pause_after = threading.Event(), going_on.Tries.pause_after

    def tell(*args: Any, **options: Any) -> float:
        pause_after(*args, **options)
        paused.set()
        return 3600.0

    monkeypatch.setattr(going_on.Tries, "pause_after", tell)
    return paused


@pytest.mark.parametrize("method", ["stream", "generate"])
def test_closing_a_client_ends_what_pauses(fake_gateways: Any, long_pauses: threading.Event, method: str) -> None:
    """At once, with an error of ours; in the thread that waits."""
    servicer, _ = fake_gateways[0]
    servicer.cuts = [1]
    client = Client(fake_gateways[0][1] if method == "stream" else "127.0.0.1:9")
    ends: list[BaseException] = []

    def wait_for_it() -> None:
        try:
            list(getattr(client, method)(WORDS))
        except errors.TandemError as error:
            ends.append(error)

    reader = threading.Thread(target=wait_for_it, daemon=True)
    reader.start()
    assert long_pauses.wait(20)
    client.close()
    reader.join(20)
    (error,) = ends
    assert isinstance(error, errors.RequestCancelledError)
    with pytest.raises(errors.RequestCancelledError, match="closed"):
        client.models()


@pytest.mark.parametrize("method", ["stream", "generate"])
async def test_closing_an_async_client_ends_what_pauses(
    fake_gateways: Any, long_pauses: threading.Event, method: str
) -> None:
    """The same."""
    servicer, _ = fake_gateways[0]
    servicer.cuts = [1]
    client = AsyncClient(fake_gateways[0][1] if method == "stream" else "127.0.0.1:9")

    async def read() -> None:
        if method == "generate":
            await client.generate(WORDS)
        async for _event in client.stream(WORDS):
            pass

    reader = asyncio.create_task(read())
    assert await asyncio.to_thread(long_pauses.wait, 20)
    await client.close()
    with pytest.raises(errors.RequestCancelledError, match="closed"):
        await asyncio.wait_for(reader, 20)
    with pytest.raises(errors.RequestCancelledError, match="closed"):
        await client.models()


def test_closing_one_stream_leaves_the_others_pausing(fake_gateways: Any, long_pauses: threading.Event) -> None:
    servicer, address = fake_gateways[0]
    servicer.cuts = [1, 1]
    with Client(address) as client:
        stream, other = client.stream(WORDS), client.stream(WORDS)
        readers = [threading.Thread(target=lambda one=one: list(one), daemon=True) for one in (stream, other)]
        readers[0].start()
        assert long_pauses.wait(20)
        stream.close()
        readers[0].join(20)
        assert not readers[0].is_alive()
        assert not client._route.closed
        other.close()


def test_nobody_anywhere(call: Any) -> None:
    with pytest.raises(errors.UnavailableError):
        call("generate", "x", addresses=["127.0.0.1:9", "127.0.0.1:10", "127.0.0.1:11"])


def test_no_addresses() -> None:
    with pytest.raises(errors.ConfigError, match="addresses"):
        Client(addresses=[])
    with pytest.raises(errors.ConfigError, match="tries"):
        Client(tries=0)
