"""What a model is (`ModelConfig`) and how the engine runs it (`EngineConfig`).

Both are frozen, and every "auto" is resolved before construction.

Torch-free. `ModelConfig` is built by `engine.weights` from a checkpoint's own metadata; `EngineConfig` is built by
`resolve_engine_config` from flags, or directly in tests. Both are immutable and may be shared between threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final, Literal

from tandem.errors import ConfigError

DeviceKind = Literal["cpu", "cuda"]
Compute = Literal["exact", "bf16", "int8", "native", "fp8", "int4"]
Dtype = Literal["float32", "bfloat16", "float16"]
KvDtype = Literal["float32", "bfloat16", "float16", "int8", "float8_e4m3"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]

ROPE_KINDS: Final = ("default", "linear", "llama3", "yarn")
DEVICES: Final = ("auto", "cpu", "cuda")
COMPUTES: Final = ("auto", "exact", "bf16", "int8")
GPU_COMPUTES: Final = ("auto", "native", "fp8", "int8", "int4")
DTYPES: Final = ("auto", "float32", "bfloat16")
GPU_DTYPES: Final = (*DTYPES, "float16")
DTYPE_ALIASES: Final = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}
DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_DTYPES: Final = ("auto", "float32", "bfloat16", "int8", "fp8_e4m3")
GPU_KV_DTYPES: Final = (*KV_DTYPES, "float16")
KV_DTYPE_NAMES: Final[Mapping[str, KvDtype]] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8",
    "fp8_e4m3": "float8_e4m3",
}
KV_DTYPE_BYTES: Final[Mapping[str, int]] = {**DTYPE_BYTES, "int8": 1, "float8_e4m3": 1}
KV_QUANTIZED: Final = ("int8", "float8_e4m3")
SCALE_BYTES: Final = 4
BLOCK_SIZES: Final = (1, 256)
ATTENTIONS: Final = ("auto", "flashinfer", "flash-attn-3", "flash-attn-2", "triton", "torch")
"""Of a GPU (`kernels.attentions`, which says what can be had)."""

CGROUP_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""A container's memory limit as it sees it, in bytes: cgroup version 2, and 1."""

BY_FREE_MEMORY: Final = 0
"""`EngineConfig.num_blocks` of a GPU until the model is loaded: as many as its memory then holds."""
DEFAULT_NUM_BLOCKS: Final = 2048
GPU_STEP_TOKENS: Final = 8192
GPU_SEQUENCES: Final = 256
DEFAULT_KV_SHARE: Final = 0.125
"""Share of the machine's memory that the KV cache may grow to when nothing is said; workers share machines."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding, as `engine.models.rope` turns it into tables.

    `kind` says which fields count: "linear" uses `factor`; "llama3" also `low_freq_factor`, `high_freq_factor` and
    `original_max_context`; "yarn" uses `factor`, `original_max_context`, `beta_fast`, `beta_slow`, `truncate`,
    `mscale`, `mscale_all_dim` and `attention_factor` (None: derived from `factor`).
    """

    theta: float
    rotary_dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] | None = None
    """Divisors of the inverse frequencies [rotary_dim/2], as GGUF stores them (`rope_freqs.weight`); None: all 1."""
    interleaved: bool = False
    """False: halves are paired (NeoX); True: neighbours are paired (GPT-J)."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one model; widths in elements, lengths in tokens."""

    architecture: str
    """One of `engine.models.registry.ARCHITECTURES`: llama, mistral, qwen2, qwen3."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_eps: float
    rope: RopeConfig
    max_context: int
    sliding_window: int | None = None
    """A query at position p sees positions > p - sliding_window; None: all."""
    sliding_layers: tuple[bool, ...] | None = None
    """Which layers have the window; None: all of them (when `sliding_window` is set)."""
    tie_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q, k and v."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    quantization: str = "none"
    """What the file holds, for people: the commonest tensor type, such as "Q4_1" or "bfloat16"."""
    name: str = ""

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens, or None when it sees everything."""
        if self.sliding_window is None:
            return None
        if self.sliding_layers is not None and not self.sliding_layers[layer]:
            return None
        return self.sliding_window

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of K and V that one token takes over all layers."""
        return self.kv_rows_per_token * self.head_dim

    @property
    def kv_rows_per_token(self) -> int:
        """Keys and values of single heads that one token has over all layers."""
        return 2 * self.num_layers * self.num_kv_heads


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one engine runs one model; sizes in tokens, blocks or bytes as named."""

    model: str
    """Path of a GGUF file or a Hugging Face folder."""
    device: DeviceKind = "cpu"
    """"cuda" is what torch calls a GPU, AMD's too; which of several, CUDA_VISIBLE_DEVICES says."""
    compute: Compute = "exact"
    """"exact": float32 products in a fixed order, a row's bits depend on nothing else. "int8": int8 activations and the
    weights' own 4 or 8 bits, the fastest; a row's bits depend on nothing else either. "bf16": not row-invariant.
    On a GPU, where nothing is row-invariant and activations have `dtype`, "native" has weights in it too; "fp8" and
    "int8" round weights and what they are multiplied with to 8 bits; "int4" weights alone, or takes a file's codes."""
    dtype: Dtype = "float32"
    """What the weights of the big products are held in; means nothing with compute int8. A CPU's activations are
    float32."""
    kv_dtype: KvDtype = "float32"
    """int8 and float8_e4m3 have a scale for each position and head (`kernels.kv_codes`). On a GPU these or `dtype`."""
    block_size: int = 16
    num_blocks: int = DEFAULT_NUM_BLOCKS
    max_step_tokens: int = 512
    """The token budget of one step (prefill's chunk size)."""
    max_sequences: int = 64
    prefix_cache: bool = True
    threads: int | None = None
    """OpenMP threads; None: the machine's choice."""
    max_context: int | None = None
    """Lowers the model's own limit; None: the model's."""
    share_weights: bool = True
    """One copy of the packed weights for this user's processes on this machine (compute int8, Linux)."""
    graphs: bool = True
    """Capture decode steps as graphs, where the device can."""
    gpu_share: float = 1.0
    """Of a GPU's memory: what this process may take, over 0 up to 1. Others may be on the same GPU."""
    attention: str = "auto"
    """On a GPU: one of ATTENTIONS, by which nothing starts if it can't be had; "auto": the best that can."""

    def context_limit(self, model: ModelConfig) -> int:
        """The longest sequence in tokens that this engine serves of `model`."""
        return model.max_context if self.max_context is None else min(self.max_context, model.max_context)

    def block_bytes(self, model: ModelConfig) -> int:
        """Bytes of one KV block over all layers, scales included."""
        return self.scales_at(model) + self.block_size * model.kv_rows_per_token * self._scale_bytes

    def scales_at(self, model: ModelConfig) -> int:
        """Where a block's scales begin, in bytes: behind its elements, at a multiple of 4."""
        elements = self.block_size * model.kv_elements_per_token
        return -(-elements * KV_DTYPE_BYTES[self.kv_dtype] // SCALE_BYTES) * SCALE_BYTES

    def kv_token_bytes(self, model: ModelConfig) -> int:
        """Bytes of one token's keys and values over all layers, scales included."""
        elements = model.kv_elements_per_token * KV_DTYPE_BYTES[self.kv_dtype]
        return elements + model.kv_rows_per_token * self._scale_bytes

    @property
    def _scale_bytes(self) -> int:
        """Of one position and head."""
        return SCALE_BYTES if self.kv_dtype in KV_QUANTIZED else 0


Settings = Mapping[str, object]

SETTINGS: Final = (*(f.name for f in fields(EngineConfig)), "kv_memory")
"""Keys of `resolve_engine_config`: EngineConfig's fields and `kv_memory` (bytes, in place of `num_blocks`)."""


def resolve_engine_config(
    settings: Settings,
    model_config: ModelConfig | None = None,
    *,
    fastest: Compute = "exact",
    found: DeviceKind = "cpu",
) -> EngineConfig:
    """Turn flags into an `EngineConfig`: "auto" (or None, or a missing key) becomes a concrete value.

    `fastest` is what compute "auto" becomes on a CPU when dtype is "auto" too, `found` what device "auto" becomes
    (`engine.loading.resolve` knows the machine).

    `settings` has keys from `SETTINGS`; `model` is required. `model_config` (from `engine.weights.read_config`) lets
    `num_blocks` follow memory; without it "auto" is `DEFAULT_NUM_BLOCKS`, and `kv_memory` is refused. On a GPU "auto"
    is `BY_FREE_MEMORY`. Raises ConfigError with the key and the allowed values.
    """
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(SETTINGS))}")
    device = resolve_device(settings, found)
    gpu = device == "cuda"
    compute = _resolve_compute(settings, device, fastest)
    dtype = _resolve_dtype(settings, "bfloat16" if gpu or compute == "bf16" else "float32", gpu)
    if compute == "bf16" and dtype != "bfloat16":
        raise ConfigError(f"dtype: compute bf16 holds weights in bfloat16, not {dtype}; use dtype bfloat16 or auto")
    model = settings.get("model")
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise ConfigError("model: must be the path of a GGUF file or a Hugging Face folder")
    config = EngineConfig(
        model=str(os.fspath(model)),
        device=device,
        compute=compute,
        dtype=dtype,
        kv_dtype=_resolve_kv_dtype(settings, compute, dtype, gpu),
        block_size=_integer(settings, "block_size", 16, *BLOCK_SIZES),
        num_blocks=DEFAULT_NUM_BLOCKS,
        max_step_tokens=_integer(settings, "max_step_tokens", GPU_STEP_TOKENS if gpu else 512, 1, 1 << 16),
        max_sequences=_integer(settings, "max_sequences", GPU_SEQUENCES if gpu else 64, 1, 4096),
        prefix_cache=_boolean(settings, "prefix_cache", True),
        threads=_optional_integer(settings, "threads", 1, 1024),
        max_context=_optional_integer(settings, "max_context", 1, 1 << 24),
        share_weights=_boolean(settings, "share_weights", True),
        graphs=_boolean(settings, "graphs", True),
        gpu_share=_share(settings, "gpu_share"),
        attention=_resolve_attention(settings, gpu),
    )
    return replace(config, num_blocks=_resolve_num_blocks(settings, config, model_config))


def resolve_device(settings: Settings, found: DeviceKind) -> DeviceKind:
    """The device that `settings` ask for; "auto" is `found`. Raises ConfigError."""
    chosen = _choice(settings, "device", DEVICES)
    return found if chosen == "auto" else "cuda" if chosen == "cuda" else "cpu"


def _resolve_compute(settings: Settings, device: DeviceKind, fastest: Compute) -> Compute:
    """auto is never bf16: its products are not row-invariant, so somebody must choose that."""
    if device == "cuda":
        asked = _choice(settings, "compute", GPU_COMPUTES)
        return "fp8" if asked == "fp8" else "int8" if asked == "int8" else "int4" if asked == "int4" else "native"
    chosen = _choice(settings, "compute", COMPUTES)
    any_dtype = _choice(settings, "dtype", DTYPES, DTYPE_ALIASES) == "auto"
    if chosen == "int8" and not any_dtype:
        raise ConfigError("dtype: compute int8 holds weights in 4 or 8 bits; leave dtype auto")
    if chosen == "auto":
        return fastest if any_dtype else "exact"
    return "int8" if chosen == "int8" else "bf16" if chosen == "bf16" else "exact"


def _resolve_dtype(settings: Settings, automatic: Dtype, gpu: bool) -> Dtype:
    chosen = _choice(settings, "dtype", GPU_DTYPES if gpu else DTYPES, DTYPE_ALIASES)
    if chosen == "float32":
        return "float32"
    return "bfloat16" if chosen == "bfloat16" else "float16" if chosen == "float16" else automatic


def _resolve_kv_dtype(settings: Settings, compute: Compute, dtype: Dtype, gpu: bool) -> KvDtype:
    aliases = {**DTYPE_ALIASES, "float8_e4m3": "fp8_e4m3", "fp8": "fp8_e4m3"}
    asked = _choice(settings, "kv_dtype", GPU_KV_DTYPES if gpu else KV_DTYPES, aliases)
    automatic: KvDtype = dtype if gpu else "float32" if compute == "exact" else "bfloat16"
    chosen = KV_DTYPE_NAMES.get(asked, automatic)
    if gpu and chosen not in (dtype, *KV_QUANTIZED):
        raise ConfigError(
            f"kv_dtype: on a GPU keys and values have the dtype of activations, {dtype}, or are int8 or fp8_e4m3; "
            f"not {chosen}"
        )
    return chosen


def _resolve_attention(settings: Settings, gpu: bool) -> str:
    chosen = _choice(settings, "attention", ATTENTIONS)
    if chosen != "auto" and not gpu:
        raise ConfigError(f"attention: {chosen} is for GPUs; on a CPU leave attention auto")
    return chosen


def _resolve_num_blocks(settings: Settings, config: EngineConfig, model: ModelConfig | None) -> int:
    """Explicit blocks, else as many as `kv_memory` holds, else a share of the machine's memory, no more than useful."""
    explicit = _optional_integer(settings, "num_blocks", 1, 1 << 26)
    memory = _optional_integer(settings, "kv_memory", 1, 1 << 50)
    if explicit is not None and memory is not None:
        raise ConfigError("kv_memory: give num_blocks or kv_memory, not both")
    if explicit is not None:
        return explicit
    if config.device == "cuda" and memory is None:
        return BY_FREE_MEMORY
    if model is None:
        if memory is not None:
            raise ConfigError("kv_memory: needs the model's shape; give num_blocks")
        return DEFAULT_NUM_BLOCKS
    block_bytes = config.block_bytes(model)
    if memory is not None:
        if memory < block_bytes:
            raise ConfigError(f"kv_memory: {memory} bytes hold no block; one block takes {block_bytes} bytes")
        return memory // block_bytes
    useful = config.max_sequences * -(-config.context_limit(model) // config.block_size)
    return max(1, min(useful, int(machine_memory() * DEFAULT_KV_SHARE) // block_bytes))


def _choice(settings: Settings, key: str, allowed: tuple[str, ...], aliases: Mapping[str, str] | None = None) -> str:
    value = settings.get(key)
    if value is None:
        return "auto"
    text = str(value)
    text = (aliases or {}).get(text, text)
    if text not in allowed:
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(allowed)}")
    return text


def _integer(settings: Settings, key: str, default: int, low: int, high: int) -> int:
    value = _optional_integer(settings, key, low, high)
    return default if value is None else value


def _optional_integer(settings: Settings, key: str, low: int, high: int) -> int | None:
    value = settings.get(key)
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{key}: {value!r} is not an integer between {low} and {high}")
    return value


def _boolean(settings: Settings, key: str, default: bool) -> bool:
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: {value!r} is not true or false")
    return value


def _share(settings: Settings, key: str) -> float:
    value = settings.get(key)
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"{key}: {value!r} is not a number over 0, at most 1")
    return float(value)


def machine_memory() -> int:
    """Bytes of physical memory, or what this container may use of it when that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        # Not there, or "max".
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path(path).read_text(encoding="ascii")))
    return memory
