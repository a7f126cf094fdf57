"""Builds a `tokenizers` tokenizer from the fields of a GGUF file.

`tokenizer.ggml.model` "gpt2" is byte-level BPE, whose pre-tokenizer `tokenizer.ggml.pre` names; "llama" is
SentencePiece's BPE with byte fallback, whose merges follow from the scores. The pre-tokenizers are those of the
models' own tokenizer.json.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tandem.errors import ModelFormatError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("default", "gpt-2", "gpt2")
_SMOLLM = ("smollm",)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
KNOWN_PRE = (*_GPT2, *_SMOLLM, *_LLAMA3, *_QWEN2)

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6


def build(fields: dict[str, Any], source: str) -> Tokenizer:
    """A tokenizer with its special tokens and bos/eos post-processor. `source` names the file in ModelFormatError."""
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelFormatError(f"{source}: the file has no vocabulary (tokenizer.ggml.tokens)")
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens, source)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens, source)
    else:
        raise ModelFormatError(f"{source}: tokenizer model {kind!r} is not supported, only gpt2 and llama are")
    _add_tokens(tokenizer, fields, tokens)
    _add_post_processor(tokenizer, fields, tokens)
    return tokenizer


def _byte_level(fields: dict[str, Any], tokens: list[str], source: str) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in KNOWN_PRE:
        raise ModelFormatError(f"{source}: pre-tokenizer {pre!r} is not known, only {', '.join(KNOWN_PRE)} are")
    merges = []
    for merge in fields.get("tokenizer.ggml.merges") or []:
        left, space, right = merge[1:].partition(" ")
        if space:
            merges.append((merge[0] + left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(pre: str) -> Any:
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _SMOLLM:
        # Digits come apart first, which matters where spaces stand before a number.
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    words = Regex(_WORDS % ("{1,3}" if pre in _LLAMA3 else ""))
    split = pre_tokenizers.Split(words, behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(fields: dict[str, Any], tokens: list[str], source: str) -> Tokenizer:
    scores = fields.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise ModelFormatError(f"{source}: a llama tokenizer needs one score per token (tokenizer.ggml.scores)")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = int(fields.get("tokenizer.ggml.unknown_token_id", 0))
    unk_token = tokens[unknown] if unknown < len(tokens) else None
    merges = _merges_from_scores(vocab, scores)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "▁")
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose piece scores best; so each way to make a piece, best piece first."""
    found: list[tuple[float, int, int, str, str]] = []
    for piece, token in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[token], vocab[left], vocab[right], left, right))
    found.sort(key=lambda item: item[:3])
    return [(left, right) for _, _, _, left, right in found]


def _add_tokens(tokenizer: Tokenizer, fields: dict[str, Any], tokens: list[str]) -> None:
    kinds = fields.get("tokenizer.ggml.token_type") or []
    special = {i for i, kind in enumerate(kinds) if kind == _CONTROL}
    special |= {fields[key] for key in _SPECIAL_KEYS if fields.get(key) is not None and fields[key] < len(tokens)}
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    user = [i for i, kind in enumerate(kinds) if kind == _USER and i not in special]
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in user])


_SPECIAL_KEYS = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def _add_post_processor(tokenizer: Tokenizer, fields: dict[str, Any], tokens: list[str]) -> None:
    """Adds bos and eos where the file asks for them; llama.cpp's defaults where it doesn't say."""
    sentencepiece = fields.get("tokenizer.ggml.model") == "llama"
    default_bos = sentencepiece or fields.get("tokenizer.ggml.pre") in _LLAMA3
    bos, eos = fields.get("tokenizer.ggml.bos_token_id"), fields.get("tokenizer.ggml.eos_token_id")
    parts, used = ["$A"], []
    if fields.get("tokenizer.ggml.add_bos_token", default_bos) and bos is not None and bos < len(tokens):
        parts.insert(0, tokens[bos])
        used.append((tokens[bos], bos))
    if fields.get("tokenizer.ggml.add_eos_token", False) and eos is not None and eos < len(tokens):
        parts.append(tokens[eos])
        used.append((tokens[eos], eos))
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=used)
