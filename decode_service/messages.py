"""What a Decode stream says, as protobuf. Used by the servicer only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from decode_service.events import Ended, Finished
from decode_service.streams import Item, Pulse, Retargeted
from tandem.record import TokenDelta
from tandem.service import wire
from tandem.v1 import decode_pb2


def heartbeat_to_pb(steps: int) -> decode_pb2.DecodeResponse:
    """The engine lives; `steps` launched so far."""
    return decode_pb2.DecodeResponse(heartbeat=decode_pb2.DecodeHeartbeat(steps=steps))


def decode_responses(items: Iterable[Item]) -> list[decode_pb2.DecodeResponse]:
    """Stream items as messages, in order; neighbouring tokens share one."""
    responses: list[decode_pb2.DecodeResponse] = []
    for item in items:
        if isinstance(item, TokenDelta):
            if not responses or responses[-1].WhichOneof("event") != "tokens":
                responses.append(decode_pb2.DecodeResponse(tokens=decode_pb2.DecodeTokens()))
            responses[-1].tokens.deltas.append(wire.delta_to_pb(item))
        elif isinstance(item, Pulse):
            responses.append(heartbeat_to_pb(item.steps))
        elif isinstance(item, Retargeted):
            responses.append(decode_pb2.DecodeResponse(retargeted=_retargeted_to_pb(item)))
        elif isinstance(item, Finished):
            finished = decode_pb2.DecodeFinished(
                index=item.index,
                finish_reason=wire.finish_reason_to_pb(item.reason),
                num_tokens=item.num_tokens,
            )
            responses.append(decode_pb2.DecodeResponse(finished=finished))
        elif isinstance(item, Ended):
            responses.append(decode_pb2.DecodeResponse(end=decode_pb2.DecodeEnd(preemptions=item.preemptions)))
    return responses


def feed_to_pb(requests: Mapping[int, Iterable[TokenDelta]]) -> decode_pb2.WatchTokensResponse:
    """New tokens by the requests' numbers on the feed."""
    message = decode_pb2.WatchTokensResponse()
    for number, deltas in requests.items():
        tokens = message.requests.add(number=number)
        for delta in deltas:
            wire.fill_delta(tokens.deltas.add(), delta)
    return message


def _retargeted_to_pb(item: Retargeted) -> decode_pb2.DecodeRetargeted:
    return decode_pb2.DecodeRetargeted(
        attempt=item.attempt,
        status=decode_pb2.RETARGET_STATUS_COMMITTED if item.committed else decode_pb2.RETARGET_STATUS_ACCEPTED,
        needed_start=item.needed_start,
        needed_end=item.needed_end,
    )
