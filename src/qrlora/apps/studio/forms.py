"""Read the forms and files that pages send, within limits of size."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import Request

from qrlora._said import Said, replaced, said, verbatim
from qrlora.errors import QrloraError, RequestError

MOST_FORM = 256 * 1024
MOST_UPLOAD = 64 * 2**20
"""Bytes of a picture."""
LABELS = {
    "name": said("Name"),
    "reason": said("Reason"),
    "alias": said("Alias"),
    "trigger": said("Trigger"),
    "noun": said("What does it show?"),
    "caption": said("Caption"),
    "licence": said("Licence"),
    "key": said("Key"),
    "prompts": said("Prompts, one a line"),
    "brand": said("Brand sheet"),
    "toml": said("Project file (TOML)"),
    "n": said("Keep them apart"),
    "seeds": said("Pictures of each prompt"),
    "mean": said("Strength of what all have in common"),
    "step": said("step"),
}
"""Fields of forms as their pages call them."""
SECONDS = 60
"""Seconds that a body may take to arrive."""


async def _chunks(request: Request, most: int, write: object) -> None:
    done = 0
    async for chunk in request.stream():
        done += len(chunk)
        if done > most:
            remedy = "scale the picture down" if most == MOST_UPLOAD else "send less"
            raise RequestError(
                "too large",
                status=413,
                expected=said("at most %(most)s KB", most=most // 1024),
                got=said("more"),
                remedy=remedy,
            )
        write(chunk)  # type: ignore[operator]


async def _whole(request: Request, most: int, write: object) -> None:
    try:
        await asyncio.wait_for(_chunks(request, most, write), SECONDS)
    except asyncio.TimeoutError as error:
        expected = said("all of it within %(seconds)s s", seconds=SECONDS)
        raise RequestError("it did not come", status=408, expected=expected, remedy="send it again") from error


async def fields(request: Request) -> Form:
    """Return the fields of a form."""
    body = bytearray()
    await _whole(request, MOST_FORM, body.extend)
    return Form(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


async def upload(request: Request, path: Path) -> None:
    """Write the body of a request to a file; nothing of it is left if it is too large."""
    try:
        with path.open("xb") as stream:
            await _whole(request, MOST_UPLOAD, stream.write)
    except RequestError:
        path.unlink(missing_ok=True)
        raise


def renamed(error: QrloraError, path: Path, name: str) -> QrloraError:
    """Return the error about a file or folder of the studio, with its name as its sender knows it."""
    if isinstance(error, RequestError):
        return error
    given = {key: value for key in ("expected", "got", "remedy") if (value := getattr(error, key)) is not None}
    shown: dict[str, Any] = {key: replaced(verbatim(value), str(path), name) for key, value in given.items()}
    return QrloraError(replaced(error.what, str(path), name), **shown)


class Form:
    """The fields of a form by name; a name may have several values."""

    def __init__(self, pairs: list[tuple[str, str]]):
        self.pairs = pairs

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name]

    def text(self, name: str, most: int = 4000, default: str = "") -> str:
        """Return one field without surrounding white space. RequestError if it is longer than `most` characters."""
        value = next(iter(self.all(name)), default).strip()
        if len(value) > most:
            raise RequestError(
                said("%(name)s is too long", name=LABELS.get(name, verbatim(name))),
                expected=said("at most %(most)s characters", most=most),
                got=len(value),
            )
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A field as a number within bounds. RequestError otherwise."""
        return number(LABELS.get(name, verbatim(name)), self.text(name) or default, least, most)


def number(name: Said, value: object, least: float, most: float) -> float:
    """A value as a number within bounds. RequestError otherwise."""
    try:
        found = float(str(value))
    except ValueError:
        found = float("nan")
    if not least <= found <= most:
        raise RequestError(
            said("%(name)s is out of bounds", name=name),
            expected=said("a number from %(least)s to %(most)s", least=f"{least:g}", most=f"{most:g}"),
            got=str(value)[:40],
        )
    return found


def weights(text: str) -> dict[str, float]:
    """Parse `teapot:0.9,chalk:1` as weights by name; zeros are left out. RequestError for anything else."""
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.rpartition(":")
        if value := number(said("the weight of %(name)s", name=name[:40]), weight, -10, 10):
            found[name] = value
    return found


def spelt(weights: Mapping[str, float]) -> str:
    """Undo `weights`."""
    return ",".join(f"{name}:{weight:g}" for name, weight in weights.items())
