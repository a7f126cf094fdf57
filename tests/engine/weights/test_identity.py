"""`model_id`: equal for equal models, different for anything that changes an answer, and remembered."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.weights import identity, model_id

WriteFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(folder))
    return folder


def test_what_counts(write_folder: WriteFolder, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """Weights, RoPE and shape count; the name and place of the files do not."""
    tensors = {"a": torch.arange(64.0), "b": torch.ones(3)}
    folder = write_folder(tensors=tensors)
    first = model_id(folder)
    assert len(first) == 64
    assert model_id(shutil.copytree(folder, tmp_path / "elsewhere")) == first
    one_bit = tensors["a"].clone()
    one_bit[63] = torch.nextafter(one_bit[63], torch.tensor(1e9))
    others = [
        model_id(write_folder(tensors={**tensors, "a": one_bit})),
        model_id(write_folder(tensors={"b": tensors["a"], "a": tensors["b"]})),
        model_id(write_folder({"rope_theta": 20000.0}, tensors)),
        model_id(write_folder({"rms_norm_eps": 1e-5}, tensors)),
        model_id(write_gguf("F32")),
        model_id(write_gguf("Q8_0")),
    ]
    assert len({first, *others}) == 7


def test_remembered(write_folder: WriteFolder, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is digested, until a file changes; a damaged or unwritable cache does no harm."""
    calls = 0
    digest = identity._digest

    def counted(checkpoint: identity.Checkpoint) -> str:
        nonlocal calls
        calls += 1
        return digest(checkpoint)

    monkeypatch.setattr(identity, "_digest", counted)
    folder = write_folder()
    first = model_id(folder)
    assert model_id(folder) == first
    assert calls == 1
    (remembered,) = (cache / "model_ids").iterdir()
    remembered.write_text("rubbish")
    assert model_id(folder) == first
    assert calls == 2
    status = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert model_id(folder) == first
    assert calls == 3
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(folder / "config.json"))
    assert model_id(folder) == first
    assert calls == 4
