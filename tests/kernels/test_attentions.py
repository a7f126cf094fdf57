"""Which attention a GPU's engine takes, from what is installed: fakes in the real packages' places."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_packages import FAKES, install

from engine import config
from kernels import backends, flashinfer_attention
from kernels.attentions import ATTENTIONS, attention_for, describe_attentions
from kernels.backends import AttentionShape
from tandem.errors import ConfigError

CPU = torch.device("cpu")
SHAPE = AttentionShape(
    heads=6,
    kv_heads=2,
    head_dim=64,
    block_size=256,
    dtype=torch.float16,
    kv_dtype=torch.float16,
    max_sequences=4,
    max_context=900,
    windows=(None, 40),
)
LEFT = "triton" if importlib.util.find_spec("triton") else "torch"
"""What is taken where nothing else is installed."""
ZEROS = """
import fake_flashinfer as fake, torch

class Zeros:
    def run(self, q, cache):
        return torch.zeros_like(q)

class BatchDecodeWithPagedKVCacheWrapper(Zeros, fake.BatchDecodeWithPagedKVCacheWrapper): ...
class BatchPrefillWithPagedKVCacheWrapper(Zeros, fake.BatchPrefillWithPagedKVCacheWrapper): ...
"""


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wish in the environment, and a small workspace."""
    monkeypatch.delenv("TANDEM_ATTENTION", raising=False)
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 1024)


def warned(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def test_the_names_of_the_flag_are_those_that_there_are() -> None:
    assert [name for name in config.ATTENTIONS if name != "auto"] == [candidate.name for candidate in ATTENTIONS]


def test_without_packages_nothing_is_remarked(caplog: pytest.LogCaptureFixture) -> None:
    assert attention_for(SHAPE, CPU).name == LEFT
    assert warned(caplog) == ""


@pytest.mark.parametrize("name", FAKES)
def test_what_is_installed_is_taken(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, tmp_path, name)
    caplog.set_level(logging.INFO)
    taken = attention_for(SHAPE, CPU)
    assert (taken.name, taken.numerics) == (name, f"{name}-{FAKES[name][2]}")
    assert f"attention: {name}-{FAKES[name][2]}" in caplog.text
    assert attention_for(SHAPE, CPU, "torch").name == "torch"
    monkeypatch.setenv("TANDEM_ATTENTION", "torch")
    assert attention_for(SHAPE, CPU).name == "torch"
    assert attention_for(SHAPE, CPU, name).name == name


def test_the_best_of_several_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in reversed(FAKES):
        install(monkeypatch, tmp_path, name)
        assert attention_for(SHAPE, CPU).name == name


@pytest.mark.parametrize(
    ("name", "version", "source", "reason"),
    [
        ("flashinfer", "0.5.3", None, "flashinfer-python 0.5.3 is installed; 0.6.1 to below 0.8 can be used"),
        ("flashinfer", "0.8.0rc1", None, "0.8.0rc1 is installed"),
        ("flash-attn-2", "2.5.9.post1", None, "flash-attn 2.5.9.post1 is installed; 2.6 to below 3 can be used"),
        ("flashinfer", None, "raise OSError('libcudart.so.13: cannot open')", "broken here: OSError: libcudart.so.13"),
        ("flash-attn-3", None, "", "broken here: AttributeError"),
        ("flashinfer", None, ZEROS, r"broken here: decode with a window of None is off by 1 of"),
    ],
)
def test_what_is_wrong_or_broken_is_passed_over_unless_asked_for(
    name: str,
    version: str | None,
    source: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(monkeypatch, tmp_path, name, version, source)
    assert attention_for(SHAPE, CPU).name == LEFT
    assert f"no attention by {name}: " in warned(caplog)
    assert reason in warned(caplog)
    with pytest.raises(ConfigError, match="--attention") as caught:
        attention_for(SHAPE, CPU, name)
    assert reason in caught.value.message
    assert caught.value.message.endswith("usable here: triton, torch" if LEFT == "triton" else "usable here: torch")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("flashinfer", {"dtype": torch.float32, "kv_dtype": torch.float32}, "takes float16 or bfloat16"),
        ("flashinfer", {"kv_dtype": torch.int8}, "keys and values of torch.int8"),
        ("flashinfer", {"head_dim": 80}, "heads of 64, 128, 256 elements, not 80"),
        ("flash-attn-3", {"head_dim": 260}, "at most 256, not 260"),
        ("flash-attn-3", {"kv_dtype": torch.float8_e4m3fn}, "keys and values of torch.float8_e4m3fn"),
        ("flash-attn-2", {"block_size": 16}, "KV blocks of 256 tokens (--block-size), not of 16"),
    ],
)
def test_a_model_that_does_not_fit_gets_another(
    name: str,
    change: dict[str, object],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Which is nothing to warn of."""
    install(monkeypatch, tmp_path, name)
    shape = replace(SHAPE, **change)
    caplog.set_level(logging.INFO)
    assert attention_for(shape, CPU).name == LEFT
    assert reason in caplog.text
    assert warned(caplog) == ""
    with pytest.raises(ConfigError) as caught:
        attention_for(shape, CPU, name)
    assert reason in caught.value.message


def test_what_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--attention: flashinfer can't be had: not installed; usable here: .*torch"):
        attention_for(SHAPE, CPU, "flashinfer")
    with pytest.raises(ConfigError, match=r"--attention='flash' is unknown; allowed: auto, flashinfer, flash-attn-3"):
        attention_for(SHAPE, CPU, "flash")


def test_the_doctor_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert describe_attentions()["gpu_attention"] == LEFT
    install(monkeypatch, tmp_path, "flash-attn-2", "3.1")
    install(monkeypatch, tmp_path, "flashinfer")
    monkeypatch.setattr(backends, "gpu_name", lambda: "H200")
    monkeypatch.setenv("TANDEM_GPU_KERNELS", "torch")
    found = backends.describe()
    assert (found["gpu"], found["gpu_operations"], found["gpu_attention"]) == ("H200", "torch", "flashinfer")
    assert found["gpu_attention_8_bit"] == LEFT
    refused = found["gpu_attention_refused"]
    assert isinstance(refused, dict)
    assert refused["flash-attn-3"] == "not installed"
    assert "flash-attn 3.1 is installed" in refused["flash-attn-2"]
    monkeypatch.setenv("TANDEM_ATTENTION", "flash-attn-2")
    with pytest.raises(ConfigError, match=r"TANDEM_ATTENTION: flash-attn-2 can't be had: flash-attn 3\.1"):
        backends.describe()
