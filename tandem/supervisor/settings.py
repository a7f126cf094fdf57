"""What `tandem up` was asked for, and the command lines that follow from it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tandem
from tandem.errors import ConfigError
from tandem.service.address import Address
from tandem.service.tls import TlsFiles

Role = Literal["prefill", "decode", "gateway"]
MODULES: dict[Role, str] = {"prefill": "prefill_service", "decode": "decode_service", "gateway": "gateway"}
MAX_WORKERS = 64
LAUNCHER = str(Path(__file__).with_name("launch.py"))


LEAST: dict[str, int] = {
    "block_size": 1,
    "prefill_block_size": 1,
    "num_blocks": 1,
    "kv_memory": 1,
    "chunk_size": 1,
    "max_sequences": 1,
    "threads": 1,
    "max_queue": 1,
    "local_prefill_threshold": 0,
    "drain_grace": 0,
    "speculation_tokens": 1,
}
"""The least value of each number that may be given; what a worker knows better, it says itself."""


@dataclass(frozen=True, slots=True)
class UpSettings:
    """Everything that `tandem up` can be told. None leaves a worker's own default."""

    model: Path
    gateway: Address
    http: Address
    gateways: int = 1
    prefill: int = 1
    decode: int = 1
    transport: str | None = None
    device: str | None = None
    compute: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    prefill_kv_dtype: str | None = None
    """Of prefill workers; decode workers then convert what they receive."""
    block_size: int | None = None
    prefill_block_size: int | None = None
    num_blocks: int | None = None
    kv_memory: int | None = None
    chunk_size: int | None = None
    max_sequences: int | None = None
    threads: int | None = None
    prefix_cache: bool = True
    share_weights: bool = True
    max_context: int | None = None
    graphs: bool = True
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them: workers take them by turns, prefill first. Empty: all workers the first."""
    gpu_share: float | None = None
    """None: workers that start on the same GPU share it equally."""
    attention: str | None = None
    drain_grace: float = 10.0
    speculation: str | None = None
    speculation_tokens: int | None = None
    speculation_fixed: bool = False
    draft_model: Path | None = None
    self_draft_layers: str | None = None
    eagle_head: Path | None = None
    local_prefill_threshold: int | None = None
    max_queue: int | None = None
    default_timeout: float | None = None
    log_level: str = "warning"
    tls: TlsFiles | None = None
    tls_client_auth: str = "none"
    api_keys: Path | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError, with the flag's name, for numbers that can't work."""
        for name, least in LEAST.items():
            self._check_number(name, least)
        if self.default_timeout is not None and not 0 < self.default_timeout < math.inf:
            raise ConfigError(f"--default-timeout: must be more than 0 seconds, got {self.default_timeout:g}")
        if self.gpu_share is not None and not 0 < self.gpu_share <= 1:
            raise ConfigError(f"--gpu-share: must be over 0, at most 1, got {self.gpu_share:g}")
        if any(not gpu or "," in gpu for gpu in self.gpus):
            raise ConfigError("--gpus: must be numbers or names of GPUs with commas between, such as 0,1")
        check_count("prefill", self.prefill)
        check_count("decode", self.decode)
        if not 1 <= self.gateways <= MAX_WORKERS:
            raise ConfigError(f"--gateways: must be 1 to {MAX_WORKERS}, got {self.gateways}")
        if self.tls is None and self.tls_client_auth != "none":
            raise ConfigError("--tls-client-auth: it needs --tls-cert, --tls-key and --tls-ca")
        for flag, address in (("--gateway", self.gateway), ("--http", self.http)):
            if address.port and address.port + self.gateways - 1 > 65535:
                raise ConfigError(f"{flag}: no room for {self.gateways} ports from {address.port}")

    def _check_number(self, name: str, least: int) -> None:
        value: float | None = getattr(self, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')}: must be {least} or more, got {value:g}")


def check_count(role: str, count: int) -> None:
    """Raises ConfigError unless `count` workers of `role` make sense: prefill 0 is the aggregated mode, decode needs
    one.
    """
    least = 0 if role == "prefill" else 1
    if not least <= count <= MAX_WORKERS:
        raise ConfigError(f"{role}: must be {least} to {MAX_WORKERS} workers, got {count}")


def share_of_gpu(settings: UpSettings) -> float | None:
    """What a worker is told of its GPU's memory; None: nothing, as it has one for itself or none."""
    if settings.gpu_share is not None or settings.device == "cpu":
        return settings.gpu_share
    together = math.ceil((settings.prefill + settings.decode) / max(1, len(settings.gpus)))
    return None if together == 1 else math.floor(1000 / together) / 1000


def gpu_variables(settings: UpSettings, role: Role, index: int) -> dict[str, str]:
    """Environment of the worker with this number among its role's: the GPU that is its own."""
    if not settings.gpus or role == "gateway":
        return {}
    place = index if role == "prefill" else settings.prefill + index
    return {"CUDA_VISIBLE_DEVICES": settings.gpus[place % len(settings.gpus)]}


def worker_arguments(settings: UpSettings, role: Role) -> list[str]:
    """Flags of a prefill or decode worker."""
    prefill = role == "prefill"
    own_size = settings.prefill_block_size if prefill else None
    own_dtype = settings.prefill_kv_dtype if prefill else None
    values: dict[str, object] = {
        "--model": settings.model,
        "--listen": "127.0.0.1:0",
        "--metrics": "127.0.0.1:0",
        "--device": settings.device,
        "--compute": settings.compute,
        "--dtype": settings.dtype,
        "--kv-dtype": own_dtype or settings.kv_dtype,
        "--block-size": own_size or settings.block_size,
        "--num-blocks": settings.num_blocks,
        "--kv-memory": settings.kv_memory,
        "--chunk-size": settings.chunk_size,
        "--max-sequences": settings.max_sequences,
        "--max-context": settings.max_context,
        "--gpu-share": share_of_gpu(settings),
        "--attention": settings.attention,
        "--transport": settings.transport,
        "--threads": settings.threads,
        "--drain-grace": settings.drain_grace,
        "--log-level": settings.log_level,
    }
    decode = role == "decode"
    if decode:
        values |= _speculation(settings)
    switches = {
        "--no-prefix-cache": not settings.prefix_cache,
        "--no-share-weights": not settings.share_weights,
        "--no-graphs": not settings.graphs,
        "--speculation-fixed": settings.speculation_fixed and decode,
        "--convert-kv-dtype": settings.prefill_kv_dtype is not None and decode,
    }
    return _flags({**values, **_tls(settings)}) + [flag for flag, on in switches.items() if on]


def _speculation(settings: UpSettings) -> dict[str, object]:
    return {
        "--speculation": settings.speculation,
        "--speculation-tokens": settings.speculation_tokens,
        "--draft-model": settings.draft_model,
        "--self-draft-layers": settings.self_draft_layers,
        "--eagle-head": settings.eagle_head,
    }


def gateway_arguments(settings: UpSettings, listen: Address, http: Address, workers_file: Path) -> list[str]:
    """Flags of a gateway."""
    values: dict[str, object] = {
        "--model": settings.model,
        "--listen": listen,
        "--http": http,
        "--workers-file": workers_file,
        "--max-queue": settings.max_queue,
        "--default-timeout": settings.default_timeout,
        "--local-prefill-threshold": settings.local_prefill_threshold,
        "--drain-grace": settings.drain_grace,
        "--log-level": settings.log_level,
        "--tls-client-auth": settings.tls_client_auth if settings.tls is not None else None,
        "--api-keys": settings.api_keys,
    }
    return _flags({**values, **_tls(settings)})


def _tls(settings: UpSettings) -> dict[str, object]:
    files = settings.tls
    return {"--tls-cert": files.cert, "--tls-key": files.key, "--tls-ca": files.ca} if files is not None else {}


def command_line(role: Role, arguments: list[str]) -> list[str]:
    """The whole command of one process: it dies with this one, and never imports from the current folder by
    accident.
    """
    python = sys.executable
    return [python, "-I", "-S", LAUNCHER, str(os.getpid()), python, "-P", "-m", MODULES[role], *arguments]


def environment(own: Mapping[str, str] | None = None) -> dict[str, str]:
    """A worker's environment: ours, with the packages beside this one importable from any folder, and its `own`."""
    root = str(Path(tandem.__file__).parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    defaults = {"GRPC_VERBOSITY": "NONE"}
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for the next kernel spin at first. By default they do so for milliseconds, and with two
        # services on the same cores they take from each other what the one with work could use. These few turns still
        # bridge the gaps between the kernels of a step.
        defaults["GOMP_SPINCOUNT"] = "5000"
    ours = {name: value for name, value in os.environ.items() if name != "TANDEM_API_KEY"}  # for clients alone
    return {**defaults, **ours, **(own or {}), "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _flags(values: dict[str, object]) -> list[str]:
    return [text for flag, value in values.items() if value is not None for text in (flag, str(value))]
