"""`calibrate_folder`: what tools are told and what becomes of what they write. Fakes stand for the tools."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.quantizers.tiny import save_tiny as save_model_of_the_tools
from engine import calibrating
from engine.calibrating import calibrate_folder
from engine.describing import describe
from tandem.errors import ConfigError, ModelFormatError

DATA = Path(__file__).parents[2] / "data" / "quantized"


class Tools:
    """GPTQModel and AutoRound, as far as they are used: they copy what the real ones wrote of this model."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.samples: list[list[int]] = []
        self.writes = "gptq"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(DATA / self.writes / name, folder / name)

    def gptqmodel(self) -> SimpleNamespace:
        def quantize(samples: list[dict[str, list[int]]], batch_size: int) -> None:
            self.samples = [sample["input_ids"] for sample in samples]
            assert all(len(sample["attention_mask"]) == len(sample["input_ids"]) for sample in samples)

        model = SimpleNamespace(quantize=quantize, save=lambda folder: self.write(Path(folder)))
        return SimpleNamespace(QuantizeConfig=self._keep, GPTQModel=SimpleNamespace(load=lambda source, _: model))

    def auto_round(self) -> SimpleNamespace:
        def save(output_dir: str, format: str) -> None:
            assert format == "auto_round"
            self.write(Path(output_dir) / "tiny-w4g128")

        def build(model: Any, tokenizer: Any, **settings: Any) -> SimpleNamespace:
            self.samples = [sample[0].tolist() for sample in settings.pop("dataset")]
            self._keep(**settings)
            return SimpleNamespace(quantize_and_save=save)

        return SimpleNamespace(AutoRound=build)

    def _keep(self, **settings: Any) -> None:
        self.settings = settings


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    made = Tools()
    monkeypatch.setitem(sys.modules, "gptqmodel", made.gptqmodel())
    monkeypatch.setitem(sys.modules, "auto_round", made.auto_round())
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model_of_the_tools(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """1,200 tokens: two samples and a rest."""
    path = tmp_path / "text"
    path.write_text("abcdefgh" * 150)
    return path


@pytest.mark.parametrize(
    ("form", "writes", "told"),
    [
        ("gptq", "gptq", {"bits": 4, "group_size": 128, "device": "cpu"}),
        ("awq", "awq", {"bits": 4, "group_size": 128, "method": "awq", "format": "gemm", "sym": False}),
        ("auto-round", "auto-round", {"bits": 4, "group_size": 128, "nsamples": 2, "seqlen": 512, "batch_size": 2}),
    ],
)
def test_a_tool_is_told_and_its_folder_served(
    form: str, writes: str, told: dict[str, Any], source: Path, text: Path, tools: Tools
) -> None:
    tools.writes = writes
    out = source.with_name("out")
    calibrate_folder(source, out, form, text)
    assert tools.settings.items() >= told.items()
    assert [len(sample) for sample in tools.samples] == [512, 512]
    assert tools.samples[0][:3] == [ord(letter) for letter in "abc"]
    assert "int4, groups of" in describe(out)["holds"]
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [path for path in out.iterdir() if path.is_dir()]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "text", "tiny"]


def test_no_more_of_a_text_than_is_good(
    source: Path, text: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "LENGTH", 100)
    monkeypatch.setattr(calibrating, "SAMPLES", 3)
    calibrate_folder(source, source.with_name("out"), "gptq", text)
    assert [len(sample) for sample in tools.samples] == [100] * 3


@pytest.mark.parametrize(
    ("form", "module", "extra"),
    [("gptq", "gptqmodel", "gptq"), ("awq", "gptqmodel", "gptq"), ("auto-round", "auto_round", "auto-round")],
)
def test_a_tool_that_isn_t_there_is_named(
    form: str, module: str, extra: str, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module} is needed .*pip install 'tandem-serve\[{extra}\]'"):
        calibrate_folder(source, source.with_name("out"), form, text)
    assert sorted(path.name for path in source.parent.iterdir()) == ["text", "tiny"]


def test_refusals(source: Path, text: Path, tools: Tools) -> None:
    out = source.with_name("out")
    with pytest.raises(ConfigError, match="'gptq9' is unknown; allowed: int4, int8, fp8, gptq, awq, auto-round"):
        calibrate_folder(source, out, "gptq9", text)
    with pytest.raises(ConfigError, match=r"--text: .*nowhere can't be read: No such file"):
        calibrate_folder(source, out, "gptq", text.with_name("nowhere"))
    text.write_text("short")
    (source / "tokenizer.json").rename(source / "other.json")
    with pytest.raises(ConfigError, match="has no tokenizer that can be read"):
        calibrate_folder(source, out, "gptq", text)
    (source / "other.json").rename(source / "tokenizer.json")
    with pytest.raises(ConfigError, match="has 5 tokens; at least 512 are needed"):
        calibrate_folder(source, out, "gptq", text)
    assert not out.exists()


def test_what_tandem_can_t_read_is_not_kept(source: Path, text: Path, tools: Tools) -> None:
    def broken(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DATA / "gptq" / "config.json", folder / "config.json")

    tools.write = broken  # type: ignore[method-assign]
    with pytest.raises(ModelFormatError, match="holds a tokenizer but no weights"):
        calibrate_folder(source, source.with_name("out"), "gptq", text)
    assert sorted(path.name for path in source.parent.iterdir()) == ["text", "tiny"]
