"""Workers of several ranks as real processes: KV between ranks and whole engines, and how they end."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pair_of_engines import Pair, pair_at, pair_of_engines
from rank_processes import RankProcess, rank_processes
from tiny_llama import VOCABULARY, save_tiny_llama

from decode_service import wiring
from decode_service.flags import parse_flags
from tandem.errors import ConfigError
from tandem.kv_layout import RANK_NUMERICS

COMPUTE = ("--compute", "exact", "--threads", "1")
PREFILL = ("--block-size", "24", *COMPUTE)
DECODE = ("--block-size", "16", *COMPUTE, "--no-prefix-cache", "--convert-kv-dtype")
random_ids = random.Random(5)
PROMPT = [random_ids.randrange(3, VOCABULARY) for _ in range(150)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def command(module: str, model: Path, flags: Sequence[str]) -> list[str]:
    return ["-m", module, "--model", str(model), "--num-blocks", "96", "--log-level", "warning", *flags]


async def tokens(pair: Pair, end: int, *, remote: bool, temperature: float = 0.0) -> list[list[int]]:
    return (await pair.run(PROMPT[:end], remote=remote, n=1, temperature=temperature)).tokens


def end_of(ranks: list[RankProcess]) -> list[int]:
    return [rank.ended()[0] for rank in ranks]


async def test_kv_goes_between_ranks_and_whole_engines(model: Path, tmp_path: Path) -> None:
    prefill = command("prefill_service", model, ["--chunk-size", "29", *PREFILL])
    decode = command("decode_service", model, DECODE)
    with rank_processes(prefill, 2, tmp_path) as p_ranks, rank_processes(decode, 2, tmp_path) as d_ranks:
        p_address, d_address = p_ranks[0].read()["address"], d_ranks[0].read()["address"]
        async with pair_at(p_address, d_address) as pair, pair_of_engines(model, PREFILL, DECODE) as whole:
            assert (pair.decode_info.layout.tp_size, pair.decode_info.layout.num_kv_heads) == (2, 1)
            assert RANK_NUMERICS in pair.decode_info.numerics_id
            for end, temperature in ((61, 0.0), (150, 1.0), (5, 1.0)):
                run = await pair.run(PROMPT[:end], remote=True, temperature=temperature)
                blocks = -(-end // 24)  # some twice, where two of decode's begin in them
                assert blocks * pair.block_bytes <= run.bytes_sent < (blocks + 6) * pair.block_bytes
                assert run.tokens == await tokens(pair, end, remote=False, temperature=temperature)
            # Sums are in another order with another number of ranks; no greedy token of these hangs on that.
            expected = await tokens(whole, 150, remote=False)
            assert await tokens(pair, 150, remote=False) == expected
            async with pair_at(p_address, whole.decode_address) as mixed:
                assert await tokens(mixed, 150, remote=True) == expected
            async with pair_at(whole.prefill_address, d_address) as mixed:
                assert await tokens(mixed, 150, remote=True) == expected
        # Whoever starts the ranks sends a signal to each; rank 0 drains, and the others end with it.
        for rank in p_ranks:
            rank.process.send_signal(signal.SIGTERM)
        assert end_of(p_ranks) == [0, 0]
        d_ranks[1].process.kill()
        code, said = d_ranks[0].ended()
        assert code == 1
        assert "error: rank 1 of 2 has ended" in said


def test_proposers_with_a_model_are_refused(model: Path) -> None:
    flags = parse_flags(["--model", str(model), "--speculation", "ngram,self", "--self-draft-layers", "1"])
    ranks: Any = object()
    with pytest.raises(ConfigError, match="--speculation: self can't draft with several ranks"):
        wiring.load(flags, ranks)
