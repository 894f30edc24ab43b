"""Compare two mixes side by side: scores, crosstalk, a brand sheet; and a blind vote with its tally."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from qrlora._files import make_folder, write_atomically
from qrlora._said import packed, said
from qrlora.apps.serving.answer import pictures_of
from qrlora.apps.serving.protocol import Settings
from qrlora.apps.studio.ballots import Booth
from qrlora.apps.studio.forms import Form, fields
from qrlora.apps.studio.pages import error_page, in_words, page
from qrlora.apps.studio.runs import told
from qrlora.apps.studio.state import Studio, person_of, registry_for, studio_of
from qrlora.errors import QrloraError, RequestError
from qrlora.models.request import Request
from qrlora.operations.registry import Artifact, Registry

router = APIRouter()
log = logging.getLogger(__name__)
MOST_PROMPTS, MOST_SEEDS = 8, 8
ARMS = ("a", "b")
tasks: set[asyncio.Task[None]] = set()
"""Comparisons that are being made; asyncio itself holds no task."""


@router.get("/prove")
def prove(request: HttpRequest) -> Response:
    studio = studio_of(request)
    options = [*studio.registry.search(kind="composition"), *studio.registry.search(kind="adapter")]
    return page(request, "prove.html", options=[one for one in options if one.names], proofs=_all(studio))


def _all(studio: Studio) -> list[dict[str, Any]]:
    """List the comparisons, newest first."""
    found = sorted((studio.place / "proofs").glob("*/proof.json"), key=lambda path: -path.stat().st_mtime)
    return [{"id": path.parent.name, **json.loads(path.read_text())} for path in found[:50]]


def _folder(studio: Studio, name: str) -> Path:
    folder = studio.place / "proofs" / name
    if not name.isalnum() or not (folder / "proof.json").is_file():
        raise RequestError("no such comparison", status=404, got=name[:40])
    return folder


def _read(folder: Path, file: str = "proof.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / file).read_text())
    return content


def _write(folder: Path, content: Mapping[str, Any], file: str = "proof.json") -> None:
    write_atomically(folder / file, json.dumps(content).encode())


@router.post("/prove")
async def begin(request: HttpRequest) -> Response:
    """Begin a comparison; it goes on when the page is left."""
    form, studio, person = await fields(request), studio_of(request), person_of(request)
    try:
        proof = await run_in_threadpool(_asked, registry_for(request), studio, form)
    except QrloraError as error:
        return error_page(request, error)
    name = secrets.token_hex(8)
    folder = studio.place / "proofs" / name
    await run_in_threadpool(make_folder, folder)
    _write(folder, {**proof, "state": "waiting", "by": person})
    task = asyncio.create_task(_make(studio, folder, studio.registry_of(person)))
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return Response(status_code=204, headers={"HX-Redirect": f"/prove/{name}"})


def _asked(registry: Registry, studio: Studio, form: Form) -> dict[str, Any]:
    """Return the comparison that a form asks for, checked before any picture is made."""
    from qrlora.apps.studio.compare import brand_of

    prompts = [line.strip() for line in form.text("prompts", 8000).splitlines() if line.strip()]
    seeds = int(form.number("seeds", 1, MOST_SEEDS, 2))
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise RequestError(
            "no prompts to compare on",
            expected=said("1 to %(most_prompts)s lines", most_prompts=MOST_PROMPTS),
            got=len(prompts),
        )
    sheet = form.text("brand", 100_000)
    brand_of(sheet)
    arms = {arm: _arm(studio, registry.get(form.text(arm, 200))) for arm in ARMS}
    if arms["a"]["digest"] == arms["b"]["digest"]:
        raise RequestError("a mix compared with itself", expected="two different ones", got=arms["a"]["title"])
    return {"arms": arms, "prompts": prompts, "seeds": seeds, "brand": sheet, "done": 0, "of": 0}


def _arm(studio: Studio, artifact: Artifact) -> dict[str, Any]:
    """Return title, digest, sliders and strength of one side."""
    from qrlora.apps.studio.forms import weights
    from qrlora.apps.studio.library import mix_of

    mix = mix_of(studio, artifact)
    if mix is None:
        remedy = "the library says what it is made of"
        raise RequestError(
            said("the adapters of %(title)s are not all on the shelf", title=artifact.title), remedy=remedy
        )
    return {
        "title": artifact.title,
        "digest": artifact.digest,
        "parts": weights(mix["c"]),
        "null_space": mix["n"] or 0.0,
    }


async def _make(studio: Studio, folder: Path, registry: Registry) -> None:
    """Make the pictures of both sides and of every part alone, then measure them."""
    from qrlora.apps.studio.compare import measure

    proof = _read(folder)
    try:
        facts = await studio.service.facts()
        groups = {arm: (side["parts"], side["null_space"]) for arm, side in proof["arms"].items()}
        parts = {key for side in proof["arms"].values() if len(side["parts"]) > 1 for key in side["parts"]}
        groups |= {f"alone {key}": ({key: 1.0}, 0.0) for key in sorted(parts)}
        proof |= {"state": "running", "of": len(groups) * len(proof["prompts"]) * proof["seeds"]}
        for group, (composition, strength) in groups.items():
            for number, prompt in enumerate(proof["prompts"]):  # a few at a time: others' previews come between
                permit = studio.service.permitted(prompt, composition, strength, "generate")
                allowed = (composition, *await permit)
                wanted = [Request(prompt, seed, *allowed) for seed in range(proof["seeds"])]
                job = studio.service.dispatcher.submit(Settings(facts.steps, facts.guidance, facts.side), wanted)
                for seed, png in enumerate(await pictures_of(job)):
                    path = folder / group / f"{number:02d}-{seed}.png"
                    write_atomically(path, png, make_folder=True)
                proof["done"] += proof["seeds"]
                _write(folder, proof)
        found = await run_in_threadpool(measure, studio, registry, folder, proof)
        _write(folder, {**proof, "state": "done", "found": found})
    except Exception as error:  # whatever it is, the page has to say it
        if not isinstance(error, QrloraError):
            log.exception("comparison %s", folder.name)
        _write(folder, {**proof, "state": "failed", "error": packed(told(error))})


@router.get("/prove/{name}")
def show(request: HttpRequest, name: str) -> Response:
    folder = _folder(studio_of(request), name)
    part = request.headers.get("hx-target") == "proof"
    votes = len(list((folder / "votes").glob("*.json")))
    return page(request, "part_proof.html" if part else "proof.html", proof=_read(folder), name=name, votes=votes)


@router.get("/prove/{name}/pictures/{group}/{file}")
def picture(request: HttpRequest, name: str, group: str, file: str) -> Response:
    path = _folder(studio_of(request), name) / group / file
    if group not in ARMS or not file.endswith(".png") or "/" in file or ".." in file or not path.is_file():
        raise RequestError("no such picture", status=404, got=file[:40])
    return FileResponse(path)


# The blind vote


def _booth(request: HttpRequest, name: str) -> Booth:
    from qrlora.apps.studio.compare import ballot_of

    folder = _folder(studio_of(request), name)
    return Booth(ballot_of(folder, ARMS), f"/prove/{name}", f"/prove/{name}", in_words(request, said("Prove")))


@router.get("/prove/{name}/vote")
def vote(request: HttpRequest, name: str) -> Response:
    return _booth(request, name).next(request)


@router.post("/prove/{name}/vote")
async def take_vote(request: HttpRequest, name: str) -> Response:
    form = await fields(request)
    return await run_in_threadpool(lambda: _booth(request, name).take(request, form))


@router.get("/prove/{name}/tally")
def tally(request: HttpRequest, name: str) -> Response:
    arms = _read(_folder(studio_of(request), name))["arms"]
    return _booth(request, name).tally(request, {arm: side["title"] for arm, side in arms.items()})
