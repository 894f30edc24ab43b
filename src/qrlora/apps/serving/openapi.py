"""Write the OpenAPI document: the fields of a request for the served model, and every status with its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from qrlora.apps.serving.names import WEIGHTS
from qrlora.apps.serving.protocol import Facts, Limits

GENERATIONS = "/v1/images/generations"
MEANING = {
    400: "A value, field or body that cannot be used",
    401: "No API key, or a wrong one",
    403: "Not permitted by the policy, or approved by nobody",
    404: "No such model, adapter, picture or path",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "The queue is full; Retry-After says when to come back",
    500: "A fault of the server",
    503: "Shutting down, or too many connections",
}
REFUSED = {
    GENERATIONS: (400, 401, 403, 404, 408, 413, 429),
    "/v1/images/{name}.png": (404,),
    "/v1/models": (401,),
    "/v1/models/{model}": (400, 401, 404),
    "/health": (),
    "/metrics": (),
}
"""Beside 500 and 503, which every request may meet."""


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


TEXT, COUNT, MAYBE = {"type": "string"}, {"type": "integer"}, {"type": ["string", "null"]}
ERROR = _object("error", error=_object("message type param code", message=TEXT, type=TEXT, param=MAYBE, code=MAYBE))
MODEL = _object("id object created owned_by", id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT)
PICTURE = _object("seed", b64_json=TEXT, url=TEXT, seed=COUNT)
ANSWERS: dict[str, dict[str, Any]] = {
    GENERATIONS: {
        "application/json": _object(
            "created data size output_format background",
            created=COUNT,
            data={"type": "array", "items": PICTURE},
            size=TEXT,
            output_format=TEXT,
            background=TEXT,
        ),
        "text/event-stream": _object("event data", event=TEXT, data=TEXT),
    },
    "/v1/images/{name}.png": {"image/png": {"type": "string", "format": "binary"}},
    "/v1/models": {
        "application/json": _object(
            "object data composition left_out",
            object={"const": "list"},
            data={"type": "array", "items": MODEL},
            composition=TEXT,
            left_out={"type": "object", "additionalProperties": TEXT},
        )
    },
    "/v1/models/{model}": {"application/json": MODEL},
    "/health": {"application/json": _object("status", status=TEXT)},
    "/metrics": {"text/plain": TEXT},
}
"""Successful responses by path and media type."""


def document(app: FastAPI, request: Mapping[str, Any], facts: Facts, limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI document of this application, with the bounds of these facts and limits.

    request: the JSON schema of a request for pictures.
    """
    made = get_openapi(title="qrlora", version="1", routes=app.routes)
    if limits.api_keys:
        made.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in made["paths"].items():
        refused = REFUSED[path]
        for operation in operations.values():
            operation["responses"] = _responses(path, refused)
            if limits.api_keys and 401 in refused:
                operation["security"] = [{"key": []}]
    body = {"application/json": {"schema": bounded(request, facts, limits)}}
    made["paths"][GENERATIONS]["post"]["requestBody"] = {"content": body, "required": True}
    return made


def _responses(path: str, refused: Iterable[int]) -> dict[str, Any]:
    answered = {kind: {"schema": schema} for kind, schema in ANSWERS[path].items()}
    failed = {"application/json": {"schema": ERROR}}
    said = {str(status): {"description": MEANING[status], "content": failed} for status in (*refused, 500, 503)}
    return {"200": {"description": "Fulfilled", "content": answered}, **said}


def bounded(request: Mapping[str, Any], facts: Facts, limits: Limits) -> dict[str, Any]:
    """Return the request's schema with what this model and these limits allow."""
    properties = dict(request["properties"])
    largest = largest_side(facts, limits.side)
    sizes = [f"{side}x{side}" for side in range(facts.unit, largest + 1, facts.unit)]
    weight = {"type": "number", "minimum": -WEIGHTS, "maximum": WEIGHTS}
    bounds: dict[str, dict[str, Any]] = {
        "prompt": {"maxLength": limits.prompt_characters},
        "n": {"minimum": 1, "maximum": min(limits.pictures, limits.queue_length)},
        "steps": {"minimum": 1, "maximum": max(limits.steps, facts.steps)},
        "size": {"enum": ["auto", *sizes, None]},
        "composition": {"type": ["object", "null"], "additionalProperties": weight},
    }
    for name, bound in bounds.items():
        properties[name] = {**properties[name], **bound}
    streamed = {"stream": {"const": True}, "response_format": {"const": "url"}}
    return {**request, "properties": properties, "not": {"properties": streamed, "required": [*streamed]}}


def largest_side(facts: Facts, limit: int | None) -> int:
    """Return the longest side of a picture in pixels: the limit, else twice the model's own, and never more than it
    makes."""
    return min(side for side in (limit or 2 * facts.side, facts.largest_side) if side)
