"""How a worker's stream ended."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from tandem.errors import DeadlineError, PermissionDeniedError, TandemError, UnauthenticatedError, UnavailableError
from tandem.service import status


class FeedLostError(UnavailableError):
    """A worker's token feed ended, or is late. The worker itself may be well: if it isn't, its streams say so, and for
    that they are given a moment.
    """

    default_reason = "FEED_LOST"


@dataclass(frozen=True)
class Ended:
    """`error` is None when all went well; `died` when the worker itself seems gone."""

    error: TandemError | None = None
    died: bool = False


def ended_by(exc: grpc.aio.AioRpcError) -> Ended:
    """A worker that answers sends details with its status; without them the transport speaks: the worker is gone."""
    error = status.from_rpc_error(exc)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        # Between the services: whose certificates don't fit is nothing that the client did.
        refused = UnavailableError(f"a worker refuses its caller: {error.message}", reason="CALLER_REFUSED")
        refused.metadata = error.metadata
        return Ended(refused)
    if status.answered(exc) or isinstance(error, DeadlineError):
        return Ended(error)
    died = exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
    return Ended(error, died=died or exc.code() is grpc.StatusCode.INTERNAL)
