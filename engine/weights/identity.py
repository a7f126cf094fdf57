"""`model_id`: two workers may exchange KV only when theirs are equal.

It digests every tensor as stored, the RoPE settings and the model's shape; names and places of files do not count.
A large file takes seconds, so the answer is remembered under $TANDEM_CACHE_DIR by the files' real paths, sizes, times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Final

from engine.config import ModelConfig
from engine.weights.checkpoint import Checkpoint, StoredTensor, open_checkpoint

VERSION: Final = 1
"""Raised when what is digested changes."""
NOT_IDENTITY: Final = ("name", "quantization")
"""Fields of ModelConfig that are for people."""


def model_id(path: str | Path) -> str:
    """The model's identity: 64 hexadecimal digits. Raises ModelFormatError as `open_checkpoint`."""
    checkpoint = open_checkpoint(path)
    try:
        return checkpoint_id(checkpoint)
    finally:
        checkpoint.close()


def checkpoint_id(checkpoint: Checkpoint) -> str:
    """As `model_id`, of an open checkpoint."""
    remembered = _cache_dir() / f"{_files_key(checkpoint)}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = remembered.read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    identity = _digest(checkpoint)
    _remember(remembered, identity)
    return identity


def _digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the shape and every tensor's own digest, on a few threads (hashlib releases the GIL)."""
    total = hashlib.sha256(_config_bytes(checkpoint.config))
    total.update(checkpoint.coding.encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for tensor, digest in pool.map(_digest_tensor, checkpoint.stored()):
            total.update(f"{tensor.name}:{tensor.type}:{tensor.shape}:".encode())
            total.update(digest)
            checkpoint.release(tensor.name)
    return total.hexdigest()


def _digest_tensor(tensor: StoredTensor) -> tuple[StoredTensor, bytes]:
    return tensor, hashlib.sha256(tensor.data).digest()


def _config_bytes(config: ModelConfig) -> bytes:
    """The fields that count, in a fixed spelling."""
    fields = {key: value for key, value in asdict(config).items() if key not in NOT_IDENTITY}
    return json.dumps({"version": VERSION, **fields}, sort_keys=True).encode()


def _cache_dir() -> Path:
    root = os.environ.get("TANDEM_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "tandem") / "model_ids"


def _files_key(checkpoint: Checkpoint) -> str:
    """What the cached answer is good for: these files, untouched, read by this version into this shape."""
    facts: list[object] = []
    for path in checkpoint.files:
        status = path.stat()
        facts.append([str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino])
    key = hashlib.sha256(json.dumps(facts).encode())
    key.update(_config_bytes(checkpoint.config))
    key.update(checkpoint.coding.encode())
    return key.hexdigest()[:32]


def _remember(path: Path, identity: str) -> None:
    """Written to a temporary name and renamed: no reader sees half. Without a writable cache it is digested again."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        undo.callback(Path(temporary).unlink, missing_ok=True)  # a full disk must not fill further
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(identity + "\n")
        Path(temporary).replace(path)
