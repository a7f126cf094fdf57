"""Compute int8 in several processes: one copy of the packed weights, the same bits, and nobody depends on anybody."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Batch, SampleSpec, Slice
from engine.config import EngineConfig
from engine.loading import Engine, load_engine
from engine.models.panels import sharing_key
from engine.models.tensors import fused_shapes, most_bytes
from engine.weights import model_id, read_config, sharing
from engine.weights.sharing import Panel, Share
from kernels.int8 import packed_bytes
from tandem.errors import ModelFormatError
from tandem.record import SamplingParams

pytestmark = [
    pytest.mark.usefixtures("cpp_kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="memfd and abstract sockets are Linux's"),
]
SHAPE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "num_attention_heads": 4}
PROMPT = [5, 17, 3, 99, 200, 41, 8, 8, 150, 7, 12]
LOADS = """
import json, sys
sys.path.insert(0, sys.argv[2])
from test_shared_weights import answer, load, shared_memory
engine = load(sys.argv[1])
print(json.dumps([answer(engine), shared_memory()]), flush=True)
sys.stdin.read()
"""
WAITS = """
import sys
from engine.weights import sharing
share = sharing.join(sys.argv[1], int(sys.argv[2]))
print(share.manifest is None, flush=True)
sys.stdin.read()
"""


def load(folder: Path | str, **settings: Any) -> Engine:
    """An engine of its own."""
    return load_engine(EngineConfig(str(folder), compute="int8", kv_dtype="bfloat16", num_blocks=4, **settings))


def answer(engine: Engine) -> list[float]:
    """Log probabilities of the most likely tokens after the prompt, to the last bit."""
    spec = SampleSpec(0, SamplingParams(temperature=0.0), 0, PROMPT, [], logprobs=5)
    (sample,) = engine.runner.run(Batch([Slice("r", PROMPT, 0, [2], [spec])])).samples[0]
    assert sample.logprobs is not None
    return list(sample.logprobs.top_logprobs)


def shared_memory() -> dict[str, list[int]]:
    """Inode -> kB resident, and this process's part of that, of the weights' memory that is mapped here."""
    found: dict[str, list[int]] = {}
    inode = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inode = line.split()[4] if "memfd:tandem-weights" in line else None
        elif inode is not None and line.startswith(("Rss:", "Pss:")):
            found.setdefault(inode, []).append(int(line.split()[1]))
    return found


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that says one line and then holds on to what it has."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TANDEM_KERNELS": "cpp"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            yield child
        finally:
            child.kill()


def line_of(child: subprocess.Popen[str]) -> Any:
    assert child.stdout is not None
    return json.loads(child.stdout.readline().replace("True", "true").replace("False", "false"))


@pytest.fixture
def folder(save_tiny: Callable[..., Any]) -> Path:
    """A tiny model with biases, a table of its own, and products that fit the fused step."""
    return Path(save_tiny("qwen2", **SHAPE)[0])


@pytest.fixture
def want(folder: Path) -> list[float]:
    """What an engine that shares nothing answers."""
    engine = load(folder, share_weights=False)
    assert shared_memory() == {}
    return answer(engine)


@pytest.fixture(autouse=True)
def leaks_nothing(eventually: Callable[..., None]) -> Iterator[None]:
    """A dropped engine takes its thread and its memory along."""
    yield

    def gone() -> bool:
        gc.collect()
        return not [t for t in threading.enumerate() if t.name == sharing.THREAD] and shared_memory() == {}

    eventually(gone)


def meeting(folder: Path) -> tuple[str, int]:
    """Key and capacity by which processes that load this model meet."""
    return sharing_key(model_id(folder)), most_bytes(read_config(folder), packed_bytes)


def test_two_processes_that_start_together_share(folder: Path, want: list[float]) -> None:
    here = Path(__file__).parent
    with process(LOADS, folder, here) as one, process(LOADS, folder, here) as other:
        (first, one_memory), (second, other_memory) = line_of(one), line_of(other)
    assert first == second == want
    assert len(one_memory) == 1
    assert one_memory.keys() == other_memory.keys()
    # Whoever looked last saw the pages of both.
    assert any(pss < rss for rss, pss in (*one_memory.values(), *other_memory.values()))


def test_engines_of_one_process_share_too(folder: Path, want: list[float]) -> None:
    one, other = load(folder), load(folder)
    assert answer(one) == answer(other) == want
    assert len(shared_memory()) == 1
    del one
    gc.collect()
    assert answer(other) == want
    third = load(folder)
    assert answer(third) == want


def test_another_model_is_not_shared(folder: Path, save_tiny: Callable[..., Any], want: list[float]) -> None:
    other, _ = save_tiny("llama", **SHAPE)
    engines = [load(folder), load(other)]
    assert answer(engines[0]) == want
    assert answer(engines[1]) != want
    assert len(shared_memory()) == 2


def test_the_same_model_in_another_folder_is_shared(folder: Path, tmp_path: Path, want: list[float]) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    engines = [load(folder), load(copy)]
    assert [answer(engine) for engine in engines] == [want, want]
    assert len(shared_memory()) == 1


def test_whom_it_waits_for_is_killed(folder: Path, want: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, original = threading.Event(), sharing._await_memory

    def await_memory(sock: Any) -> int | None:
        waiting.set()
        return original(sock)

    monkeypatch.setattr(sharing, "_await_memory", await_memory)
    with process(WAITS, *meeting(folder)) as first, ThreadPoolExecutor(1) as pool:
        assert line_of(first) is True
        coming = pool.submit(load, folder)
        assert waiting.wait(30)
        first.send_signal(signal.SIGKILL)
        engine = coming.result(60)
        del coming
    assert answer(engine) == want
    assert len(shared_memory()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "other names"),
        ({"n": 212}, "weight head can't be: Panel"),
        ({"nbytes": 64}, "weight head can't be: Panel"),
        ({"bits": 5}, "weight head can't be: Panel"),
        ({"offset": 1}, "were taken at 1"),
    ],
)
def test_weights_that_can_not_be_are_refused(
    change: dict[str, int] | None, words: str, folder: Path, want: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """They say the right key and are sealed, and still are not these: the engine packs its own."""
    key, capacity = meeting(folder)
    names = [name for name in fused_shapes(read_config(folder)) if name != "head"]
    others = {name: Panel(capacity, 0, 0, 0, 8) for name in names}
    head = replace(Panel(0, packed_bytes(211, 96), 211, 96, 8), **(change or {}))
    with claimed(key, capacity, {} if change is None else {"head": head, **others}):
        engine = load(folder)
        assert answer(engine) == want
        assert shared_memory() == {}
    assert words in caplog.text


@contextmanager
def claimed(key: str, capacity: int, manifest: dict[str, Panel]) -> Iterator[None]:
    """Somebody is the first, with this manifest."""
    share = sharing.join(key, capacity)
    assert share is not None
    try:
        share.publish(manifest)
        share.start()
        yield
    finally:
        share.close()


def test_a_model_that_does_not_load_keeps_nobody_waiting(folder: Path) -> None:
    key, capacity = meeting(folder)
    (folder / "model.safetensors").rename(folder / "whole")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "whole")
    tensors["model.unknown.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert meeting(folder) != (key, capacity)
    with pytest.raises(ModelFormatError, match="no use for tensor"):
        load(folder)
    share = sharing.join(*meeting(folder), wait_seconds=0)
    assert share is not None
    assert share.manifest is None
    share.close()


def test_no_thread_is_no_error(
    folder: Path, want: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Share) -> None:
        raise OSError("no more threads")

    monkeypatch.setattr(Share, "start", fail)
    assert answer(load(folder)) == want
    assert "weights are not shared: no more threads" in caplog.text
