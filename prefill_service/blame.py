"""Whose fault a failed transfer is. The gateway retries on another prefill worker, or on another decode worker.

Every error that comes from the decode worker, or from the way to it, carries metadata side=target and its address. What
is UNAVAILABLE there must not look as if this worker were: such an error has a reason that begins with TARGET_.
"""

from __future__ import annotations

import grpc

from tandem.errors import (
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidRequestError,
    PermissionDeniedError,
    RequestCancelledError,
    TandemError,
    UnauthenticatedError,
    UnavailableError,
)
from tandem.service.status import from_rpc_error

TARGET_LOST = "TARGET_LOST"
"""The decode worker can't be reached, or went away."""
TARGET_DRAINING = "TARGET_DRAINING"
TARGET_REFUSED = "TARGET_REFUSED"
"""The decode worker knows this worker's certificate, or its incarnation, otherwise: a matter of configuration."""
TARGET_PROTOCOL = "TARGET_PROTOCOL"
"""One side broke the rules of the transfer: a bug, not the request's fault."""


def target_error(exc: Exception, address: str) -> TandemError:
    """What the gateway is to see of an error of the transfer to `address`."""
    error = from_rpc_error(exc) if isinstance(exc, grpc.RpcError) else exc
    if not isinstance(error, TandemError):
        error = InternalError(f"the transfer failed: {error}")
    else:
        error = _rename(error, address)
    error.metadata = {**error.metadata, "side": "target", "target": address}
    return error


def _rename(error: TandemError, address: str) -> TandemError:
    where = f"decode worker {address}: {error.message}"
    if isinstance(error, DrainingError):
        return UnavailableError(where, retry_after=0.0, reason=TARGET_DRAINING)
    if isinstance(error, UnavailableError):
        known = error.reason != UnavailableError.default_reason
        reason = f"TARGET_{error.reason.removeprefix('TARGET_')}" if known else TARGET_LOST
        return UnavailableError(where, retry_after=0.0, reason=reason)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return UnavailableError(where, retry_after=0.0, reason=TARGET_REFUSED)
    if isinstance(error, RequestCancelledError):
        # Nobody here cancelled: the decode worker's server went down.
        return UnavailableError(where, retry_after=0.0, reason=TARGET_LOST)
    if isinstance(error, InvalidRequestError):
        # The request was checked before: the messages of the transfer are what the other side means.
        return InternalError(where, reason=TARGET_PROTOCOL)
    if isinstance(error, DeadlineError):
        return DeadlineError(where, reason=error.reason)
    return error


def lost(address: str, how: str) -> UnavailableError:
    """The decode worker ended the transfer without a word."""
    return UnavailableError(f"decode worker {address}: {how}", retry_after=0.0, reason=TARGET_LOST)
