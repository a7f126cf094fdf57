"""`python -m gateway` as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import Cluster, expected

from gateway.__main__ import parser
from tandem.v1 import inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]


async def _start(*flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )


def test_no_grace_is_a_grace() -> None:
    """`--drain-grace 0` ends at once, for the gateway as for workers; less is refused."""
    needed = ["--model", "m", "--drain-grace"]
    assert parser().parse_args([*needed, "0"]).drain_grace == 0
    for bad in ("-1", "nan", "soon"):
        with pytest.raises(SystemExit):
            parser().parse_args([*needed, bad])


async def test_ready_line_requests_and_sigterm(cluster: Cluster, model_path: Path, tmp_path: Path) -> None:
    """One JSON line, requests served, a running stream is finished after SIGTERM, exit code 0; no torch inside."""
    await cluster.start()
    file = tmp_path / "workers.json"
    workers = {"prefill": [cluster.prefill[0].address], "decode": [cluster.decode[0].address]}
    file.write_text(json.dumps(workers))
    process = await _start("--model", str(model_path), "--workers-file", str(file), "--listen", "127.0.0.1:0")
    try:
        assert process.stdout is not None
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
        assert (ready["event"], ready["role"], ready["pid"]) == ("ready", "gateway", process.pid)
        maps = Path(f"/proc/{process.pid}/maps").read_text()  # noqa: ASYNC240
        assert "libtorch" not in maps
        cluster.decode[0].pause = 0.05
        async with grpc.aio.insecure_channel(ready["address"]) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GenerateStreamRequest(token_ids=inference_pb2.TokenIds(ids=range(50, 90)))
            request.stopping.max_tokens = 20
            call = stub.GenerateStream(request, timeout=20)
            tokens = list((await call.read()).delta.token_ids)
            process.send_signal(signal.SIGTERM)
            while (response := await call.read()) is not grpc.aio.EOF:
                tokens += response.delta.token_ids
            assert tokens == expected(20)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--decode-worker", "127.0.0.1:1"], "no such file"),
        ([], "--decode-worker"),
        (["--decode-worker", "nowhere"], "HOST:PORT"),
        (["--workers-file", "/nonexistent/workers.json"], "--workers-file"),
        (["--decode-worker", "127.0.0.1:1", "--tls-cert", "/nonexistent/c"], "--tls-key"),
        (["--decode-worker", "127.0.0.1:1", "--tls-client-auth", "required"], "--tls-client-auth"),
    ],
)
async def test_start_errors(flags: list[str], words: str, model_path: Path) -> None:
    """One line on stderr and exit code 2."""
    model = "/nonexistent/model.gguf" if words == "no such file" else str(model_path)
    process = await _start("--model", model, *flags)
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    lines = stderr.decode().strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert words in lines[-1]
