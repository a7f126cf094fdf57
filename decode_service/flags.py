"""The flags of `python -m decode_service`: those that every worker has, and its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decode_service.speculation.config import DEFAULT_TOKENS, SpeculationConfig
from decode_service.speculation.registry import FACTORIES, MODEL_FLAGS, speculation
from worker import flags

MIXED_PREFILL_TOKENS = {"cpu": 64, "cuda": 1024}
"""By device, where nobody says: what delays those who decode by about a step. A GPU's is bound by its launches."""


@dataclass(frozen=True, slots=True)
class Flags(flags.Flags):
    """Everything that the command line says."""

    mixed_prefill_tokens: int | None
    """None: MIXED_PREFILL_TOKENS."""
    convert_kv_dtype: bool
    speculation: SpeculationConfig
    draft_model: str | None
    self_draft_layers: str | None
    eagle_head: str | None
    automatic_speculation: bool = False
    """Nobody asked for it by name."""


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
        metavar="TOKENS",
        help="prompt tokens a step beside decoding sequences; default: 64, on a GPU 1024",
    )
    parser.add_argument(
        "--convert-kv-dtype",
        action="store_true",
        help="take KV blocks of another dtype than --kv-dtype from prefill workers; rounds, so tokens may differ",
    )
    _add_speculation(parser)
    values = parser.parse_args(argv)
    given = {"draft": values.draft_model, "self": values.self_draft_layers, "eagle": values.eagle_head}
    return Flags(
        **flags.common(values),
        mixed_prefill_tokens=values.mixed_prefill_tokens,
        convert_kv_dtype=values.convert_kv_dtype,
        speculation=speculation(
            values.speculation,
            values.speculation_tokens,
            fixed=values.speculation_fixed,
            models=[name for name, value in given.items() if value is not None],
        ),
        draft_model=values.draft_model,
        self_draft_layers=values.self_draft_layers,
        automatic_speculation=values.speculation == "auto" and not any(given.values()),
        eagle_head=values.eagle_head,
    )


def _add_speculation(parser: flags.Parser) -> None:
    """Who drafts, and with what."""
    parser.add_argument(
        "--speculation",
        default="auto",
        metavar="MODE",
        help=f"who proposes drafts: auto, off, or names with commas between ({', '.join([*FACTORIES, *MODEL_FLAGS])})",
    )
    parser.add_argument(
        "--speculation-tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="most drafts of one output in a step",
    )
    parser.add_argument(
        "--speculation-fixed",
        action="store_true",
        help="verify every draft at its full length, whatever it costs: for tests and measurements",
    )
    parser.add_argument("--draft-model", metavar="PATH", help="a smaller model of the same vocabulary, to draft with")
    parser.add_argument(
        "--self-draft-layers",
        metavar="LAYERS",
        help="draft with the model's own layers: how many of them, or which, as 0-3,7,28-29; the others are skipped",
    )
    parser.add_argument("--eagle-head", metavar="PATH", help="the folder of an EAGLE-1 or EAGLE-3 head, to draft with")
