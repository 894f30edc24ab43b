"""The HTTP application: OpenAI's images endpoint, with compositions.

POST /v1/images/generations     pictures; with "stream": true their progress too, as server-sent events
GET  /v1/images/{id}.png        a picture that was asked for as a url
GET  /v1/models, /v1/models/{}  the base model, and it with each adapter
GET  /health, /metrics          for those who run it
GET  /openapi.json              all of this for programs
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from qrlora.apps.serving.dispatch import Dispatcher, Job, Record
from qrlora.apps.serving.metrics import Metrics
from qrlora.apps.serving.names import composition_of
from qrlora.apps.serving.openapi import GENERATIONS, document, largest_side
from qrlora.apps.serving.protocol import Engines, Facts, Limits, Made, Picture, Settings, Step
from qrlora.errors import RequestError

CLIENT_GONE = 499
"""Status of what nobody reads any more, as nginx counts it."""


class ImageRequest(BaseModel):
    """OpenAI's fields, of which some have one value here, and five of ours, the last."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1)
    model: str | None = None
    n: int | None = Field(None, ge=1)
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    user: str | None = None
    partial_images: int | None = Field(None, ge=0, le=0)
    quality: Literal["auto", "standard"] | None = None
    style: Literal["vivid"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png"] | None = None
    output_compression: int | None = Field(None, ge=100, le=100)
    seed: int | None = Field(None, ge=0, lt=2**63, description="of the first picture; the others count up from it")
    steps: int | None = Field(None, ge=1, description="denoising steps")
    guidance: float | None = Field(None, ge=0, le=100, description="classifier-free guidance scale")
    composition: Any = Field(None, description="weights of adapters by name, in place of +NAME:WEIGHT in the model")
    null_space: float | None = Field(
        None,
        ge=0,
        le=1,
        description="strength of null-space projection; if not given, 0.5 for a subject with a style, else 0",
    )

    @field_validator("n", "partial_images", "output_compression", "seed", "steps", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        """An integer as JSON Schema has it: 2.0 is one."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


class Kept:
    """Pictures by a name that cannot be guessed, until they are too old or too many."""

    def __init__(self, most_bytes: int, seconds: float):
        self.most_bytes, self.seconds = most_bytes, seconds
        self._pictures: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    def put(self, png: bytes) -> str:
        """Keep one, and drop what there is no room for; returns its name."""
        name = secrets.token_urlsafe(24)
        self._pictures[name] = time.monotonic() + self.seconds, png
        self._bytes += len(png)
        self._drop()
        return name

    def get(self, name: str) -> bytes | None:
        """The picture, if it is still there."""
        self._drop()
        return self._pictures.get(name, (0, None))[1]

    def _drop(self) -> None:
        while self._pictures:
            until, png = next(iter(self._pictures.values()))
            if until > time.monotonic() and self._bytes <= self.most_bytes:
                return
            self._pictures.popitem(last=False)
            self._bytes -= len(png)


class Service:
    """State of the application between requests."""

    def __init__(self, engines: Engines, limits: Limits, record: Record | None = None):
        self.engines, self.limits, self.metrics = engines, limits, Metrics()
        self.dispatcher = Dispatcher(
            engines,
            self.metrics,
            at_once=limits.at_once,
            batch_size=limits.batch_size,
            queue_length=limits.queue_length,
            record=record,
        )
        self.kept = Kept(limits.kept_bytes, limits.kept_seconds)
        self._facts: Facts | None = None
        self._looking: asyncio.Task[Facts] | None = None

    async def facts(self) -> Facts:
        """Return the served models and adapters, as last reported."""
        return self._facts or await self.look_again()

    async def look_again(self, seconds: float | None = None) -> Facts:
        """Ask the engines for the served adapters; return the last report if they do not answer in time."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self.engines.facts())
        looking = self._looking  # others may look again before this goes on
        await asyncio.wait({looking}, timeout=seconds if self._facts else None)
        if looking.done() or self._facts is None:
            self._facts = looking.result()
        return self._facts

    async def drain(self) -> None:
        """End what was begun, and begin nothing."""
        await self.dispatcher.drain(self.limits.drain_seconds)

    async def composition(self, model: str | None, field: object) -> dict[str, float]:
        """As `composition_of`; the folder is looked through again before a name is called unknown."""
        facts = await self.facts()
        try:
            return composition_of(model, field, facts.model, facts.adapters)
        except RequestError as error:
            if error.status != 404:
                raise
        facts = await self.look_again()
        return composition_of(model, field, facts.model, facts.adapters)

    async def submit(self, wanted: ImageRequest) -> Job:
        """Queue a request. RequestError if it asks for what cannot be."""
        self.dispatcher.refuse_if_draining()
        limits, facts = self.limits, await self.facts()
        if len(wanted.prompt) > limits.prompt_characters:
            raise _too_much("prompt", f"at most {limits.prompt_characters} characters", len(wanted.prompt))
        count, steps = wanted.n or 1, wanted.steps or facts.steps
        if count > (most := min(limits.pictures, limits.queue_length)):
            raise _too_much("n", f"from 1 to {most}", count)
        if steps > max(limits.steps, facts.steps):
            raise _too_much("steps", f"from 1 to {max(limits.steps, facts.steps)}", steps)
        side = side_of(wanted.size, facts, limits.side)
        composition = await self.composition(wanted.model, wanted.composition)
        guidance = facts.guidance if wanted.guidance is None else wanted.guidance
        seed = secrets.randbelow(2**32) if wanted.seed is None else wanted.seed
        strength = limits.null_space if wanted.null_space is None else wanted.null_space
        pictures = [Picture(wanted.prompt, (seed + i) % 2**63, composition, strength) for i in range(count)]
        return self.dispatcher.submit(Settings(steps, guidance, side), pictures, progress=bool(wanted.stream))


def side_of(size: str | None, facts: Facts, limit: int | None) -> int:
    """The side in pixels that a request's `size` names: "64x64", or the model's own for "auto" and None.

    Raises:
        RequestError: no such form, not square, no multiple of what the model needs, or too large.
    """
    if size in (None, "auto"):
        return facts.side
    largest = largest_side(facts, limit)
    width, _, height = size.partition("x") if size else ("", "", "")
    side = int(width) if width == height and width.isascii() and width.isdigit() and len(width) < 6 else 0
    if not 0 < side <= largest or side % facts.unit:
        expected = f"WIDTHxHEIGHT, square, a multiple of {facts.unit}, at most {largest}x{largest}"
        raise _too_much("size", expected, repr(size), f"leave it out for {facts.side}x{facts.side}")
    return side


def _too_much(param: str, expected: str, got: object, remedy: str | None = None) -> RequestError:
    said: dict[str, Any] = {"expected": expected, "got": str(got)[:100], "remedy": remedy}
    return RequestError(f"`{param}` out of bounds", param=param, code="invalid_value", **said)


async def read_request(request: Request, limits: Limits) -> ImageRequest:
    """The body of a request.

    Raises:
        RequestError: 413 for a larger one than may be, 408 for one that does not come; 400 for what is no JSON, has
            other fields, or values that these cannot have.
    """
    try:
        body = await asyncio.wait_for(_body(request, limits.body_bytes), limits.body_seconds)
    except asyncio.TimeoutError as error:
        expected, remedy = f"all of it within {limits.body_seconds:g} s", "send it again"
        raise RequestError(
            "the body did not come", status=408, code="request_timeout", expected=expected, remedy=remedy
        ) from error
    try:
        return ImageRequest.model_validate_json(body)
    except ValidationError as error:
        raise _as_request_error(error) from error


async def _body(request: Request, most_bytes: int) -> bytes:
    """Never more of it than this; RequestError (413) if there is."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            expected, got = f"at most {most_bytes} bytes", "more"
            raise RequestError("body too large", status=413, code="request_too_large", expected=expected, got=got)
    return bytes(body)


def _as_request_error(error: ValidationError) -> RequestError:
    """All unknown fields, or else the first that is wrong."""
    found = error.errors(include_url=False, include_context=False)
    unknown = [str(one["loc"][0]) for one in found if one["type"] == "extra_forbidden"]
    if unknown:
        known = ", ".join(ImageRequest.model_fields)
        said: dict[str, Any] = {"expected": f"some of {known}", "got": ", ".join(unknown)[:200]}
        said["remedy"] = "`give_way` is called `null_space`" if "give_way" in unknown else None
        return RequestError("unknown fields", param=unknown[0][:100], code="unknown_parameter", **said)
    first = found[0]
    if not first["loc"]:
        return RequestError("the body is no JSON object", code="invalid_json", expected="JSON", got=first["msg"])
    param, got = str(first["loc"][0]), "nothing" if first["type"] == "missing" else repr(first["input"])[:100]
    return RequestError(f"`{param}` is wrong", param=param, code="invalid_value", expected=first["msg"], got=got)


def error_body(error: RequestError) -> dict[str, Any]:
    """The error as OpenAI's clients read it."""
    said = [f"expected {error.expected}"] if error.expected is not None else []
    said += [f"got {error.got}"] if error.got is not None else []
    message = ": ".join(part for part in (error.what, "; ".join(said)) if part)
    message += f". Remedy: {error.remedy}" if error.remedy else ""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    """The same with its status and headers."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    headers |= {"Connection": "close"} if error.status in (408, 413) else {}  # what still comes is not read
    return JSONResponse(error_body(error), error.status, headers)


def _spellings(key: str) -> list[bytes]:
    """The bytes in which clients send a key: UTF-8, or Latin-1 if it can be written so."""
    spelt = [key.encode("utf-8", "surrogateescape")]
    with suppress(UnicodeEncodeError):
        spelt.append(key.encode("latin-1"))
    return spelt


def authorise(request: Request, keys: Sequence[str]) -> None:
    """Raise RequestError (401) unless the request bears one of these keys, or there are none."""
    given = request.headers.get("authorization", "")
    scheme, _, token = given.partition(" ")
    # Every key is compared, each in a time that does not depend on where it differs or how long it is.
    digest = hashlib.sha256(token.encode("latin-1")).digest()  # the header's bytes, as Starlette decoded them
    spelt = [one for key in keys for one in _spellings(key)]
    equal = [hmac.compare_digest(digest, hashlib.sha256(one).digest()) for one in spelt]
    if keys and not (scheme.lower() == "bearer" and any(equal)):
        raise RequestError(
            "wrong API key" if given else "no API key",
            status=401,
            code="invalid_api_key",
            expected="the header `Authorization: Bearer KEY`",
            remedy="ask who runs this server for a key",
        )


def create_app(service: Service) -> FastAPI:
    """The application in front of these engines; when it ends, it lets what was begun come to an end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.drain()

    app = FastAPI(title="qrlora", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestError, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _not_here)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _fault)
    _add_images(app, service)
    _add_models(app, service)
    _add_watching(app, service)
    return app


def _add_images(app: FastAPI, service: Service) -> None:
    @app.post(GENERATIONS)
    async def generations(request: Request) -> Response:
        try:
            response = await _answer(service, request)
        except RequestError as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        except Exception:
            service.metrics.requests.labels(500).inc()
            raise
        service.metrics.requests.labels(response.status_code).inc()
        return response

    @app.get("/v1/images/{name}.png")
    async def picture(name: str) -> Response:
        png = service.kept.get(name)
        if png is None:
            what = "no such picture"
            raise RequestError(what, status=404, expected="one made of late", got="one that is gone or never was")
        return Response(png, media_type="image/png")


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authorise(request, service.limits.api_keys)
        facts = await service.look_again(seconds=1)
        listed = [_model(facts.model)]
        listed += [_model(f"{facts.model}+{name}", **about) for name, about in sorted(facts.adapters.items())]
        how = f"{facts.model}+NAME:WEIGHT+NAME:WEIGHT"
        return {"object": "list", "data": listed, "composition": how, "left_out": facts.left_out}

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> dict[str, Any]:
        authorise(request, service.limits.api_keys)
        await service.composition(model, None)
        return _model(model)


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        schema = ImageRequest.model_json_schema()
        return JSONResponse(document(app, schema, await service.facts(), service.limits))

    @app.get("/health")
    async def health() -> Response:
        try:
            service.dispatcher.refuse_if_draining()
            await service.look_again(seconds=1)
        except Exception as error:  # whatever keeps the engines from answering
            return JSONResponse({"status": getattr(error, "what", "the engines do not answer")}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _model(name: str, **about: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "qrlora", **about}


async def _refused(_: Request, error: RequestError) -> JSONResponse:
    return error_response(error)


async def _fault(_: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error again after this, so that it is logged."""
    return error_response(RequestError("a fault of the server", status=500, code="server_error"))


async def _not_here(request: Request, error: HTTPException) -> JSONResponse:
    what = f"{request.method} {request.url.path[:200]}: {error.detail}"
    response = error_response(RequestError(what, status=error.status_code))
    response.headers.update(error.headers or {})  # 405 says what is allowed
    return response


async def _answer(service: Service, request: Request) -> Response:
    """The answer to a request for pictures. RequestError, ClientDisconnect."""
    started = time.perf_counter()
    authorise(request, service.limits.api_keys)
    wanted = await read_request(request, service.limits)
    if wanted.stream and wanted.response_format == "url":
        expected = "response_format b64_json"
        raise RequestError("a stream holds its pictures", param="response_format", expected=expected, got="url")
    job = await service.submit(wanted)
    if wanted.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return _Stream(service, job, _events(service, job, started), media_type="text/event-stream", headers=headers)
    made = await _while_there(request, _pictures(job), service, job)
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


async def _pictures(job: Job) -> list[bytes]:
    made: dict[int, bytes] = {}
    async for index, event in job.follow():
        if isinstance(event, Made):
            made[index] = event.png
    return [made[index] for index in range(len(made))]


async def _while_there(
    request: Request, pictures: Coroutine[Any, Any, list[bytes]], service: Service, job: Job
) -> list[bytes]:
    """The pictures, unless the client goes first: then the job is withdrawn, and ClientDisconnect raised."""
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


class _Stream(StreamingResponse):
    """Withdraws its request when it ends: who goes before the first event begins no generator that could do it."""

    def __init__(self, service: Service, job: Job, events: AsyncIterator[str], **options: Any):
        super().__init__(events, **options)
        self._service, self._job = service, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._job.ended:
                self._service.metrics.withdrawn.inc()
            self._service.dispatcher.withdraw(self._job)


async def _events(service: Service, job: Job, started: float) -> AsyncIterator[str]:
    """Server-sent events in the shape of OpenAI's: progress, a type of ours, and each picture as it is made."""
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


def _sse(kind: str, **data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
