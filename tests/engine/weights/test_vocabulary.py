"""Two models' vocabularies are told apart, whatever their files' formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.weights.gguf_header import read_texts
from engine.weights.mapping import MappedFile
from engine.weights.vocabulary import check_same_vocabulary, token_texts
from tandem.errors import ConfigError, ModelFormatError

SIZE = 64


def with_tokenizer(folder: Path, vocab: Any, added: list[dict[str, Any]] | None = None) -> str:
    """Puts a tokenizer.json into a folder."""
    content = {"model": {"vocab": vocab}, "added_tokens": added or []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_texts_of_a_gguf_file(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(fields={"general.tags": ["a", "b"]})
    assert token_texts(str(path)) == {i: f"token{i}" for i in range(5000)}
    file = MappedFile(path)
    assert read_texts(file, "general.tags") == ["a", "b"]
    assert read_texts(file, "missing") == []
    with pytest.raises(ModelFormatError, match="array of strings"):
        read_texts(file, "llama.block_count")
    file.close()


def test_texts_of_a_folder(write_folder: Callable[..., Path]) -> None:
    folder = write_folder()
    assert token_texts(str(folder)) == {}
    added = [{"id": 2, "content": "<end>"}]
    assert token_texts(with_tokenizer(folder, {"a": 0, "b": 1, "x": 2}, added)) == {0: "a", 1: "b", 2: "<end>"}
    assert token_texts(with_tokenizer(folder, [["a", -1.0], ["b", -2.0]])) == {0: "a", 1: "b"}


def test_the_same_vocabulary_in_two_formats(write_gguf: Callable[..., Path], write_folder: Callable[..., Path]) -> None:
    gguf, folder = str(write_gguf()), write_folder({"vocab_size": SIZE})
    check_same_vocabulary(str(folder), gguf, flag="--draft-model")  # one of them has no texts
    check_same_vocabulary(with_tokenizer(folder, {f"token{i}": i for i in range(SIZE)}), gguf, flag="--draft-model")
    with pytest.raises(ConfigError, match=r"--draft-model: .* token 3 is 'other', in the model it is 'token3'"):
        check_same_vocabulary(with_tokenizer(folder, {"token0": 0, "other": 3}), gguf, flag="--draft-model")


def test_another_number_of_ids(write_gguf: Callable[..., Path], write_folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"has 40 token ids, the model has 64"):
        check_same_vocabulary(str(write_folder({"vocab_size": 40})), str(write_gguf()), flag="--draft-model")
