"""Requests that another gateway, or another connection, began."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from gateway_fakes import Cluster, Front, expected, text_of, tokens_of, until

from gateway.config import Limits
from gateway.convert import asked
from gateway.live import LiveRequests
from gateway.tokenizer import Tokenizer
from tandem.errors import InvalidRequestError, StaleError
from tandem.service.status import from_rpc_error
from tandem.v1 import inference_pb2, types_pb2

Responses = list[inference_pb2.GenerateStreamResponse]


def resume_from(responses: Sequence[Any], n: int = 1) -> inference_pb2.Resume:
    """What a client that has `responses` asks for."""
    if not responses:
        return inference_pb2.Resume()
    prompt = responses[0].prompt
    outputs = [
        inference_pb2.ResumeOutput(
            token_ids=tokens_of(responses, i),
            text_bytes=len(text_of(responses, i).encode()),
            finish_reason=_end(responses, i),
        )
        for i in range(n)
    ]
    return inference_pb2.Resume(
        outputs=outputs, seed=prompt.seed, model_id=prompt.model_id, numerics_id=prompt.numerics_id
    )


def _end(responses: Sequence[Any], index: int) -> Any:
    ends = [r.finished for r in responses if r.WhichOneof("event") == "finished" and r.finished.index == index]
    return ends[0].finish_reason if ends else types_pb2.FINISH_REASON_UNSPECIFIED


def _whole(responses: Sequence[Any], n: int = 1) -> Any:
    ends = sorted((r.finished for r in responses if r.WhichOneof("event") == "finished"), key=lambda end: end.index)
    return [(tokens_of(responses, i), text_of(responses, i)) for i in range(n)], ends


async def _each_cut(front: Front, other: Front, n: int, **request: Any) -> Responses:
    """Runs once undisturbed, then for each place where the stream can break goes on at the other gateway."""
    whole: Responses = await front.collect(front.stream(request_id="r", **request))
    for cut in range(len(whole)):
        given = whole[:cut]
        rest = await other.collect(other.stream(request_id="r", resume=resume_from(given, n), **request))
        assert rest[0].WhichOneof("event") == "prompt"
        assert _whole([*given, *rest[1 if given else 0 :]], n) == _whole(whole, n), cut
        assert rest[-1].end.usage.completion_tokens == whole[-1].end.usage.completion_tokens, cut
    return whole


async def test_another_gateway_goes_on_wherever_the_stream_broke(
    cluster: Cluster, serve: Any, tokenizer: Tokenizer
) -> None:
    """Characters cut in half, text that is held back for a stop string, the flush at the end, the end itself."""
    script = tokenizer.encode("a 🦜 b ENx 🦜 c EN", add_special=False)
    pieces = [tokenizer.token_bytes(token, skip_special=True) for token in script]
    assert any(b"\xf0" in piece and "🦜".encode() not in piece for piece in pieces), "the parrot must be cut"
    await cluster.start(script=[script])
    cluster.decode[0].pause = 0.002  # a response each, so that there is a place to cut
    front, other = await serve(), await serve()
    stopping = {"stop": ["END"]}
    whole = await _each_cut(front, other, 1, tokens=len(script), stopping=stopping)
    assert text_of(whole) == "a 🦜 b ENx 🦜 c EN"
    assert len(whole) > len(script)


async def test_a_stop_string_over_the_cut(cluster: Cluster, serve: Any, tokenizer: Tokenizer) -> None:
    """The match may begin in what the client has and end in what it lacks, or be there without its end."""
    script = tokenizer.encode("one two END three four five", add_special=False)
    await cluster.start(script=[script])
    cluster.decode[0].pause = 0.002
    front, other = await serve(), await serve()
    whole = await _each_cut(front, other, 1, tokens=len(script), stopping={"stop": ["o END th"]})
    assert text_of(whole) == "one tw"
    assert whole[-2].finished.stop_match == "o END th"


async def test_choices_and_logprobs(cluster: Cluster, serve: Any) -> None:
    """Several outputs, one of which may be over already."""
    await cluster.start()
    cluster.decode[0].pause = 0.002
    front, other = await serve(), await serve()
    more = {"sampling": types_pb2.SamplingParams(n=2), "output": inference_pb2.OutputParams(logprobs=2)}
    await _each_cut(front, other, 2, tokens=5, **more)
    records = [record for record in cluster.decode[0].records if record.outputs[0].token_ids]
    assert records
    for record in records:
        for output in record.outputs:
            assert len(output.logprobs.token_logprobs) == len(output.token_ids), "parallel, as a record promises"


async def test_the_drawn_seed_goes_on(cluster: Cluster, serve: Any) -> None:
    """In the first event, and in the record of who goes on. Usage counts all, metrics what ran here."""
    await cluster.start()
    front, other = await serve(), await serve()
    whole = await front.collect(front.stream())
    seed = cluster.decode[0].records[0].sampling.seed
    assert whole[0].prompt.HasField("seed")
    assert whole[0].prompt.seed == seed
    given = resume_from(whole[:1])
    given.outputs[0].token_ids.extend(expected(3))
    rest = await other.collect(other.stream(resume=given))
    assert cluster.decode[0].records[1].sampling.seed == seed
    assert tokens_of(rest) == expected(8)[3:]
    assert rest[-1].end.usage.completion_tokens == 8
    counted = other.gateway.metrics.registry.get_sample_value("tandem_generation_tokens_total", {"role": "gateway"})
    assert counted == 5


async def test_an_answer_at_once_holds_what_comes_after(cluster: Cluster, serve: Any) -> None:
    await cluster.start()
    front = await serve()
    given = inference_pb2.Resume(outputs=[inference_pb2.ResumeOutput(token_ids=expected(6))], seed=1)
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=range(9)), stopping=types_pb2.StoppingParams(max_tokens=8), resume=given
    )
    response = await front.stub.Generate(request)
    assert list(response.choices[0].token_ids) == expected(8)[6:]
    assert response.usage.completion_tokens == 8


async def test_a_long_output_is_replayed_off_the_loop(cluster: Cluster, serve: Any) -> None:
    await cluster.start()
    front = await serve()
    given = inference_pb2.Resume(outputs=[inference_pb2.ResumeOutput(token_ids=expected(3000))], seed=1)
    assert tokens_of(await front.collect(front.stream(tokens=3002, resume=given))) == expected(3002)[3000:]


async def test_a_resumed_request_takes_over_from_its_old_connection(cluster: Cluster, serve: Any) -> None:
    """The old one, whose client may be long gone, ends ABORTED and its worker is free; only one goes on."""
    await cluster.start(prefill=0)
    worker = cluster.decode[0]
    worker.stream_pause_after = 2
    front = await serve()
    old = front.stream(request_id="same")
    given = [await old.read() for _ in range(2)]
    given += [await old.read()] if len(tokens_of(given)) < 2 else []
    worker.stream_pause_after = None
    rest = await front.collect(front.stream(request_id="same", resume=resume_from(given)))
    assert tokens_of([*given, *rest]) == expected(8)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(old)
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert from_rpc_error(caught.value).reason == "SUPERSEDED"
    await until(lambda: worker.open == 0 and worker.cancelled == 1)
    assert not front.gateway.servicer._live._entries


async def test_tenants_do_not_take_over_from_each_other() -> None:
    """An id is one tenant's own."""
    live = LiveRequests()
    entered = asyncio.Event()

    async def run(tenant: str) -> str:
        async with live.enter(tenant, "id", takes_over=True) as entry:
            entry.take_over()
            entered.set()
            await asyncio.sleep(30 if tenant == "a" else 0)
        return tenant

    first = asyncio.create_task(run("a"))
    await entered.wait()
    assert await run("b") == "b"
    assert not first.done()
    async with live.enter("a", "id", takes_over=True) as entry:
        entry.take_over()
        with pytest.raises(StaleError):
            await first
        assert not live.idle.is_set()
    assert live.idle.is_set()


async def test_a_takeover_that_comes_late_ends_nothing() -> None:
    """Of several connections the last is the client's, whichever request was ready first."""
    live, entered = LiveRequests(), asyncio.Event()

    async def run() -> None:
        async with live.enter("a", "id", takes_over=False):
            entered.set()
            await asyncio.Event().wait()

    first = asyncio.create_task(run())
    await entered.wait()
    async with live.enter("a", "id", takes_over=True) as earlier, live.enter("a", "id", takes_over=True) as later:
        later.take_over()
        with pytest.raises(StaleError):
            earlier.take_over()
        with pytest.raises(StaleError):
            await first
        assert live._entries == {("a", "id"): later}
    assert live.idle.is_set()
    assert not live._entries


async def test_what_is_refused_takes_nothing_over(cluster: Cluster, serve: Any) -> None:
    """The stream that lives goes on undisturbed."""
    await cluster.start(prefill=0)
    worker = cluster.decode[0]
    worker.stream_pause_after = 2
    front = await serve()
    old = front.stream(request_id="same")
    given = [await old.read()]
    bad = inference_pb2.Resume(outputs=[_output(token_ids=[60_000])], seed=1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(request_id="same", resume=bad))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    worker.resume.set()
    assert tokens_of([*given, *await front.collect(old)]) == expected(8)
    assert not front.gateway.servicer._live._entries


def test_outputs_are_bounded_together_before_they_are_copied() -> None:
    """A message has room for millions in each."""
    limits = Limits(max_token_ids=5)
    for count, fits in ((2, True), (3, False)):
        outputs = [_output(token_ids=range(count))] * 2
        request = inference_pb2.GenerateStreamRequest(resume=inference_pb2.Resume(outputs=outputs))
        if fits:
            assert asked(request, limits).resume
            continue
        with pytest.raises(InvalidRequestError, match="6 entries, at most 5") as caught:
            asked(request, limits)
        assert caught.value.field == "resume.outputs.token_ids"


async def test_outputs_are_counted_before_the_text_is_tokenized(
    cluster: Cluster, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be right costs nothing."""
    await cluster.start()
    front = await serve()
    encoded: list[str] = []
    monkeypatch.setattr(front.gateway.servicer._text, "encode", lambda text, **_: encoded.append(text))
    given = inference_pb2.Resume(outputs=[_output()] * 2, seed=1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(text="some", resume=given))
    assert from_rpc_error(caught.value).metadata["field"] == "resume.outputs"
    assert not encoded


def _output(**fields: Any) -> inference_pb2.ResumeOutput:
    return inference_pb2.ResumeOutput(**fields)


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other n": ({"outputs": [_output()] * 2, "seed": 1}, {}, "resume.outputs"),
    "too many outputs": ({"outputs": [_output()] * 17}, {}, "resume.outputs"),
    "no token": ({"outputs": [_output(token_ids=[60_000])], "seed": 1}, {}, "resume.outputs.token_ids"),
    "too many tokens": ({"outputs": [_output(token_ids=[5] * 9)], "seed": 1}, {}, "resume.outputs.token_ids"),
    "no seed": ({"outputs": [_output(token_ids=[5])]}, {}, "resume.seed"),
    "two seeds": ({"seed": 1}, {"sampling": types_pb2.SamplingParams(seed=2)}, "resume.seed"),
    "behind the stop": ({"seed": 1}, {"stopping": {"stop": ["two"]}}, "resume.outputs.token_ids"),
    "half a character": ({"text_bytes": 1}, {}, "resume.outputs.text_bytes"),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_no_stream_can_have_given(name: str, cluster: Cluster, serve: Any, tokenizer: Tokenizer) -> None:
    """INVALID_ARGUMENT with the field, and no worker hears of it."""
    await cluster.start()
    front = await serve()
    resume, more, field = BAD[name]
    if text := {"behind the stop": "one two three", "half a character": "🦜"}.get(name):
        output = _output(token_ids=tokenizer.encode(text, add_special=False), text_bytes=resume.get("text_bytes", 0))
        resume = {"outputs": [output], "seed": 1}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(resume=inference_pb2.Resume(**resume), **more))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value).metadata["field"] == field
    assert not cluster.decode[0].records


async def test_other_weights_do_not_go_on(cluster: Cluster, serve: Any) -> None:
    """A worker that computes other bits never continues a stream, nor does one with another model."""
    await cluster.start(prefill=0)
    front = await serve()
    for identity in ({"model_id": "other"}, {"numerics_id": "bf16"}):
        given = inference_pb2.Resume(outputs=[_output(token_ids=expected(1))], seed=1, **identity)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await front.collect(front.stream(resume=given))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert not cluster.decode[0].records
