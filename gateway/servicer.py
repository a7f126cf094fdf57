"""InferenceService: checks, runs and streams requests. It raises TandemErrors, which the server shell maps."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from gateway import convert, validation
from gateway.access import Access
from gateway.catalog import Catalog
from gateway.live import LiveRequests
from gateway.plain import Admitted, Asked, Event, Job
from gateway.request import RequestRun, Services
from gateway.stream import EventBuffer, SlowReaderError
from gateway.tenants import cache_scope
from gateway.text import TextService
from tandem.errors import DeadlineError, InvalidRequestError, NotFoundError, TandemError
from tandem.service.logging import bind_request
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
# Time that events already made get on their way out before an error ends the stream.
FLUSH_SECONDS = 1.0


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """One per gateway."""

    def __init__(self, services: Services, text: TextService, catalog: Catalog, access: Access | None = None) -> None:
        """Nothing runs yet. Without `access` all callers are one tenant."""
        self._services, self._text, self._catalog = services, text, catalog
        self._access = access or Access()
        self._live = LiveRequests()

    @property
    def draining(self) -> bool:
        """Nothing new is taken."""
        return self._live.draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._live.draining = draining

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """Answers once, at the end."""
        collected: list[convert.Collected] = []

        async def collect(event: Event, job: Job) -> None:
            if not collected:
                collected.append(convert.Collected(job.request_id, job.sampling.n))
            collected[0].add(event)

        await self._serve(convert.asked(request, self._services.config.limits), context, collect)
        return collected[0].response()

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """Streams. A coroutine and no generator: a stream must be able to end while a write waits for its client."""

        async def send(event: Event, job: Job) -> None:
            await context.write(convert.stream_response(event, job))

        await self._serve(convert.asked(request, self._services.config.limits), context, send)

    async def _serve(self, asked: Asked, context: Context, send: Callable[[Event, Job], Awaitable[None]]) -> None:
        """The way of every request."""
        tenant = self._access.tenant_of(context)
        started = asyncio.get_running_loop().time()
        validation.check_sizes(asked, self._services.config.limits)
        self._catalog.check(asked.model)
        validation.check_speculation(asked.speculation, self._services.config.limits, self._catalog.proposers)
        request_id = asked.request_id or uuid.uuid4().hex
        entered = self._live.enter(tenant, request_id, takes_over=asked.resume is not None)
        with bind_request(request_id, tenant):
            async with entered as entry:
                job = await self._prepare(asked, tenant, request_id, started, context.time_remaining())
                entry.take_over()

                async def write(event: Event) -> None:
                    if isinstance(event, Admitted):
                        # Only now: once headers have arrived, a client's retry policy is committed.
                        await context.send_initial_metadata(())
                    await send(event, job)

                await self._run(job, write)

    async def _prepare(
        self, asked: Asked, tenant: str, request_id: str, started: float, remaining: float | None
    ) -> Job:
        """Tokenizes and completes the request."""
        limits, patience = self._services.config.limits, self._services.config.patience
        vocab_size = self._catalog.vocab_size
        sampling = validation.sampling_params(asked, limits, vocab_size)
        validation.check_resume_count(asked, sampling)
        timeout = patience.default_timeout if remaining is None else remaining
        async with asyncio.timeout_at(started + timeout):
            prompt = await self._tokens(asked, vocab_size)
        stopping = validation.stop_rules(
            asked,
            limits,
            prompt_tokens=len(prompt),
            max_context=self._catalog.max_context,
            vocab_size=vocab_size,
        )
        validation.check_resume(asked, stopping, vocab_size)
        return Job(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            stopping=stopping,
            stop=asked.stop,
            include_stop=asked.include_stop,
            logprobs=asked.logprobs,
            skip_special=asked.skip_special,
            priority=asked.priority,
            started=started,
            deadline=started + timeout,
            arrival=time.time(),
            tenant=tenant,
            cache_scope=cache_scope(tenant, asked.cache_salt),
            speculation=asked.speculation,
            resumed=asked.resume,
        )

    async def _tokens(self, asked: Asked, vocab_size: int) -> list[int]:
        if asked.token_ids is not None:
            validation.check_ids("token_ids", asked.token_ids, vocab_size)
            return list(asked.token_ids)
        context = self._catalog.max_context
        if asked.messages is not None:
            return await self._text.encode_chat(asked.messages, context=context)
        return await self._text.encode(asked.text or "", context=context)

    async def _run(self, job: Job, write: Callable[[Event], Awaitable[None]]) -> None:
        """The request in this task, its writer beside it: whichever fails first ends both."""
        buffer = EventBuffer(self._services.config.max_buffered_events)

        async def drain() -> None:
            async for event in buffer:
                await write(event)

        writer = asyncio.create_task(drain())
        try:
            await RequestRun(job, self._services, buffer.put).run()
            buffer.close()
            async with asyncio.timeout_at(job.deadline):
                await asyncio.shield(writer)
        except TimeoutError as exc:
            await _end_writer(writer, buffer, 0, job.deadline)
            raise DeadlineError("the deadline passed before the client had read everything") from exc
        except TandemError as exc:
            flush = 0 if isinstance(exc, SlowReaderError) else FLUSH_SECONDS
            await _end_writer(writer, buffer, flush, job.deadline)
            raise
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        """Models with a ready decode worker."""
        return pb.ListModelsResponse(models=[convert.model(*item) for item in self._catalog.models()])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """One model; NOT_FOUND when it isn't served now."""
        self._catalog.check(request.name)
        for item in self._catalog.models():
            if request.name in ("", item[0], item[1].model_id, self._catalog.name, self._text.tokenizer.config.name):
                return pb.GetModelResponse(model=convert.model(*item))
        raise NotFoundError("no model is served now: no decode worker is ready", reason="MODEL_NOT_FOUND")

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Text or messages to token ids."""
        self._catalog.check(request.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequestError("input: one of text and messages is needed", field="input")
        messages = convert.messages(request.messages) if kind == "messages" else None
        text = request.text if kind == "text" else None
        if text == "":
            return pb.TokenizeResponse()
        validation.check_input(text, messages, self._services.config.limits)
        if messages is not None:
            return pb.TokenizeResponse(token_ids=await self._text.encode_chat(messages))
        add_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return pb.TokenizeResponse(token_ids=await self._text.encode(text or "", add_special=add_special))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """Token ids to text."""
        self._catalog.check(request.model)
        validation.check_count("token_ids", len(request.token_ids), self._services.config.limits.max_token_ids)
        validation.check_ids("token_ids", request.token_ids, self._catalog.vocab_size)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=await self._text.decode(request.token_ids, skip_special=skip))

    async def drain(self, grace: float) -> None:
        """Takes nothing new and waits for what runs, at most `grace` seconds."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._live.idle.wait()


async def _end_writer(writer: asyncio.Task[None], buffer: EventBuffer, seconds: float, deadline: float) -> None:
    """Gives what is left `seconds`, drops the rest, and waits for the write in flight, until the request's deadline.

    gRPC can't send a status beside a message that its transport still holds back. So a client that doesn't read gets
    the status behind that one message; until it reads or goes, it costs that message and no work anywhere.
    """
    buffer.close()
    if seconds:
        await asyncio.wait({writer}, timeout=seconds)
    buffer.drop()
    await asyncio.wait({writer}, timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
