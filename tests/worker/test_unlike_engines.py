"""Real engines with unlike pools: the tokens are those of the decode worker alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from pair_of_engines import VOCAB, pair_of_engines, save_tiny

from kernels.kv_order import multiplies_pairs
from tandem.kv_layout import PAIRED_ORDER

random_ids = random.Random(5)
PROMPT = [random_ids.randrange(3, VOCAB) for _ in range(150)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (["--block-size", "16", "--compute", "exact"], ["--block-size", "32", "--compute", "exact"]),
        (["--block-size", "24", "--compute", "exact"], ["--block-size", "16", "--compute", "exact"]),
        (
            ["--block-size", "32", "--compute", "int8", "--transport", "grpc"],
            ["--block-size", "16", "--compute", "int8"],
        ),
        (["--block-size", "24", "--compute", "int8"], ["--block-size", "16", "--compute", "int8"]),
        (["--block-size", "16", "--compute", "int8"], ["--block-size", "24", "--compute", "int8"]),
        (
            ["--block-size", "32", "--compute", "int8", "--kv-dtype", "int8"],
            ["--block-size", "24", "--compute", "int8", "--kv-dtype", "int8"],
        ),
        (
            ["--block-size", "16", "--compute", "exact", "--kv-dtype", "fp8_e4m3", "--transport", "grpc"],
            ["--block-size", "24", "--compute", "exact", "--kv-dtype", "fp8_e4m3"],
        ),
    ],
    ids=lambda flags: "-".join(flag for flag in flags if not flag.startswith("--")),
)
async def test_the_tokens_are_those_of_one_worker(model: Path, prefill: Sequence[str], decode: Sequence[str]) -> None:
    # Without a prefix cache: else decode would find alone what it was sent before.
    async with pair_of_engines(model, prefill, [*decode, "--no-prefix-cache"]) as pair:
        paired = [info.layout.order == PAIRED_ORDER for info in (pair.prefill_info, pair.decode_info)]
        if decode[3] == "int8" and multiplies_pairs(32):
            assert paired == [info.layout.block_size % 16 == 0 for info in (pair.prefill_info, pair.decode_info)]
        for end, n, temperature in ((61, 1, 0.0), (5, 1, 0.0), (150, 2, 1.0), (61, 1, 1.0)):
            prompt = PROMPT[:end]
            helped = await pair.run(prompt, remote=True, n=n, temperature=temperature)
            alone = await pair.run([PROMPT[0], *prompt], remote=False, n=n, temperature=temperature)
            assert alone.tokens != helped.tokens
            alone = await pair.run(prompt, remote=False, n=n, temperature=temperature)
            assert helped.tokens == alone.tokens
            assert all(len(row) == 24 for row in helped.tokens)


@pytest.mark.parametrize(("size", "step"), [(16, 24), (32, 16)])
async def test_what_decode_has_is_not_sent(model: Path, size: int, step: int) -> None:
    flags = (["--block-size", str(size)], ["--block-size", str(step)])
    async with pair_of_engines(model, *flags) as pair:
        first = await pair.run(PROMPT[:70], remote=True)
        assert first.needed == (0, 70)
        again = await pair.run(PROMPT, remote=True)
        # No hit is lost, whatever the sender's blocks; the last token of the first prompt filled no block.
        start = 70 // step * step
        assert again.needed == (start, 150)
        blocks = -(-150 // size) - start // size
        assert blocks * pair.block_bytes <= again.bytes_sent < (blocks + 6) * pair.block_bytes
    async with pair_of_engines(model, *flags) as pair:
        assert again.tokens == (await pair.run(PROMPT, remote=False)).tokens


@pytest.mark.parametrize(
    ("compute", "kv_dtypes"),
    [("exact", ("float32", "bfloat16")), ("int8", ("bfloat16", "int8")), ("exact", ("bfloat16", "float8_e4m3"))],
)
async def test_another_kv_dtype_needs_the_flag(model: Path, compute: str, kv_dtypes: tuple[str, str]) -> None:
    prefill = ["--compute", compute, "--kv-dtype", kv_dtypes[0]]
    decode = ["--compute", compute, "--kv-dtype", kv_dtypes[1], "--block-size", "32"]
    async with pair_of_engines(model, prefill, decode) as pair:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair.run(PROMPT[:40], remote=True)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert all(f"dtype={dtype}" in caught.value.details() for dtype in kv_dtypes)
    async with pair_of_engines(model, prefill, [*decode, "--convert-kv-dtype"]) as pair:
        run = await pair.run(PROMPT[:40], remote=True)
        assert run.needed == (0, 40)
        assert len(run.tokens[0]) == 24
        # The first comes from the wider side; a random model's later ones may differ, and that is the flag's price.
        assert run.tokens[0][0] == (await pair.run(PROMPT[:40], remote=False)).tokens[0][0]
