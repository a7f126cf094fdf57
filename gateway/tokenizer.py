"""Text to token ids and token ids to bytes, without torch or transformers.

Life cycle: `load_tokenizer(path)` once at start (built from a GGUF file's own fields and cached by their hash, or
read from a folder's tokenizer.json); the object is immutable afterwards and may be used from several threads.

Special tokens: in a plain text prompt and in what a chat template itself writes they are parsed; in the *content* of
a chat message they are text (`escape` marks them), so that a user can't end a turn or open another role's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from gateway import tokenizer_gguf
from gateway.gguf_header import read_header
from tandem.errors import ModelFormatError

CACHE_VERSION = 2
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TextConfig:
    """What a model's files say about text, beside the tokenizer."""

    name: str
    architecture: str
    chat_template: str | None
    bos_token: str
    eos_token: str
    max_context: int
    """Most tokens of prompt and output together; 0 when the files don't say."""


def _unicode_to_byte() -> dict[int, int]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, others move up to U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {b: b for b in printable} | {256 + i: b for i, b in enumerate(others)}


_BYTES = _unicode_to_byte()


class Tokenizer:
    """One model's tokenizer. Its decoding works on bytes, so that deltas and the whole can't differ."""

    def __init__(self, backend: tokenizers.Tokenizer, config: TextConfig) -> None:
        """`backend` must be byte-level BPE or SentencePiece-like; ModelFormatError otherwise."""
        self.config = config
        self._backend = backend
        self._plain: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._special = {added[i].content: i for i in self.special_ids if added[i].content}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._bytes, self._strips_space = _byte_table(backend, {i: token.content for i, token in added.items()})
        self._bytes_per_token = _bytes_per_token(backend, self._bytes)
        # Some vocabularies lack rare bytes: BPE leaves those out.
        self._lost_bytes = bytes({*range(256)} - {item[0] for item in self._bytes if len(item) == 1})

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; special tokens in the text are parsed. Releases the GIL: call it from a thread for long texts."""
        return _ids(self._backend, text, add_special=add_special)

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text doesn't stay under, from its size alone."""
        if not self._bytes_per_token:
            return 0
        return len(text.encode().translate(None, self._lost_bytes)) // self._bytes_per_token

    def encode_escaped(self, text: str, mark: str) -> list[int]:
        """Token ids of a rendered chat, in which `mark` stands inside every special token that is only text."""
        if mark not in text:
            return self.encode(text, add_special=False)
        ids: list[int] = []
        at = 0
        for match in self._special_pattern.finditer(text):
            ids += self._encode_plain(text[at : match.start()].replace(mark, ""))
            ids.append(self._special[match.group()])
            at = match.end()
        return ids + self._encode_plain(text[at:].replace(mark, ""))

    def escape(self, content: str, mark: str) -> str:
        """`content` with `mark` behind each character of a special token, for `encode_escaped`.

        Each, for what is left of one token may be the beginning of another.
        """
        return self._special_pattern.sub(lambda match: "".join(char + mark for char in match.group()), content)

    def _encode_plain(self, text: str) -> list[int]:
        """Special tokens as ordinary text."""
        if not text:
            return []
        with self._lock:
            if self._plain is None:
                plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
                plain.encode_special_tokens = True
                self._plain = plain
        return _ids(self._plain, text, add_special=False)

    def token_bytes(self, token: int, *, skip_special: bool) -> bytes:
        """The UTF-8 bytes (maybe a part of a character) of one token; none for an id outside the vocabulary."""
        if token >= len(self._bytes) or (skip_special and token in self.special_ids):
            return b""
        return self._bytes[token]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(self.token_bytes(token, skip_special=skip_special) for token in ids)
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_space else text


def _ids(backend: tokenizers.Tokenizer, text: str, *, add_special: bool) -> list[int]:
    """A batch of one: `encode` holds the GIL for as long as it takes, which would stop the event loop."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
    return ids


def _bytes_per_token(backend: tokenizers.Tokenizer, table: Sequence[bytes]) -> int:
    """Most bytes of text that one token can stand for; 0 where nothing is known."""
    added = backend.get_added_tokens_decoder().values()
    # NFC can make a third of the bytes; of what other normalizers do, and tokens that eat spaces, nothing is known.
    shrink = {"": 1, "NFC": 3}.get(type(backend.normalizer).__name__ if backend.normalizer else "", 0)
    fuses = getattr(backend.model, "unk_token", None) is not None
    if fuses or any(token.lstrip or token.rstrip for token in added):
        return 0
    return shrink * max(map(len, table), default=0)


def _byte_table(backend: tokenizers.Tokenizer, added: dict[int, str]) -> tuple[list[bytes], bool]:
    """Bytes of each token id, and whether a whole text loses the space that encoding put in front."""
    decoder = json.dumps(json.loads(backend.decoder.__getstate__())) if backend.decoder else ""
    byte_level = '"ByteLevel"' in decoder
    if not byte_level and "\\u2581" not in decoder:
        raise ModelFormatError("the tokenizer's decoder is neither byte-level nor SentencePiece-like")
    size = backend.get_vocab_size(with_added_tokens=True)
    vocab = backend.get_vocab(with_added_tokens=True)
    table = [b""] * max(size, 1 + max(vocab.values(), default=0))
    for text, token in vocab.items():
        table[token] = _from_alphabet(text) if byte_level else _from_piece(text)
    for token, text in added.items():
        table[token] = text.encode("utf-8", "replace")
    return table, '"Strip"' in decoder or '"Metaspace"' in decoder


def _from_alphabet(text: str) -> bytes:
    try:
        return text.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def _from_piece(text: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.replace("▁", " ").encode("utf-8", "replace")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file or a Hugging Face folder. Raises ModelFormatError."""
    path = Path(path)
    if path.is_dir():
        from gateway.tokenizer_hf import load_folder

        return Tokenizer(*load_folder(path))
    fields, digest = read_header(path)
    return Tokenizer(_cached(fields, digest, str(path)), _gguf_config(fields, path))


def _gguf_config(fields: dict[str, Any], path: Path) -> TextConfig:
    architecture = str(fields.get("general.architecture", ""))
    tokens = fields.get("tokenizer.ggml.tokens") or []

    def token(key: str) -> str:
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if index is not None and index < len(tokens) else ""

    return TextConfig(
        name=path.stem,
        architecture=architecture,
        chat_template=fields.get("tokenizer.chat_template"),
        bos_token=token("bos"),
        eos_token=token("eos"),
        max_context=int(fields.get(f"{architecture}.context_length", 0)),
    )


def cache_dir() -> Path:
    """$TANDEM_CACHE_DIR, or the user's cache folder."""
    configured = os.environ.get("TANDEM_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "tandem"


def _cached(fields: dict[str, Any], digest: str, source: str) -> tokenizers.Tokenizer:
    """Reads the built tokenizer from the cache, or builds and keeps it. A cache that can't be used costs time only."""
    file = cache_dir() / "tokenizers" / f"{digest}-{CACHE_VERSION}-{tokenizers.__version__}.json"
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception:  # `tokenizers` raises bare Exception for a missing or damaged file
        backend = tokenizer_gguf.build(fields, source)
    _keep(file, backend.to_str())
    return backend


def _keep(file: Path, text: str) -> None:
    """Writes atomically; does without where the folder isn't writable."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as part:
            undo.callback(Path(part.name).unlink, missing_ok=True)  # a full disk must not fill further
            part.write(text)
        Path(part.name).replace(file)
