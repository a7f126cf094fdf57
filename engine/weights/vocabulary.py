"""Which text each token id stands for, to tell whether two models speak of the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.weights.checkpoint import read_config
from engine.weights.gguf_header import read_texts
from engine.weights.hf_config import read_json
from engine.weights.mapping import MappedFile
from tandem.errors import ConfigError

GGUF_TOKENS = "tokenizer.ggml.tokens"


def check_same_vocabulary(path: str, model: str, *, flag: str) -> None:
    """Raises ConfigError, naming `flag`, unless the model at `path` has the token ids of `model`.

    Their number must be equal, and so must the texts, as far as both models' files have them. ModelFormatError: a file
    can't be read.
    """
    theirs, ours = read_config(path).vocab_size, read_config(model).vocab_size
    if theirs != ours:
        raise ConfigError(f"{flag}: {path} has {theirs} token ids, the model has {ours}; they must be the same")
    texts = token_texts(model)
    for token, text in token_texts(path).items():
        if texts.get(token, text) != text:
            raise ConfigError(
                f"{flag}: {path} has another vocabulary: token {token} is {text!r}, in the model it is {texts[token]!r}"
            )


def token_texts(path: str) -> Mapping[int, str]:
    """The texts of token ids as the model's own files spell them; empty when they have no vocabulary."""
    where = Path(path).expanduser()
    if where.is_dir():
        return _from_tokenizer_json(where / "tokenizer.json")
    file = MappedFile(where)
    try:
        return dict(enumerate(read_texts(file, GGUF_TOKENS)))
    finally:
        file.close()


def _from_tokenizer_json(path: Path) -> Mapping[int, str]:
    """`model.vocab` is text -> id (BPE, WordPiece) or a list of (text, score) by id (Unigram)."""
    if not path.exists():
        return {}
    content = read_json(path)
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    texts: dict[int, str] = {}
    if isinstance(vocab, dict):
        texts = {token: text for text, token in vocab.items() if isinstance(token, int)}
    elif isinstance(vocab, list):
        texts = {token: str(entry[0]) for token, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            texts[entry["id"]] = str(entry.get("content"))
    return texts
