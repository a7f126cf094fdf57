"""Maps whatever a handler raises to a gRPC status, once, for unary and streaming methods and in the middle of streams.

Handlers of the services simply raise TandemErrors. Requests that protobuf refused end as INVALID_ARGUMENT with the
field's name (`tandem.service.malformed`). asyncio.CancelledError passes: the client has gone.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from tandem.errors import InternalError, InvalidRequestError, TandemError
from tandem.service import status
from tandem.service.logging import get_logger
from tandem.service.malformed import Malformed, checked
from tandem.service.peers import Admit

_log = get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Awaitable[Any]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of a server. Methods must be coroutines or async generators that read the request iterator."""

    def __init__(self, admit: Admit | None = None) -> None:
        """`admit` is asked before each RPC, and before its request is read; what it raises is the RPC's status."""
        self._admit = admit

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The method's handler with its behaviour and deserializer wrapped; None stays None (UNIMPLEMENTED)."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return _wrap(handler, handler_call_details.method, self._admit)


def _wrap(handler: Any, method: str, admit: Admit | None) -> Any:
    requests = "stream" if handler.request_streaming else "unary"
    responses = "stream" if handler.response_streaming else "unary"
    behavior = getattr(handler, f"{requests}_{responses}")
    run = _streamed(behavior) if handler.response_streaming else behavior
    if admit is not None and requests == "unary":
        # gRPC reads a single request before it calls anybody, but leaves a stream to its reader.
        requests, run = "stream", _of_one(run)
    make = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
    # Raw-bytes methods have no deserializer.
    deserializer = checked(handler.request_deserializer) if handler.request_deserializer else None
    return make(
        _guarded(run, method, admit), request_deserializer=deserializer, response_serializer=handler.response_serializer
    )


def _streamed(behavior: Callable[[Any, Context], Any]) -> Handler:
    """A response-streaming behaviour as one coroutine. Closes a generator at once when the RPC ends, so `finally`
    blocks run.
    """
    if not inspect.isasyncgenfunction(behavior):
        return behavior

    async def run(request: Any, context: Context) -> None:
        async with aclosing(behavior(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return run


def _of_one(run: Handler) -> Handler:
    """A behaviour for one request as one for a stream of requests, of which it takes the first."""

    async def first(requests: AsyncIterator[Any], context: Context) -> Any:
        async for request in requests:
            return await run(request, context)
        raise InvalidRequestError("the request is missing")

    return first


def _guarded(run: Handler, method: str, admit: Admit | None) -> Handler:
    async def guarded(request: Any, context: Context) -> Any:
        """`run` for those whom `admit` lets in, with every error mapped to a status."""
        try:
            if admit is not None:
                admit(method, context)
            return await run(_checked_request(request), context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except grpc.RpcError as exc:
            await _abort(context, status.from_rpc_error(exc), method)
        except Exception as exc:  # the boundary: nothing may pass unmapped
            await _abort(context, exc, method)

    return guarded


def _checked_request(request: Any) -> Any:
    """Raises for a malformed request; a stream raises when it comes to one."""
    if isinstance(request, Malformed):
        raise request.error
    return _checked_stream(request) if hasattr(request, "__aiter__") else request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Malformed):
            raise request.error
        yield request


async def _abort(context: Context, exc: Exception, method: str) -> None:
    if not isinstance(exc, TandemError) or isinstance(exc, InternalError):
        _log.error("handler failed", method=method, exc_info=exc)
    if context.done():
        # The client has its status already; there is nobody to tell.
        return
    await status.abort(context, exc)
