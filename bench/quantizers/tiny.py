"""A random model of two layers with a tokenizer, small enough to keep its quantised forms beside the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 256
WIDTH = 128


def save_tiny(folder: Path) -> None:
    """Writes `folder`: Llama's shape with groups of 128 and blocks of 128 x 128 fitting every layer."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # With larger weights a random model makes much of every rounding, with smaller ones it repeats itself.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    letters = {chr(code): code for code in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=chr(2)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token=chr(1), pad_token=chr(1)).save_pretrained(folder)


def calibration(folder: Path, samples: int = 16, length: int = 256) -> list[list[int]]:
    """Token ids to calibrate with: random ones for the tiny model, the system's licences for others."""
    from transformers import AutoConfig, AutoTokenizer

    if AutoConfig.from_pretrained(folder).vocab_size == VOCABULARY:
        generator = torch.Generator().manual_seed(5)
        return torch.randint(2, VOCABULARY, (samples, length), generator=generator).tolist()
    files = sorted(path for path in Path("/usr/share/common-licenses").glob("*") if not path.is_symlink())
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)
    ids = AutoTokenizer.from_pretrained(folder)(text[: samples * length * 8])["input_ids"]
    return [ids[start : start + length] for start in range(0, samples * length, length)]
