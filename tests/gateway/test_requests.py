"""Requests through a gateway in front of healthy fake workers."""

from __future__ import annotations

import asyncio
import json
import math
import time
import urllib.error
import urllib.request
from typing import Any

import grpc
import pytest
from gateway_fakes import Cluster, expected, text_of, tokens_of, until
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from gateway import convert
from gateway.config import Limits, Patience
from gateway.tokenizer import Tokenizer
from tandem.errors import InvalidRequestError
from tandem.service.status import from_rpc_error
from tandem.v1 import decode_pb2, inference_pb2, inference_pb2_grpc, types_pb2


async def test_stream_has_prompt_deltas_finished_end(cluster: Cluster, serve: Any) -> None:
    """Duplicates from P and D come out once, in order, with usage and timings last."""
    await cluster.start()
    front = await serve()
    responses = await front.collect(front.stream(tokens=6))
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[0] == "prompt"
    assert kinds[-2:] == ["finished", "end"]
    assert set(kinds[1:-2]) == {"delta"}
    assert responses[0].prompt.prompt_tokens == 64
    assert responses[0].prompt.model == "tiny"
    assert tokens_of(responses) == expected(6)
    assert responses[-2].finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    end = responses[-1].end
    assert (end.usage.prompt_tokens, end.usage.completion_tokens, end.usage.cached_tokens) == (64, 6, 3)
    assert end.timings.preemptions == 1
    assert end.timings.migrations == 0
    assert 0 < end.timings.time_to_first_token_seconds <= end.timings.total_seconds
    assert len(cluster.prefill[0].requests) == 1
    assert cluster.decode[0].sources == [decode_pb2.PREFILL_SOURCE_REMOTE]
    await until(lambda: cluster.decode[0].open == cluster.prefill[0].open == 0)


async def test_unary_equals_stream(cluster: Cluster, serve: Any, tokenizer: Tokenizer) -> None:
    """One response holds what the stream does."""
    await cluster.start()
    front = await serve()
    request = inference_pb2.GenerateRequest.FromString(front.request(5, request_id="mine").SerializeToString())
    response = await front.stub.Generate(request)
    assert response.request_id == "mine"
    assert list(response.choices[0].token_ids) == expected(5)
    assert response.choices[0].text == tokenizer.decode(expected(5))
    assert response.usage.completion_tokens == 5


async def test_first_token_comes_before_the_commit(cluster: Cluster, serve: Any) -> None:
    """P's first token goes to the client while D is still without the KV."""
    await cluster.start()
    cluster.prefill[0].die_after = None
    cluster.decode[0].stream_pause_after = 0
    front = await serve()
    call = front.stream(tokens=3)
    seen = [await call.read(), await call.read()]
    assert tokens_of(seen) == expected(1)
    cluster.decode[0].resume.set()
    assert tokens_of([*seen, *await front.collect(call)]) == expected(3)


async def test_short_prompts_and_no_prefill_workers_run_locally(cluster: Cluster, serve: Any) -> None:
    """Source LOCAL in both cases."""
    await cluster.start()
    front = await serve()
    assert tokens_of(await front.collect(front.stream(tokens=2, prompt=[5, 6, 7]))) == expected(2)
    # The same prompt again: D's prefix is expected to be cached, what remains is short.
    for _ in range(2):
        await front.collect(front.stream(tokens=2))
    local, remote = decode_pb2.PREFILL_SOURCE_LOCAL, decode_pb2.PREFILL_SOURCE_REMOTE
    assert cluster.decode[0].sources == [local, remote, local]
    front.gateway.pool.set_addresses([], [cluster.decode[0].address])
    prompt = list(range(1000, 1100))
    assert tokens_of(await front.collect(front.stream(tokens=2, prompt=prompt))) == expected(2)
    assert cluster.decode[0].sources[-1] == local


async def test_choices_and_logprobs(cluster: Cluster, serve: Any) -> None:
    """n = 3 with two alternatives a token."""
    await cluster.start()
    front = await serve()
    sampling, output = types_pb2.SamplingParams(n=3), inference_pb2.OutputParams(logprobs=2)
    responses = await front.collect(front.stream(tokens=4, sampling=sampling, output=output))
    for index in range(3):
        assert tokens_of(responses, index) == expected(4, index)
    deltas = [r.delta for r in responses if r.WhichOneof("event") == "delta" and r.delta.token_ids]
    for delta in deltas:
        assert len(delta.logprobs.token_logprobs) == len(delta.token_ids)
        assert len(delta.logprobs.top_token_ids) == 2 * len(delta.token_ids)
    assert responses[-1].end.usage.completion_tokens == 12
    assert cluster.prefill[0].requests[0].record.logprobs == 2


async def test_drafts_are_chosen_by_the_request_and_told_at_its_end(cluster: Cluster, serve: Any) -> None:
    await cluster.start()
    cluster.decode[0].info.proposers.append("ngram")
    front = await serve()
    options = types_pb2.SpeculationParams(mode="ngram", max_tokens=4)
    responses = await front.collect(front.stream(tokens=4, speculation=options))
    assert cluster.decode[0].records[0].speculation == options
    usage = responses[-1].end.usage
    assert (usage.draft_tokens, usage.accepted_draft_tokens) == (12, 4)
    usage = (await front.collect(front.stream(tokens=4)))[-1].end.usage
    assert cluster.decode[0].records[1].speculation.mode == "auto"
    assert (usage.draft_tokens, usage.accepted_draft_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "speculation.mode: 'magic' is not one of auto, off, ngram"),
        ({"max_tokens": 65}, "speculation.max_tokens: 65 is outside 0 to 64"),
    ],
)
async def test_speculation_that_cannot_be(cluster: Cluster, serve: Any, options: dict[str, Any], message: str) -> None:
    await cluster.start()
    cluster.decode[0].info.proposers.append("ngram")
    front = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(speculation=types_pb2.SpeculationParams(**options)))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequestError)
    assert message in error.message


@pytest.mark.parametrize("include", [False, True])
async def test_stop_string_over_token_boundaries(
    cluster: Cluster, serve: Any, tokenizer: Tokenizer, include: bool
) -> None:
    """The text ends at the match, usage counts through it, and D's work ends."""
    ids = tokenizer.encode("One two three. STOPPED here and there, on and on and on and on")
    await cluster.start(script=[ids])
    cluster.decode[0].pause = 0.005
    front = await serve()
    stopping = {"stop": ["zzz", "STOPPED h"], "include_stop_in_output": include}
    responses = await front.collect(front.stream(tokens=len(ids), stopping=stopping))
    assert text_of(responses) == "One two three. " + ("STOPPED h" if include else "")
    finished = responses[-2].finished
    assert (finished.finish_reason, finished.stop_match) == (types_pb2.FINISH_REASON_STOP, "STOPPED h")
    count = responses[-1].end.usage.completion_tokens
    assert tokens_of(responses) == ids[:count]
    assert "STOPPED h" in tokenizer.decode(ids[:count])
    assert "STOPPED h" not in tokenizer.decode(ids[: count - 1])
    await until(lambda: cluster.decode[0].open == 0)
    assert cluster.decode[0].tokens_sent < len(ids)


async def test_stop_string_of_one_choice_finishes_it_at_d(cluster: Cluster, serve: Any, tokenizer: Tokenizer) -> None:
    """The other choice goes on."""
    first, second = tokenizer.encode("a b c X d e f g h i"), tokenizer.encode("a b c d e f g h i j")
    await cluster.start(script=[first, second])
    cluster.decode[0].pause = 0.02
    front = await serve()
    tokens = min(len(first), len(second))
    sampling = types_pb2.SamplingParams(n=2)
    responses = await front.collect(front.stream(tokens=tokens, sampling=sampling, stopping={"stop": ["X"]}))
    assert text_of(responses, 0) == "a b c "
    assert tokens_of(responses, 1) == second[:tokens]
    assert cluster.decode[0].finishes == [0]


async def test_min_tokens_keeps_stop_strings_off(cluster: Cluster, serve: Any, tokenizer: Tokenizer) -> None:
    """A match before min_tokens is text."""
    ids = tokenizer.encode("X X X X X X")
    await cluster.start(script=[ids])
    front = await serve()
    responses = await front.collect(front.stream(tokens=6, stopping={"stop": ["X"], "min_tokens": 3}))
    assert tokens_of(responses) == ids[:3]


async def test_chat_and_text_prompts(cluster: Cluster, serve: Any, tokenizer: Tokenizer) -> None:
    """Both reach P tokenized; Tokenize says the same; Detokenize goes back."""
    await cluster.start()
    front = await serve()
    chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="Hi <|im_end|>!")])
    await front.collect(front.stub.GenerateStream(front.request(1, messages=chat)))
    ids = list((await front.stub.Tokenize(inference_pb2.TokenizeRequest(messages=chat))).token_ids)
    assert list(cluster.prefill[0].records[0].prompt_token_ids) == ids
    # One end of turn per turn: what the user wrote is no control token.
    assert ids.count(2) == 2
    text = await front.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=False))
    assert "user\nHi <|im_end|>!<|im_end|>" in text.text


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"token_ids": None}, "input"),
    "empty text": ({"text": ""}, "text"),
    "huge text": ({"text": "word " * 1_000_000}, "text"),
    "id": ({"token_ids": inference_pb2.TokenIds(ids=[49152])}, "token_ids"),
    "no ids": ({"token_ids": inference_pb2.TokenIds()}, "token_ids"),
    "long prompt": ({"token_ids": inference_pb2.TokenIds(ids=[9] * 8192)}, "token_ids"),
    "no messages": ({"messages": inference_pb2.ChatMessages()}, "messages"),
    "max_tokens": ({"stopping": types_pb2.StoppingParams(max_tokens=-1)}, "stopping.max_tokens"),
    "too many": ({"stopping": types_pb2.StoppingParams(max_tokens=8192)}, "stopping.max_tokens"),
    "min_tokens": ({"stopping": types_pb2.StoppingParams(max_tokens=2, min_tokens=3)}, "stopping.min_tokens"),
    "stops": ({"stopping": types_pb2.StoppingParams(stop=["x"] * 1000)}, "stopping.stop"),
    "stop": ({"stopping": types_pb2.StoppingParams(stop=["x" * 257])}, "stopping.stop"),
    "empty stop": ({"stopping": types_pb2.StoppingParams(stop=[""])}, "stopping.stop"),
    "stop id": ({"stopping": types_pb2.StoppingParams(stop_token_ids=[50000])}, "stopping.stop_token_ids"),
    "stop ids": ({"stopping": types_pb2.StoppingParams(stop_token_ids=range(65))}, "stopping.stop_token_ids"),
    "nan": ({"sampling": types_pb2.SamplingParams(temperature=math.nan)}, "sampling.temperature"),
    "cold": ({"sampling": types_pb2.SamplingParams(temperature=-1)}, "sampling.temperature"),
    "top_p 0": ({"sampling": types_pb2.SamplingParams(top_p=0)}, "sampling.top_p"),
    "top_p 2": ({"sampling": types_pb2.SamplingParams(top_p=2)}, "sampling.top_p"),
    "top_k": ({"sampling": types_pb2.SamplingParams(top_k=-1)}, "sampling.top_k"),
    "min_p": ({"sampling": types_pb2.SamplingParams(min_p=1.1)}, "sampling.min_p"),
    "repetition": ({"sampling": types_pb2.SamplingParams(repetition_penalty=0)}, "sampling.repetition_penalty"),
    "presence": ({"sampling": types_pb2.SamplingParams(presence_penalty=3)}, "sampling.presence_penalty"),
    "frequency": ({"sampling": types_pb2.SamplingParams(frequency_penalty=-3)}, "sampling.frequency_penalty"),
    "n 0": ({"sampling": types_pb2.SamplingParams(n=0)}, "sampling.n"),
    "n 17": ({"sampling": types_pb2.SamplingParams(n=17)}, "sampling.n"),
    "bias": ({"sampling": types_pb2.SamplingParams(logit_bias={1: 101})}, "sampling.logit_bias"),
    "bias nan": ({"sampling": types_pb2.SamplingParams(logit_bias={1: math.nan})}, "sampling.logit_bias"),
    "bias id": ({"sampling": types_pb2.SamplingParams(logit_bias={49152: 1})}, "sampling.logit_bias"),
    "logprobs": ({"output": inference_pb2.OutputParams(logprobs=21)}, "output.logprobs"),
    "request id": ({"request_id": "x" * 129}, "request_id"),
}


async def test_bad_input(cluster: Cluster, serve: Any) -> None:
    """Each is INVALID_ARGUMENT with its field, and no worker hears of it."""
    await cluster.start()
    front = await serve()
    for name, (changes, field) in BAD.items():
        values = {"token_ids": inference_pb2.TokenIds(ids=[5, 6]), **changes}
        if "text" in changes or "messages" in changes:
            values.pop("token_ids")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await front.stub.Generate(inference_pb2.GenerateRequest(**values))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, name
        assert from_rpc_error(caught.value).metadata["field"] == field, name
    assert cluster.decode[0].records == []


def _huge(field: str) -> inference_pb2.GenerateRequest:
    if field == "token_ids":
        return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5] * 4_000_000))
    if field == "messages":
        chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage()] * 200_000)
        return inference_pb2.GenerateRequest(messages=chat)
    stopping = types_pb2.StoppingParams()
    if field == "stopping.stop":
        stopping.stop.extend(["a"] * 1_000_000)
    else:
        stopping.stop_token_ids.extend([5] * 4_000_000)
    return inference_pb2.GenerateRequest(text="Hi", stopping=stopping)


@pytest.mark.parametrize("field", ["token_ids", "messages", "stopping.stop", "stopping.stop_token_ids"])
def test_long_lists_are_refused_before_they_are_copied(field: str) -> None:
    """A message has room for tens of millions of entries; copies of them would hold up every stream."""
    request = _huge(field)
    began = time.process_time()
    with pytest.raises(InvalidRequestError) as caught:
        convert.asked(request, Limits())
    assert caught.value.field == field
    assert time.process_time() - began < 0.02


async def test_unknown_model_and_listing(cluster: Cluster, serve: Any) -> None:
    """NOT_FOUND; the listing says what is served."""
    await cluster.start(decode=2)
    front = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(model="gpt-17"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    models = (await front.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert [(m.name, m.prefill_workers, m.decode_workers, m.max_context) for m in models] == [("tiny", 1, 2, 8192)]
    assert (await front.stub.GetModel(inference_pb2.GetModelRequest(name="tiny"))).model == models[0]


async def test_request_id_in_use(cluster: Cluster, serve: Any) -> None:
    """While the first lives; free again afterwards."""
    await cluster.start()
    cluster.prefill[0].hold.clear()
    front = await serve()
    first = front.stream(request_id="same")
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(request_id="same"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    cluster.prefill[0].hold.set()
    await front.collect(first)
    assert tokens_of(await front.collect(front.stream(request_id="same"))) == expected(8)


async def test_cancel_ends_both_calls(cluster: Cluster, serve: Any) -> None:
    """At once, and the credit comes back."""
    await cluster.start()
    cluster.prefill[0].hold.clear()
    front = await serve()
    call = front.stream()
    await call.read()
    await until(lambda: cluster.prefill[0].open == 1)
    call.cancel()
    await until(lambda: cluster.decode[0].cancelled == 1 and cluster.prefill[0].cancelled == 1)
    await until(lambda: front.gateway.pool.decode[0].outstanding == front.gateway.pool.prefill[0].outstanding == 0)


async def test_deadline_is_passed_on(cluster: Cluster, serve: Any) -> None:
    """DEADLINE_EXCEEDED for the client, and the workers stop."""
    await cluster.start()
    cluster.prefill[0].hold.clear()
    front = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(timeout=0.5))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: cluster.decode[0].open == cluster.prefill[0].open == 0)


async def test_default_deadline(cluster: Cluster, serve: Any) -> None:
    """A client without a deadline doesn't wait for ever."""
    await cluster.start()
    cluster.prefill[0].hold.clear()
    front = await serve(patience=Patience(default_timeout=0.4))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(timeout=None))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_headers_come_after_admission(cluster: Cluster, serve: Any) -> None:
    """A request that waits for credit has no response headers yet."""
    await cluster.start(prefill=0)
    cluster.decode[0].info.max_sequences = 1
    cluster.decode[0].stream_pause_after = 1
    front = await serve()
    first = front.stream()
    await first.initial_metadata()
    second = front.stream(prompt=[7] * 40)
    headers = asyncio.ensure_future(second.initial_metadata())
    await until(lambda: front.gateway.servicer._services.dispatcher.waiting == 1)
    assert not headers.done()
    cluster.decode[0].resume.set()
    await headers
    assert tokens_of(await front.collect(first)) == expected(8)
    assert tokens_of(await front.collect(second)) == expected(8)


async def test_full_queue(cluster: Cluster, serve: Any) -> None:
    """RESOURCE_EXHAUSTED with RetryInfo, and lower priority values run first."""
    await cluster.start(prefill=0)
    cluster.decode[0].info.max_sequences = 1
    cluster.decode[0].stream_pause_after = 1
    front = await serve(max_queue=2)
    dispatcher = front.gateway.servicer._services.dispatcher
    calls = [front.stream(request_id="running")]
    await calls[0].read()
    for waiting, (name, priority) in enumerate([("low", 5), ("high", 1)], 1):
        calls.append(front.stream(request_id=name, priority=priority))
        calls[-1]._initiate = asyncio.ensure_future(calls[-1].initial_metadata())
        await until(lambda waiting=waiting: dispatcher.waiting == waiting)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(request_id="too many"))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    kinds = [detail.TypeName() for detail in rpc_status.from_call(caught.value).details]
    assert error_details_pb2.RetryInfo.DESCRIPTOR.full_name in kinds
    cluster.decode[0].resume.set()
    await asyncio.gather(*(front.collect(call) for call in calls))
    assert [record.request_id for record in cluster.decode[0].records] == ["running", "high", "low"]


def _narrow_channel(address: str) -> grpc.aio.Channel:
    """With a window that doesn't grow, so that what the client leaves unread stays with the gateway."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    return grpc.aio.insecure_channel(address, options=options)


async def test_a_client_that_never_reads_holds_the_gateway_until_the_deadline_only(
    cluster: Cluster, serve: Any
) -> None:
    """Its own, or the gateway's where it named none: then the gateway can stop, though it still doesn't read."""
    await cluster.start(prefill=0)
    front = await serve(max_buffered_events=32, patience=Patience(default_timeout=1.5))
    channel = _narrow_channel(front.gateway.address)
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    slow = stub.GenerateStream(front.request(8000, output=inference_pb2.OutputParams(logprobs=20)))
    await slow.read()
    await front.gateway.servicer.drain(20)
    assert front.gateway.servicer._live.idle.is_set()
    slow.cancel()
    await channel.close()


async def test_slow_reader_ends_alone(cluster: Cluster, serve: Any) -> None:
    """A client that doesn't read loses its stream; the other one is served."""
    await cluster.start(prefill=0)
    front = await serve(max_buffered_events=32)
    channel = _narrow_channel(front.gateway.address)
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    slow = stub.GenerateStream(front.request(8000, output=inference_pb2.OutputParams(logprobs=20)), timeout=30)
    await slow.read()
    await until(lambda: cluster.decode[0].cancelled == 1, timeout=20)
    assert tokens_of(await front.collect(front.stream(tokens=4, prompt=[3] * 40))) == expected(4)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(slow)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert from_rpc_error(caught.value).reason == "SLOW_READER"
    await channel.close()


async def test_many_at_once(cluster: Cluster, serve: Any) -> None:
    """Over two pairs, all exact, all credit back, both decode workers used."""
    await cluster.start(prefill=2, decode=2)
    front = await serve()
    calls = [front.stream(tokens=20, prompt=range(i * 50, i * 50 + 40), timeout=30) for i in range(64)]
    for responses in await asyncio.gather(*(front.collect(call) for call in calls)):
        assert tokens_of(responses) == expected(20)
    pool = front.gateway.pool
    await until(lambda: all(w.outstanding == 0 for w in (*pool.decode, *pool.prefill)))
    assert min(len(worker.records) for worker in cluster.decode) > 10


def _get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_latency_metrics(cluster: Cluster, serve: Any) -> None:
    """The first token counts when it comes, not when the stream ends; gaps are within one choice."""
    await cluster.start(prefill=0)
    worker = cluster.decode[0]
    worker.pause, worker.stream_pause_after = 0.05, 3
    front = await serve()
    call = front.stream(sampling=types_pb2.SamplingParams(n=4))
    await until(lambda: worker.tokens_sent == 12)
    await asyncio.sleep(0.1)
    registry = front.gateway.metrics.registry

    def value(name: str) -> float:
        found = registry.get_sample_value(f"tandem_{name}", {"role": "gateway"})
        assert found is not None
        return found

    assert value("time_to_first_token_seconds_count") == 1
    assert value("inter_token_latency_seconds_count") == 8
    assert value("inter_token_latency_seconds_sum") / 8 > 0.045
    worker.resume.set()
    await front.collect(call)


async def test_health_and_metrics(cluster: Cluster, serve: Any) -> None:
    """Both say not serving until a pair is ready; metrics have the field's names."""
    worker = await cluster.add_decode()
    front = await serve(wait_ready=False)
    address, pool = front.gateway.http_address, front.gateway.pool
    health = health_pb2_grpc.HealthStub(front.channel)
    await until(lambda: pool.serving)
    assert (await asyncio.to_thread(_get, address, "/healthz"))[0] == 200
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    await front.collect(front.stream(tokens=3))
    status, text = await asyncio.to_thread(_get, address, "/metrics")
    assert status == 200
    assert 'tandem_generation_tokens_total{role="gateway"} 3.0' in text
    assert 'tandem_request_success_total{finished_reason="length",role="gateway"} 1.0' in text
    assert 'tandem_time_to_first_token_seconds_count{role="gateway"} 1.0' in text
    listing = json.loads((await asyncio.to_thread(_get, address, "/workers"))[1])
    assert listing == {"models": [{"model": "tiny", "model_id": "m" * 64, "prefill_workers": 0, "decode_workers": 1}]}
    await worker.stop()
    await until(lambda: not pool.serving)
    assert (await asyncio.to_thread(_get, address, "/workers"))[1] == '{"models": []}\n'
    assert (await asyncio.to_thread(_get, address, "/healthz"))[0] == 503
    assert (await asyncio.to_thread(_get, address, "/nothing"))[0] == 404
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.NOT_SERVING
