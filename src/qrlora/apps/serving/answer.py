"""Answer one request over HTTP: pictures as JSON, progress and pictures as server-sent events, or an error."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from qrlora.apps.serving.dispatch import Job
from qrlora.apps.serving.protocol import Made, Step
from qrlora.apps.serving.request import authorise, read_request
from qrlora.apps.serving.service import Service
from qrlora.errors import RequestError


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the error as OpenAI's clients read it."""
    said = [f"expected {error.expected}"] if error.expected is not None else []
    said += [f"got {error.got}"] if error.got is not None else []
    message = ": ".join(part for part in (error.what, "; ".join(said)) if part)
    message += f". Remedy: {error.remedy}" if error.remedy else ""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    """Return the error as an HTTP response."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    headers |= {"Connection": "close"} if error.status in (408, 413) else {}  # what still comes is not read
    return JSONResponse(error_body(error), error.status, headers)


async def answer(service: Service, request: Request) -> Response:
    """Answer a request for pictures. Raises RequestError, and ClientDisconnect if the client goes first."""
    started = time.perf_counter()
    authorise(request, service.limits.api_keys)
    wanted = await read_request(request, service.limits)
    if wanted.stream and wanted.response_format == "url":
        expected = "response_format b64_json"
        raise RequestError("a stream contains its pictures", param="response_format", expected=expected, got="url")
    job = await service.submit(wanted)
    if wanted.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return _Stream(service, job, _events(service, job, started), headers=headers)
    made = await while_there(request, pictures_of(job), service, job)
    service.metrics.request_seconds.observe(time.perf_counter() - started)
    data: list[dict[str, Any]] = []
    for picture, png in zip(job.pictures, made, strict=True):
        if wanted.response_format == "url":
            content = {"url": f"{request.base_url}v1/images/{service.kept.put(png)}.png"}
        else:
            content = {"b64_json": base64.b64encode(png).decode()}
        data.append({**content, "seed": picture.seed})
    return JSONResponse({"created": int(time.time()), "data": data, **_kind(job)})


def _kind(job: Job) -> dict[str, str]:
    side = job.settings.side
    return {"size": f"{side}x{side}", "output_format": "png", "background": "opaque"}


async def pictures_of(job: Job) -> list[bytes]:
    """Return the pictures of a request as PNG, in their order. RequestError if one cannot be made."""
    made: dict[int, bytes] = {}
    async for index, event in job.follow():
        if isinstance(event, Made):
            made[index] = event.png
    return [made[index] for index in range(len(made))]


async def while_there(
    request: Request, pictures: Coroutine[Any, Any, list[bytes]], service: Service, job: Job
) -> list[bytes]:
    """Return the pictures; if the client goes first, withdraw the job and raise ClientDisconnect."""
    work, gone = asyncio.create_task(pictures), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    except (ClientDisconnect, asyncio.CancelledError):
        service.metrics.withdrawn.inc()
        raise
    finally:
        work.cancel()
        gone.cancel()
        service.dispatcher.withdraw(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(EventSourceResponse):
    """Stream that withdraws its request when it ends: where a client goes before the first event, no generator runs."""

    def __init__(self, service: Service, job: Job, events: AsyncIterator[bytes], **options: Any):
        super().__init__(events, **options)
        self._service, self._job = service, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._job.ended:
                self._service.metrics.withdrawn.inc()
            self._service.dispatcher.withdraw(self._job)


async def _events(service: Service, job: Job, started: float) -> AsyncIterator[bytes]:
    """Yield server-sent events as OpenAI shapes them: progress (our own type), and each picture when it is made."""
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": {}}  # clients read it
    try:
        async for index, event in job.follow():
            common = {"index": index, "created_at": int(time.time())}
            if isinstance(event, Step):
                yield _sse("image_generation.progress", **common, step=event.done, steps=event.of)
            else:
                content = {"b64_json": base64.b64encode(event.png).decode(), "seed": job.pictures[index].seed}
                yield _sse("image_generation.completed", **common, **content, **_kind(job), quality="auto", usage=usage)
        service.metrics.request_seconds.observe(time.perf_counter() - started)
    except RequestError as error:
        yield _sse("error", **error_body(error))


def _sse(kind: str, **data: Any) -> bytes:
    return format_sse_event(event=kind, data_str=json.dumps({"type": kind, **data}))
