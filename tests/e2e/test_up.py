"""`tandem up` as a user runs it: ready, right answers, and nothing left behind."""

from __future__ import annotations

import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tandem.client import Client, Delta
from tandem.supervisor.runtime import runtime_folder

MODULES = ("prefill_service", "decode_service", "gateway")
ASKED = [
    pytest.param("What is the capital of France, and what is it known for?", (), id="default"),
    pytest.param("What is the capital of France?", ("--compute", "exact"), id="exact"),
]
"""What `make run` asks, and a shorter question whose two likeliest first tokens are 0.08 apart: too close for int8."""


def _remains() -> set[str]:
    """Shared memory segments, POSIX and System V, and the files of running `tandem up`s."""
    files = [*Path("/dev/shm").iterdir(), *runtime_folder().iterdir()]
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {*map(str, files), *(f"segment {line.split()[1]}" for line in segments)}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("question", "flags"), ASKED)
def test_serves_then_leaves_nothing(
    start_stack: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    question: str,
    flags: tuple[str, ...],
    signum: int,
) -> None:
    """A real answer, one ready line, exit code 0, no process, no shared memory segment and no file left."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = _remains()
    stack = start_stack.start(*flags)
    try:
        assert _remains() != before
        with Client(stack.gateway) as client:
            answer = client.chat([{"role": "user", "content": question}], temperature=0.0)
        assert "Paris" in answer.text
        assert sum(line.startswith("ready gateway=") for line in stack.lines) == 1
        with urllib.request.urlopen(f"http://{stack.http}/healthz", timeout=10) as response:
            assert response.status == 200
        assert [len(stack.children(f"-m {module}")) for module in MODULES] == [1, 1, 1]
        assert stack.stop(signum) == 0
        assert stack.children() == []
        assert _remains() <= before
    finally:
        stack.kill()


@pytest.mark.parametrize(("question", "flags"), ASKED)
def test_answers_a_question_once_it_serves(
    start_stack: Any, eventually: Any, question: str, flags: tuple[str, ...]
) -> None:
    """What `make run` does: the answer streams to stdout after the ready line, and everything stays up."""
    stack = start_stack.start("--ask", question, *flags)
    try:
        eventually(lambda: "Paris" in "\n".join(stack.lines))
        assert [line for line in stack.lines if line][:2] == [
            f"ready gateway={stack.gateway} http={stack.http}",
            question,
        ]
        assert stack.generate("Hello", "--max-tokens", "2")["finish_reason"] == "length"
        assert stack.stop() == 0
    finally:
        stack.kill()


def test_kill_dash_nine_of_up_leaves_no_worker(start_stack: Any, eventually: Any) -> None:
    """Workers die with their supervisor, however it ends."""
    stack = start_stack.start()
    try:
        assert [len(stack.children(f"-m {module}")) for module in MODULES] == [1, 1, 1]
        stack.process.kill()
        eventually(lambda: not stack.children())
    finally:
        stack.kill()


def test_dead_worker_is_restarted(start_stack: Any, eventually: Any) -> None:
    """kill -9 of each worker: both are back, and requests work again without a restart by hand."""
    stack = start_stack.start()
    try:
        for role in ("prefill_service", "decode_service"):
            (victim,) = stack.children(f"-m {role}")
            os.kill(victim.pid, signal.SIGKILL)
            eventually(lambda role=role, pid=victim.pid: _is_back(stack, role, pid), 120)
            result = stack.generate("The capital of France is", "--max-tokens", "4")
            assert len(result["token_ids"]) == 4
        assert stack.stop() == 0
    finally:
        stack.kill()


def test_a_stream_outlives_the_only_decode_worker(start_stack: Any) -> None:
    """kill -9 with no other worker to go on: the stream waits for the new one, and its tokens are as ever."""
    stack = start_stack.start("--compute", "exact")
    options: Any = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    try:
        with Client(stack.gateway) as client:
            calm = client.generate("Once upon a time", **options)
            (victim,) = stack.children("-m decode_service")
            tokens: list[int] = []
            with client.stream("Once upon a time", **options) as events:
                for event in events:
                    if isinstance(event, Delta):
                        if not tokens:
                            victim.kill()
                        tokens += event.token_ids
        assert tokens == list(calm.token_ids)
        assert stack.stop() == 0
    finally:
        stack.kill()


def _is_back(stack: Any, role: str, lost: int) -> bool:
    (worker,) = (worker for worker in stack.status()["workers"] if worker["role"] == role.removesuffix("_service"))
    return bool(worker["ready"] and worker["pid"] != lost and worker["restarts"] == 1)


def test_scale_and_status(start_stack: Any, eventually: Any) -> None:
    """Pools grow and shrink while it runs."""
    stack = start_stack.start("--num-blocks", "256")
    try:
        stack.tandem("scale", "decode", "2", "--gateway", stack.gateway, timeout=120)
        eventually(lambda: sum(w["role"] == "decode" and w["ready"] for w in stack.status()["workers"]) == 2, 60)
        for worker in stack.status()["workers"]:
            if worker["role"] == "gateway":
                assert worker["load"] is None
            else:
                _check_idle(worker["load"])
        stack.tandem("scale", "decode", "1", "--gateway", stack.gateway, timeout=120)
        eventually(lambda: len(stack.children("-m decode_service")) == 1, 60)
        assert stack.generate("Hello", "--max-tokens", "2")["finish_reason"] == "length"
        assert stack.stop() == 0
    finally:
        stack.kill()


def _check_idle(load: dict[str, Any]) -> None:
    assert load["free_blocks"] == load["total_blocks"] == 256
    counts = ("running_sequences", "waiting_requests", "receiving_requests", "queued_prefill_tokens")
    assert [load[name] for name in counts] == [0, 0, 0, 0]
    assert load["draining"] is False
    assert load["steps"] >= 0


def test_a_worker_that_hangs_has_no_load(start_stack: Any) -> None:
    """A stopped process answers nothing: `tandem status` says so in seconds, and shows the others' load."""
    stack = start_stack.start()
    try:
        (victim,) = stack.children("-m prefill_service")
        victim.suspend()
        loads = {worker["role"]: worker["load"] for worker in stack.status()["workers"]}
        assert loads["prefill"] is None
        assert loads["decode"]["total_blocks"] > 0
        victim.resume()
        assert stack.stop() == 0
    finally:
        stack.kill()


def test_aggregated_mode(start_stack: Any) -> None:
    """`--prefill 0`: decode prefills itself; the tokens are the same."""
    results = []
    for prefill in ("1", "0"):
        stack = start_stack.start("--prefill", prefill, "--compute", "exact")
        try:
            assert len(stack.children("-m prefill_service")) == int(prefill)
            results.append(stack.generate("The capital of France is", "--max-tokens", "8"))
            assert stack.stop() == 0
        finally:
            stack.kill()
    assert "Paris" in str(results[0]["text"])
    assert results[0]["token_ids"] == results[1]["token_ids"]
