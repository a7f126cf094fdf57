"""A Hugging Face folder in bfloat16 from a GGUF file: python -m bench.peers.hf_folder MODEL.gguf FOLDER"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Writes `folder` anew; it appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
