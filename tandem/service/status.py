"""The exception tree to gRPC statuses with google.rpc details, and back. The only place that knows both.

Every status carries ErrorInfo(reason, domain "tandem", metadata); InvalidRequestError adds BadRequest.field_violations,
errors with a `retry_after` add RetryInfo. Messages are cut to what HTTP/2 trailers hold.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tandem import errors

DOMAIN = "tandem"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 1024

_CODES: dict[type[errors.TandemError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestCancelledError: grpc.StatusCode.CANCELLED,
    errors.StaleError: grpc.StatusCode.ABORTED,
    errors.IncompatibleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DataCorruptionError: grpc.StatusCode.DATA_LOSS,
}

_PLAIN: dict[grpc.StatusCode, type[errors.TandemError]] = {
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.ABORTED: errors.StaleError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.IncompatibleError,
    grpc.StatusCode.DATA_LOSS: errors.DataCorruptionError,
    # A method that the server doesn't know means that the two sides are of different versions.
    grpc.StatusCode.UNIMPLEMENTED: errors.IncompatibleError,
}
"""Codes back to exceptions that take no extra fields; what is absent is an InternalError."""


def code_of(exc: BaseException) -> grpc.StatusCode:
    """The status code of an exception; INTERNAL for whatever isn't in the tree."""
    return next((_CODES[cls] for cls in type(exc).__mro__ if cls in _CODES), grpc.StatusCode.INTERNAL)


def to_rpc_status(exc: BaseException) -> status_pb2.Status:
    """google.rpc.Status of an exception. An exception outside the tree says "internal error" and nothing of its own
    text.
    """
    if isinstance(exc, TimeoutError | asyncio.TimeoutError):
        exc = errors.DeadlineError("the deadline passed")
    elif not isinstance(exc, errors.TandemError):
        exc = errors.InternalError("internal error; the server's log has the details")
    message = _cut(exc.message)
    status = status_pb2.Status(code=code_of(exc).value[0], message=message)
    metadata = {_cut(key, 64): _cut(value, 256) for key, value in list(exc.metadata.items())[:16]}
    _pack(status, error_details_pb2.ErrorInfo(reason=_cut(exc.reason, 64), domain=DOMAIN, metadata=metadata))
    if isinstance(exc, errors.InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=_cut(exc.field, 256), description=message)
        _pack(status, error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after = getattr(exc, "retry_after", None)
    if retry_after is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(max(0, int(retry_after * 1e9)))
        _pack(status, info)
    return status


def to_status(exc: BaseException) -> grpc.Status:
    """grpc.Status (code, details, trailing_metadata) of an exception."""
    status: grpc.Status = rpc_status.to_status(to_rpc_status(exc))
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], exc: BaseException) -> NoReturn:
    """Ends the RPC with the exception's status. Raises, as `context.abort` does."""
    status = to_status(exc)
    await context.abort(status.code, status.details, status.trailing_metadata or ())
    raise AssertionError("context.abort returned")


def answered(error: Any) -> bool:
    """True when the other side itself ended the call: its status has details. Without them gRPC speaks."""
    return any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())


def from_rpc_error(error: grpc.RpcError) -> errors.TandemError:
    """The exception that the other side raised, as far as its status tells; for statuses of gRPC itself the nearest
    one.
    """
    # Both the blocking and the asyncio errors are Calls, which the base class doesn't say.
    call: Any = error
    code = call.code()
    message = call.details() or code.name
    info, field, retry = _details(call)
    built = _build(code, message, info.reason or None, field, retry)
    built.metadata = {**info.metadata, **built.metadata}
    return built


def _details(call: Any) -> tuple[error_details_pb2.ErrorInfo, str, float | None]:
    """ErrorInfo, the offending field and the seconds to wait, from trailing metadata; empty when absent or
    unreadable.
    """
    info, field, retry = error_details_pb2.ErrorInfo(), "", None
    status = status_pb2.Status()
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                status.ParseFromString(value)
            except ValueError:
                return info, field, retry
    bad, wait = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad.DESCRIPTOR) and detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Is(wait.DESCRIPTOR) and detail.Unpack(wait):
            retry = wait.retry_delay.ToNanoseconds() / 1e9
    return info, field, retry


def _build(
    code: grpc.StatusCode, message: str, reason: str | None, field: str, retry: float | None
) -> errors.TandemError:
    """One exception from its parts."""
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
        return errors.InvalidRequestError(message, field=field, reason=reason)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.OverloadedError(message, retry_after=retry, reason=reason)
    if code is grpc.StatusCode.UNAVAILABLE:
        unavailable = errors.DrainingError if reason == errors.DrainingError.default_reason else errors.UnavailableError
        return unavailable(message, retry_after=retry, reason=reason)
    return _PLAIN.get(code, errors.InternalError)(message, reason=reason)


def _pack(status: status_pb2.Status, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, limit: int = MAX_MESSAGE_BYTES) -> str:
    """At most `limit` bytes of UTF-8, whole characters."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "..."
