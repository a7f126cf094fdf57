"""A decode worker under TLS: gateways decode, prefill workers transfer, and each sender stays who it was."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from certificates import Authority
from decode_rig import FakePrefill, TransferEnded, expected_tokens, read, record_of, running_rig

from tandem.service.channel import open_service_channel
from tandem.service.tls import Tls, TlsFiles
from tandem.v1 import decode_pb2
from worker.transfer_messages import open_to_pb


def made(authority: Authority, name: str, role: str) -> Tls:
    issued = authority.issue(name, f"tandem-{role}", name)
    return Tls(TlsFiles(issued.cert, issued.key, issued.ca), f"tandem-{role}")


@pytest.fixture
def services(authority: Authority) -> dict[str, Tls]:
    """Certificates of one gateway, one decode worker and two prefill workers."""
    roles = {"gateway": "gateway", "decode": "decode", "prefill": "prefill", "other": "prefill"}
    return {name: made(authority, name, role) for name, role in roles.items()}


def rig_of(services: dict[str, Tls]) -> Any:
    return running_rig(tls=services["decode"], gateway=services["gateway"].channel("decode"))


async def code_of(call: Any) -> grpc.StatusCode:
    """The status of a call without an answer."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if hasattr(call, "__await__") else call.read())
    return caught.value.code()


async def test_each_rpc_is_for_one_role(services: dict[str, Tls]) -> None:
    """A prefill worker can't decode, watch or ask; a gateway, or another decode worker, can't send KV."""
    denied = grpc.StatusCode.PERMISSION_DENIED
    async with rig_of(services) as rig:
        assert (await rig.decode.GetDecodeInfo(decode_pb2.GetDecodeInfoRequest())).info.model_name == "tiny"
        assert await code_of(rig.transfers.Transfer()) is denied
        gateway = rig.channel
        for name in ("prefill", "decode"):
            async with open_service_channel(rig.address, "decode", services[name]) as rig.channel:
                assert await code_of(rig.decode.Decode()) is denied
                assert await code_of(rig.decode.GetDecodeInfo(decode_pb2.GetDecodeInfoRequest())) is denied
                assert await code_of(rig.decode.WatchTokens(decode_pb2.WatchTokensRequest())) is denied
                assert await code_of(rig.decode.WatchDecodeLoad(decode_pb2.WatchDecodeLoadRequest())) is denied
                assert name == "prefill" or await code_of(rig.transfers.Transfer()) is denied
        rig.channel = gateway


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_kv_comes_from_the_sender_that_it_came_from(services: dict[str, Tls], transport: str) -> None:
    """Another prefill worker's certificate can't go on as an incarnation that was seen; the sender itself can."""
    async with (
        rig_of(services) as rig,
        open_service_channel(rig.address, "decode", services["prefill"]) as mine,
        open_service_channel(rig.address, "decode", services["other"]) as other,
    ):
        sender = FakePrefill(rig, transport)
        for seed in (1, 2):
            record = record_of(20, seed=seed)
            rig.transfer_channel = mine
            call = await rig.call(record, local=False)
            if seed == 2:
                rig.transfer_channel = other
                transfer = rig.transfers.Transfer()
                await transfer.write(open_to_pb(sender.session(call.admitted).open()))
                with pytest.raises(TransferEnded) as ended:
                    await read(transfer)
                assert ended.value.args == (grpc.StatusCode.PERMISSION_DENIED, "PEER_MISMATCH")
                rig.transfer_channel = mine
            assert await sender.send(call.admitted, record)
            assert (await call.read_to_end()).ids() == expected_tokens(record)
        await rig.all_free()
        sender.close()
