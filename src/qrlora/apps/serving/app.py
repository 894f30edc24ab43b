"""Build the HTTP application: OpenAI's images endpoint, with compositions.

POST /v1/images/generations     pictures; with "stream": true their progress too, as server-sent events
GET  /v1/images/{id}.png        a picture of a request with "response_format": "url"
GET  /v1/models, /v1/models/{}  the base model, and it with each adapter
GET  /health, /metrics          for operators and monitoring
GET  /openapi.json              all of this for programs
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from qrlora.apps.serving.answer import answer, error_response
from qrlora.apps.serving.openapi import GENERATIONS, document
from qrlora.apps.serving.request import ImageRequest, authorise
from qrlora.apps.serving.service import Service
from qrlora.errors import RequestError

CLIENT_GONE = 499
"""Status of an answer that nobody reads any more, as nginx counts it."""


def create_app(service: Service) -> FastAPI:
    """Return the application in front of the engines; when it stops, it finishes the requests that were begun."""

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
            response = await answer(service, request)
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
            raise RequestError(what, status=404, expected="a recent one", got="one that is dropped or never was")
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
    """Answer 500; Starlette raises the error again after this, so that it is logged."""
    return error_response(RequestError("internal server error", status=500, code="server_error"))


async def _not_here(request: Request, error: HTTPException) -> JSONResponse:
    what = f"{request.method} {request.url.path[:200]}: {error.detail}"
    response = error_response(RequestError(what, status=error.status_code))
    response.headers.update(error.headers or {})  # 405 says what is allowed
    return response
