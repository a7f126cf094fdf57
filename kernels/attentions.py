"""Which attention a GPU's engine takes: decided once, at start, from what is installed, for the model's shape.

The first of ATTENTIONS is taken that can be had. Those of other packages must have a version that is known here, take
such a model, and agree with torch on a small step, which also compiles their kernels: what is installed but wrong or
broken is passed over with a warning that says why. An attention that was asked for by name is had, or nothing starts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from kernels import flash_attention, flashinfer_attention
from kernels.attention_probe import disagreement
from kernels.backends import Attention, AttentionShape
from kernels.packages import Package
from kernels.torch_operations import TorchAttention
from tandem.errors import ConfigError

logger = logging.getLogger("kernels")
AUTO: Final = "auto"
VARIABLE: Final = "TANDEM_ATTENTION"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an attention can't be had, and how loudly that is said where nobody asked for it."""

    reason: str
    level: int


def _fits_all(shape: AttentionShape, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One entry of ATTENTIONS."""

    name: str
    make: Callable[[AttentionShape, torch.device], Attention]
    package: Package | None = None
    unfit: Callable[[AttentionShape, torch.device], str | None] = _fits_all
    """Why it can't compute such a model there; None when it can."""
    probed: bool = False
    """Compared with torch before it is taken."""
    takes_codes: bool = True
    """Keys and values of 8 bits with their scales."""

    def not_installed(self) -> Refusal | None:
        """None when its package is there, in a version that is known."""
        if self.package is None:
            return None
        if not self.package.is_installed:
            return Refusal("not installed", logging.DEBUG)
        wrong = self.package.wrong_version()
        return None if wrong is None else Refusal(wrong, logging.WARNING)

    def refusal(self, shape: AttentionShape, device: torch.device) -> Refusal | None:
        """None when it may be tried."""
        if (missing := self.not_installed()) is not None:
            return missing
        reason = self.unfit(shape, device)
        return None if reason is None else Refusal(reason, logging.INFO)

    def build(self, shape: AttentionShape, device: torch.device) -> Attention | Refusal:
        """It, or why not."""
        if (refused := self.refusal(shape, device)) is not None:
            return refused
        if not self.probed:
            return self.make(shape, device)
        try:
            made = self.make(shape, device)
            reason = disagreement(made, shape, device)
        except Exception as error:  # what others built, for other versions of torch and CUDA, fails in its own ways
            reason = f"{type(error).__name__}: {error}"
        return made if reason is None else Refusal(f"it is broken here: {reason}", logging.WARNING)


def _triton(shape: AttentionShape, device: torch.device) -> Attention:
    from kernels.triton.operations import TritonAttention

    return TritonAttention(shape, device)


ATTENTIONS: Final = (
    Candidate(
        "flashinfer",
        flashinfer_attention.FlashInferAttention,
        flashinfer_attention.PACKAGE,
        flashinfer_attention.unfit,
        probed=True,
        takes_codes=False,
    ),
    Candidate(
        "flash-attn-3",
        flash_attention.FlashAttention3,
        flash_attention.PACKAGE_3,
        flash_attention.unfit_3,
        probed=True,
        takes_codes=False,
    ),
    Candidate(
        "flash-attn-2",
        flash_attention.FlashAttention2,
        flash_attention.PACKAGE_2,
        flash_attention.unfit_2,
        probed=True,
        takes_codes=False,
    ),
    Candidate("triton", _triton, Package("triton", "triton")),
    Candidate("torch", TorchAttention),
)
"""Best first; the last can always be had."""


def attention_for(shape: AttentionShape, device: torch.device, asked: str = AUTO) -> Attention:
    """The attention named by `asked`, else by TANDEM_ATTENTION, else the best that can be had.

    Raises ConfigError for a name that is unknown, or that can't be had here: with the reason and what can.
    """
    wanted, source = _wanted(asked)
    for candidate in ATTENTIONS:
        if wanted not in (AUTO, candidate.name):
            continue
        built = candidate.build(shape, device)
        if not isinstance(built, Refusal):
            logger.info("attention: %s", built.numerics)
            return built
        if wanted != AUTO:
            usable = [one.name for one in ATTENTIONS if one is not candidate and one.refusal(shape, device) is None]
            raise ConfigError(f"{source}: {wanted} can't be had: {built.reason}; usable here: {', '.join(usable)}")
        logger.log(built.level, "no attention by %s: %s", candidate.name, built.reason)
    raise ConfigError(f"{source}: no attention can be had")


def describe_attentions() -> dict[str, object]:
    """What `tandem doctor` prints, by what is installed alone: the model may not fit. Raises as `attention_for`."""
    wanted, source = _wanted(AUTO)
    refused = {one.name: refusal.reason for one in ATTENTIONS if (refusal := one.not_installed()) is not None}
    if wanted in refused:
        raise ConfigError(f"{source}: {wanted} can't be had: {refused[wanted]}")
    usable = [one for one in ATTENTIONS if one.name not in refused and wanted in (AUTO, one.name)]
    of_codes = next((one.name for one in usable if one.takes_codes), None)
    return {"gpu_attention": usable[0].name, "gpu_attention_8_bit": of_codes, "gpu_attention_refused": refused}


def _wanted(asked: str) -> tuple[str, str]:
    """(name or AUTO, who said so). Raises ConfigError for an unknown name."""
    wanted, source = (asked, "--attention") if asked != AUTO else (os.environ.get(VARIABLE) or AUTO, VARIABLE)
    names = [candidate.name for candidate in ATTENTIONS]
    if wanted not in (AUTO, *names):
        raise ConfigError(f"{source}={wanted!r} is unknown; allowed: {AUTO}, {', '.join(names)}")
    return wanted, source
