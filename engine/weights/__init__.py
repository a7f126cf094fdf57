"""Model files: GGUF and Hugging Face safetensors behind one protocol."""

from __future__ import annotations

from engine.weights.checkpoint import Checkpoint, open_checkpoint, read_config
from engine.weights.identity import checkpoint_id, model_id

__all__ = ["Checkpoint", "checkpoint_id", "model_id", "open_checkpoint", "read_config"]
