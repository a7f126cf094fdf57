"""The flags of `python -m decode_service`: those that every worker has, and its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker import flags

MIXED_PREFILL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Flags(flags.Flags):
    """Everything that the command line says."""

    mixed_prefill_tokens: int
    convert_kv_dtype: bool


def parse_flags(argv: Sequence[str]) -> Flags:
    """Raises ConfigError. Values of the engine are checked where they are resolved."""
    parser = flags.Parser(
        "decode_service",
        "Runs one decode worker.",
        callers="where gateways and prefill workers call",
        chunk="prompt tokens a step when nobody decodes",
        sequences="most outputs in one step",
    )
    parser.add_argument(
        "--mixed-prefill-tokens",
        type=int,
        default=MIXED_PREFILL_TOKENS,
        metavar="TOKENS",
        help="prompt tokens a step beside decoding sequences",
    )
    parser.add_argument(
        "--convert-kv-dtype",
        action="store_true",
        help="take KV blocks of another dtype than --kv-dtype from prefill workers; rounds, so tokens may differ",
    )
    values = parser.parse_args(argv)
    return Flags(
        **flags.common(values),
        mixed_prefill_tokens=values.mixed_prefill_tokens,
        convert_kv_dtype=values.convert_kv_dtype,
    )
