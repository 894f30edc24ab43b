"""Read one request for pictures: its fields, its body, and whether its sender may ask."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qrlora.apps.serving.openapi import largest_side
from qrlora.apps.serving.protocol import Facts, Limits
from qrlora.errors import RequestError


class ImageRequest(BaseModel):
    """The fields of a request: OpenAI's, some of which take one value here, and five of this server alone."""

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
        """Take 2.0 for an integer, as JSON Schema does."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


def side_of(size: str | None, facts: Facts, limit: int | None) -> int:
    """Return the side in pixels that a request's `size` names: "64x64", or the model's own for "auto" and None.

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
        raise out_of_bounds("size", expected, repr(size), f"leave it out for {facts.side}x{facts.side}")
    return side


def out_of_bounds(param: str, expected: str, got: object, remedy: str | None = None) -> RequestError:
    said: dict[str, Any] = {"expected": expected, "got": str(got)[:100], "remedy": remedy}
    return RequestError(f"`{param}` out of bounds", param=param, code="invalid_value", **said)


async def read_request(request: Request, limits: Limits) -> ImageRequest:
    """Read and validate the body of a request.

    Raises:
        RequestError: 413 for a body larger than the limit, 408 for one that does not arrive in time; 400 for a body
            that is not JSON, has unknown fields or wrong values.
    """
    try:
        body = await asyncio.wait_for(_body(request, limits.body_bytes), limits.body_seconds)
    except asyncio.TimeoutError as error:
        expected, remedy = f"all of it within {limits.body_seconds:g} s", "send it again"
        raise RequestError(
            "the body did not arrive in time", status=408, code="request_timeout", expected=expected, remedy=remedy
        ) from error
    try:
        return ImageRequest.model_validate_json(body)
    except ValidationError as error:
        raise _as_request_error(error) from error


async def _body(request: Request, most_bytes: int) -> bytes:
    """Read at most so many bytes of the body; RequestError (413) if there are more."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            expected, got = f"at most {most_bytes} bytes", "more"
            raise RequestError("body too large", status=413, code="request_too_large", expected=expected, got=got)
    return bytes(body)


def _as_request_error(error: ValidationError) -> RequestError:
    """Return an error that names all unknown fields, or else the first wrong value."""
    found = error.errors(include_url=False, include_context=False)
    unknown = [str(one["loc"][0]) for one in found if one["type"] == "extra_forbidden"]
    if unknown:
        known = ", ".join(ImageRequest.model_fields)
        said: dict[str, Any] = {"expected": f"some of {known}", "got": ", ".join(unknown)[:200]}
        said["remedy"] = "`give_way` is called `null_space`" if "give_way" in unknown else None
        return RequestError("unknown fields", param=unknown[0][:100], code="unknown_parameter", **said)
    first = found[0]
    if not first["loc"]:
        return RequestError("the body is not a JSON object", code="invalid_json", expected="JSON", got=first["msg"])
    param, got = str(first["loc"][0]), "nothing" if first["type"] == "missing" else repr(first["input"])[:100]
    return RequestError(f"invalid `{param}`", param=param, code="invalid_value", expected=first["msg"], got=got)


def _spellings(key: str) -> list[bytes]:
    """Return the bytes in which clients send a key: UTF-8, or Latin-1 if it can be written so."""
    spelt = [key.encode("utf-8", "surrogateescape")]
    with suppress(UnicodeEncodeError):
        spelt.append(key.encode("latin-1"))
    return spelt


def authorise(request: Request, keys: Sequence[str]) -> None:
    """Raise RequestError (401) unless the request bears one of these keys, or there are none."""
    given = request.headers.get("authorization", "")
    # Not FastAPI's HTTPBearer, which strips the token as text: the last byte of "voilà" is Latin-1's no-break space.
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
