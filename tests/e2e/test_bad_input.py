"""Bad input through the real gateway: each a clear error with the right code and field, and the server goes on."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tandem.models import default_model
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc, types_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def stub(shared_stack: Any) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    """A raw stub: no client-side help."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(shared_stack.gateway, options=options) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def _request(**changes: Any) -> pb.GenerateRequest:
    values: dict[str, Any] = {"text": "Hello", "stopping": types_pb2.StoppingParams(max_tokens=2), **changes}
    return pb.GenerateRequest(**values)


def _sampling(**values: Any) -> pb.GenerateRequest:
    return _request(sampling=types_pb2.SamplingParams(**values))


def _stopping(**values: Any) -> pb.GenerateRequest:
    return _request(stopping=types_pb2.StoppingParams(**values))


BAD = {
    "empty prompt": (_request(text=""), INVALID, "text"),
    "no prompt": (pb.GenerateRequest(), INVALID, "input"),
    "empty ids": (_request(token_ids=pb.TokenIds()), INVALID, "token_ids"),
    "id outside the vocabulary": (_request(token_ids=pb.TokenIds(ids=[49152])), INVALID, "token_ids"),
    "prompt over the context": (_request(token_ids=pb.TokenIds(ids=[100] * 9000)), INVALID, "token_ids"),
    "no messages": (_request(messages=pb.ChatMessages()), INVALID, "messages"),
    "negative max_tokens": (_stopping(max_tokens=-1), INVALID, "stopping.max_tokens"),
    "zero max_tokens": (_stopping(max_tokens=0), INVALID, "stopping.max_tokens"),
    "huge max_tokens": (_stopping(max_tokens=2**31 - 1), INVALID, "stopping.max_tokens"),
    "min over max": (_stopping(max_tokens=2, min_tokens=3), INVALID, "stopping.min_tokens"),
    "nan temperature": (_sampling(temperature=math.nan), INVALID, "sampling.temperature"),
    "negative temperature": (_sampling(temperature=-0.5), INVALID, "sampling.temperature"),
    "infinite temperature": (_sampling(temperature=math.inf), INVALID, "sampling.temperature"),
    "top_p 0": (_sampling(top_p=0.0), INVALID, "sampling.top_p"),
    "top_p 2": (_sampling(top_p=2.0), INVALID, "sampling.top_p"),
    "negative top_k": (_sampling(top_k=-1), INVALID, "sampling.top_k"),
    "min_p 2": (_sampling(min_p=2.0), INVALID, "sampling.min_p"),
    "n 0": (_sampling(n=0), INVALID, "sampling.n"),
    "n 1000": (_sampling(n=1000), INVALID, "sampling.n"),
    "bias outside the vocabulary": (_sampling(logit_bias={99999: 1.0}), INVALID, "sampling.logit_bias"),
    "unknown stop id": (_stopping(max_tokens=2, stop_token_ids=[99999]), INVALID, "stopping.stop_token_ids"),
    "1,000 stop strings": (_stopping(max_tokens=2, stop=["x"] * 1000), INVALID, "stopping.stop"),
    "empty stop string": (_stopping(max_tokens=2, stop=[""]), INVALID, "stopping.stop"),
    "too many logprobs": (_request(output=pb.OutputParams(logprobs=21)), INVALID, "output.logprobs"),
    "long request id": (_request(request_id="x" * 129), INVALID, "request_id"),
    "10 MB of text": (_request(text="word " * 2_000_000), INVALID, "text"),
    "unknown model": (_request(model="gpt-17"), grpc.StatusCode.NOT_FOUND, ""),
    "over the message limit": (_request(text="x" * (65 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_clear_error(stub: inference_pb2_grpc.InferenceServiceStub, name: str, stream: bool) -> None:
    """Right code, right field, a message that says what is allowed; then a good request still works."""
    request, code, field = BAD[name]
    with pytest.raises(grpc.RpcError) as caught:
        _generate(stub, request, stream)
    assert caught.value.code() == code, caught.value.details()
    if field:
        assert field in _violated_fields(caught.value), caught.value.details()
    if code != grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert _has_error_info(caught.value)
    assert _still_serves(stub)


def test_invalid_utf8(shared_stack: Any, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    """A string field that is not UTF-8, as no generated client would send it."""
    with grpc.insecure_channel(shared_stack.gateway) as channel:
        call = channel.unary_unary("/tandem.v1.InferenceService/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\x1a\x03\xff\xfe\xfd", timeout=10)
    assert caught.value.code() == INVALID
    assert "text" in _violated_fields(caught.value)
    assert _still_serves(stub)


def test_garbage_and_silence_on_the_port(shared_stack: Any, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    """Neither noise nor clients that say nothing disturb the others."""
    host, port = shared_stack.gateway.rsplit(":", 1)
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    try:
        with socket.create_connection((host, int(port))) as noisy:
            noisy.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64)
        assert _still_serves(stub)
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gguf", None, "no such file"),
        ("a.gguf", b"", "empty"),
        ("a.gguf", b"GGUF\x03\x00\x00\x00", "truncated"),
        ("a.gguf", "half of the default model", "truncated"),
        ("a.gguf", b"not a model at all" * 50, "not a GGUF file"),
        ("a.bin", b"not a model at all" * 50, "not a GGUF file"),
        (".", None, "no tokenizer.json"),
    ],
    ids=[
        "missing",
        "empty",
        "header truncated",
        "weights truncated",
        "no model",
        "no model, no suffix",
        "empty folder",
    ],
)
def test_wrong_model_path(start_stack: Any, tmp_path: Any, name: str, content: bytes | str | None, words: str) -> None:
    """`tandem up` stops with exit code 2, and its last line says which path and what is wrong with it."""
    path = tmp_path / name
    if isinstance(content, str):
        whole = default_model().read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AssertionError) as caught:
        start_stack.start("--model", str(path))
    said = str(caught.value)
    assert "(exit 2)" in said
    last = said.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(path) in last
    assert words in last.replace(str(path), "")


def _generate(stub: inference_pb2_grpc.InferenceServiceStub, request: pb.GenerateRequest, stream: bool) -> None:
    if stream:
        list(stub.GenerateStream(pb.GenerateStreamRequest.FromString(request.SerializeToString()), timeout=30))
    else:
        stub.Generate(request, timeout=30)


def _details(error: Any, kind: Any) -> list[Any]:
    status = rpc_status.from_call(error)
    found = []
    for detail in status.details if status else ():
        message = kind()
        if detail.Unpack(message):
            found.append(message)
    return found


def _violated_fields(error: Any) -> list[str]:
    requests = _details(error, error_details_pb2.BadRequest)
    return [violation.field for request in requests for violation in request.field_violations]


def _has_error_info(error: Any) -> bool:
    return any(info.domain and info.reason for info in _details(error, error_details_pb2.ErrorInfo))


def _still_serves(stub: inference_pb2_grpc.InferenceServiceStub) -> bool:
    return len(stub.Generate(_request(), timeout=60).choices[0].token_ids) > 0
