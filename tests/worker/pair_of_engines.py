"""A prefill and a decode worker around real engines of a tiny random model, and what a gateway would ask of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch

from decode_service import assembly as decode_assembly
from decode_service import flags as decode_flags
from decode_service import wiring as decode_wiring
from prefill_service import assembly as prefill_assembly
from prefill_service import flags as prefill_flags
from prefill_service import wiring as prefill_wiring
from tandem.record import OutputState, Record, SamplingParams, StopRules
from tandem.service import wire
from tandem.service.channel import open_channel
from tandem.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from worker import loading

VOCAB = 211


def save_tiny(folder: Path) -> Path:
    """A random llama whose head width has attention in pairs, where the CPU has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=160,
        head_dim=32,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


@dataclass
class Run:
    """What came of one request."""

    tokens: list[list[int]] = field(default_factory=list)
    needed: tuple[int, int] = (0, 0)
    bytes_sent: int = 0


@dataclass
class Pair:
    """Both workers, serving."""

    prefill: Any
    decode: Any
    decode_info: Any
    prefill_info: Any
    prefill_address: str
    decode_address: str
    block_bytes: int

    async def run(self, prompt: Sequence[int], *, remote: bool, n: int = 1, temperature: float = 0.0) -> Run:
        """24 tokens a choice, with P's help or by D alone."""
        sampling = SamplingParams(temperature=temperature, seed=7, n=n)
        rules = StopRules(24, ignore_eos=True)
        outputs = [OutputState() for _ in range(n)]
        record = Record("r", self.decode_info.model_id, list(prompt), sampling, rules, outputs)
        source = decode_pb2.PREFILL_SOURCE_REMOTE if remote else decode_pb2.PREFILL_SOURCE_LOCAL
        start = decode_pb2.DecodeStart(
            record=wire.record_to_pb(record), source=source, incarnation=self.decode_info.incarnation
        )
        call = self.decode.Decode()
        await call.write(decode_pb2.DecodeRequest(start=start))
        admitted = (await call.read()).admitted
        run = Run([[] for _ in range(n)], (admitted.needed_start, admitted.needed_end))
        if remote:
            run.bytes_sent = await self._prefill(record, admitted)
        while (response := await call.read()) is not grpc.aio.EOF:
            for delta in response.tokens.deltas:
                run.tokens[delta.index] += delta.token_ids
        assert (await call.code()) is grpc.StatusCode.OK, await call.details()
        return run

    async def _prefill(self, record: Record, admitted: Any) -> int:
        info = self.decode_info
        target = prefill_pb2.TransferTarget(
            lease_id=admitted.lease_id,
            attempt=admitted.attempt,
            address=self.decode_address,
            incarnation=info.incarnation,
            needed_start=admitted.needed_start,
            needed_end=admitted.needed_end,
            layout=info.layout,
            transports=info.transports,
            convert_kv_dtype=info.convert_kv_dtype,
        )
        request = prefill_pb2.PrefillRequest(
            record=wire.record_to_pb(record), incarnation=self.prefill_info.incarnation, target=target
        )
        done = [part.done async for part in self.prefill.Prefill(request) if part.WhichOneof("event") == "done"]
        return int(done[0].bytes_transferred)


@asynccontextmanager
async def pair_at(prefill: str, decode: str) -> AsyncIterator[Pair]:
    """Of workers that serve already."""
    async with open_channel(prefill) as p_channel, open_channel(decode) as d_channel:
        p_stub: Any = prefill_pb2_grpc.PrefillServiceStub(p_channel)
        d_stub: Any = decode_pb2_grpc.DecodeServiceStub(d_channel)
        d_info = (await d_stub.GetDecodeInfo(decode_pb2.GetDecodeInfoRequest())).info
        p_info = (await p_stub.GetPrefillInfo(prefill_pb2.GetPrefillInfoRequest())).info
        layout = p_info.layout
        yield Pair(p_stub, d_stub, d_info, p_info, prefill, decode, layout.block_bytes * layout.tp_size)


@asynccontextmanager
async def pair_of_engines(model: Path, prefill: Sequence[str], decode: Sequence[str]) -> AsyncIterator[Pair]:
    """Each worker with its own flags."""
    common = ["--model", str(model), "--num-blocks", "96", "--threads", "1", "--no-share-weights"]
    p_flags = prefill_flags.parse_flags([*common, "--chunk-size", "29", *prefill])
    d_flags = decode_flags.parse_flags([*common, *decode])
    p_parts = prefill_wiring.parts_of(*prefill_wiring.load(p_flags), p_flags, "")
    d_parts = decode_wiring.parts_of(loading.load(d_flags), d_flags, "")
    workers: list[Any] = [
        prefill_assembly.assemble(p_parts, "127.0.0.1:0"),
        decode_assembly.assemble(d_parts, "127.0.0.1:0"),
    ]
    p_address, d_address = [await worker.start() for worker in workers]
    try:
        async with pair_at(p_address, d_address) as pair:
            yield pair
    finally:
        for worker in workers:
            await worker.shell.server.stop(0)
            await worker.close()
