"""Mix adapters with weights, shown while the sliders move."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from qrlora._said import said
from qrlora.apps.serving.answer import pictures_of, while_there
from qrlora.apps.serving.app import CLIENT_GONE
from qrlora.apps.serving.protocol import Settings
from qrlora.apps.studio import rules
from qrlora.apps.studio.forms import Form, fields, number, spelt, weights
from qrlora.apps.studio.pages import error_page, page
from qrlora.apps.studio.shelf import Card
from qrlora.apps.studio.state import Studio, registry_for, studio_of
from qrlora.errors import QrloraError, RegistryError, RequestError
from qrlora.models.request import Request
from qrlora.operations.policy.check import enforce
from qrlora.operations.registry import Artifact, Registry

router = APIRouter()
FIRST_STEPS = 4
"""Denoising steps of the picture that comes at once."""
GRID = (0.0, 0.5, 1.0, 1.5)
SEEDS = 4
STRONGEST = 2.0
KEPT = {"Cache-Control": "private, max-age=600"}
LITTLE, SOME = 0.12, 0.3
"""Shares of the input directions that two adapters read in common, below which a page says little, or some."""


@router.get("/mix")
def mix(request: HttpRequest, c: str = "", n: float | None = None, p: str = "") -> Response:
    """Show the page; c, n, p: a composition, its null-space strength and a prompt to begin with."""
    studio = studio_of(request)
    studio.look()
    return page(request, "mix.html", weights=weights(c), null_space=n, prompt=p, seeds=SEEDS, cards=_grouped(studio))


@router.get("/mix/cards")
def cards(request: HttpRequest, c: str = "") -> Response:
    """Show the adapters alone, for when there are more of them."""
    studio_of(request).look()
    return page(request, "part_cards.html", weights=weights(c), cards=_grouped(studio_of(request)))


def _grouped(studio: Studio) -> dict[str, list[Card]]:
    """Group the cards by role, subjects and styles first."""
    found: dict[str, list[Card]] = {"subject": [], "style": []}
    for card in studio.shelf.cards.values():
        found.setdefault(card.role if card.role in ("subject", "style") else "other", []).append(card)
    return {role: cards for role, cards in found.items() if cards}


@router.get("/picture.png")
async def picture(
    request: HttpRequest,
    c: str = "",
    n: float | None = None,
    p: str = "",
    s: int = 0,
    stage: str = "refined",
    page: str = "",
) -> Response:
    """Sample one picture of a composition. `page`: of one page's previews only the newest is made."""
    studio = studio_of(request)
    try:
        if n is not None:
            number(said("Keep them apart"), n, 0, 1)
        if not 0 <= s < 2**63:
            raise RequestError("no such seed", expected="a whole number from 0", got=s)
        png = await _made(request, studio, Request(p.strip()[:4000] or "a picture", s, weights(c), n), stage, page)
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    except QrloraError as error:
        return error_page(request, error)
    return Response(png, media_type="image/png", headers={"Cache-Control": "no-store"})


async def _made(request: HttpRequest, studio: Studio, asked: Request, stage: str, tab: str) -> bytes:
    """One picture that the policy permits. ClientDisconnect if its page has asked for a newer one meanwhile."""
    if tab:
        _outdate(studio, tab, request)
    try:
        service = studio.service
        permitted = await service.permitted(asked.prompt, asked.composition, asked.null_space, "generate")
        wanted, facts = Request(asked.prompt, asked.seed, asked.composition, *permitted), await service.facts()
        steps = min(FIRST_STEPS, facts.steps) if stage == "first" else facts.steps
        files = sorted((facts.digests[name], weight) for name, weight in wanted.composition.items())
        key = (wanted.prompt, wanted.seed, *files, wanted.null_space, steps)
        if tab and studio.newest.get(tab) is not request:
            raise ClientDisconnect
        if (png := studio.recent.get(key)) is not None:
            return png
        job = service.dispatcher.submit(Settings(steps, facts.guidance, facts.side), [wanted])
        request.state.job = job
        [png] = await while_there(request, pictures_of(job), service, job)
    finally:
        if studio.newest.get(tab) is request:
            del studio.newest[tab]
    studio.recent.put(key, png)
    return png


def _outdate(studio: Studio, tab: str, request: HttpRequest) -> None:
    """Withdraw the preview that a page has asked for before this one."""
    before, studio.newest[tab] = studio.newest.get(tab), request
    if before and (job := getattr(before.state, "job", None)):
        studio.service.dispatcher.withdraw(job)


@router.get("/thumb/{key}.png")
async def thumb(request: HttpRequest, key: str) -> Response:
    """Send the picture that an adapter was trained on; else a sample of it alone, cached by the adapter's digest."""
    studio = studio_of(request)
    card = studio.shelf.cards.get(key)
    if card is None:
        raise RequestError("no such adapter", status=404, got=key[:60])
    if card.picture:
        return Response(
            await run_in_threadpool(studio.registry.read, card.picture), media_type="image/png", headers=KEPT
        )
    path = studio.place / "thumbs" / f"{card.digest.removeprefix('sha256:') or 'none'}.png"
    if not path.is_file():
        try:
            png = await _made(request, studio, Request(card.prompt, 0, {key: 1.0}), "refined", "")
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
    return Response(path.read_bytes(), media_type="image/png", headers=KEPT)


@router.get("/mix/about")
def about(request: HttpRequest, c: str = "", n: float | None = None) -> Response:
    """Describe a composition before a picture is made: interference, licence, the policy's verdict."""
    studio = studio_of(request)
    parts = weights(c)
    return page(
        request,
        "part_about.html",
        pairs=_pairs(studio, parts),
        little=LITTLE,
        some=SOME,
        licence=rules.licence_of(studio, parts),
        verdict=rules.verdict_of(studio, parts, n),
        count=len(parts),
    )


def _pairs(studio: Studio, parts: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the interference of each two, largest first; weights do not change it."""
    from qrlora.method.composition import Interference
    from qrlora.method.composition.parts import on_one_basis

    known, digests = studio.model.engine.shelf.snapshot() if studio.model.ready else ({}, {})
    names = [name for name in parts if name in known and name in studio.shelf.cards]
    if len(names) < 2 or not on_one_basis([known[name] for name in names]):
        return []
    key = tuple(digests[name] for name in names)
    if (found := studio.interference.get(key)) is None:
        found = Interference.of([(known[name], 1.0) for name in names]).total
        studio.interference.put(key, found)
    pairs = [
        {
            "first": studio.shelf.cards[names[i]].title,
            "second": studio.shelf.cards[names[j]].title,
            "shared": found.shared_rows[i][j],
            "cosine": found.cosine[i][j],
        }
        for i, j in itertools.combinations(range(len(names)), 2)
    ]
    return sorted(pairs, key=lambda pair: -pair["shared"])


@router.get("/mix/grid")
def grid(request: HttpRequest, c: str = "", n: float | None = None, p: str = "", s: int = 0) -> Response:
    """Sample the first two adapters of a composition at every pair of weights; the others keep theirs."""
    parts = weights(c)
    if len(parts) < 2:
        raise RequestError("a grid needs two adapters", expected="two sliders above zero", got=len(parts))
    cards = studio_of(request).shelf.cards
    if unknown := [name for name in parts if name not in cards]:
        raise RequestError("no such adapter", status=404, got=", ".join(unknown)[:60])
    rows, columns, *_ = parts
    cells = [[spelt(parts | {rows: a, columns: b}) for b in GRID] for a in GRID]
    titles = [cards[key].title for key in (rows, columns)]
    values: dict[str, Any] = {"cells": cells, "weights": GRID, "titles": titles, "p": p, "s": s, "n": n}
    return page(request, "part_grid.html", **values)


@router.post("/mix/save")
async def save(request: HttpRequest) -> Response:
    """Save a composition in the registry, if the policy permits it."""
    form, studio, registry = await fields(request), studio_of(request), registry_for(request)
    try:
        kept, policy = await run_in_threadpool(_keep, studio, registry, form)
    except QrloraError as error:
        return error_page(request, error)
    return page(request, "part_saved.html", artifact=kept, policy=policy)


def _keep(studio: Studio, registry: Registry, form: Form) -> tuple[Artifact, bool]:
    """Save the composition; return its artifact, and whether a policy is in force."""
    from qrlora.apps.studio.records import add_mix  # needs torch, which the first page is not to wait for

    parts = weights(form.text("c"))
    unknown = [key for key in parts if not getattr(studio.shelf.cards.get(key), "reference", "")]
    if not parts:
        raise RequestError("nothing to keep", expected="a slider above zero", got=said("none"))
    if unknown:
        raise RegistryError(
            "only registered adapters can be kept in a mix",
            got=", ".join(unknown),
            remedy="leave out those of a folder, or let who runs the studio add their files to the library: "
            "`qrlora registry add FILE --name NAME`",
        )
    strength = form.number("n", 0, 1, 0)
    verdict = rules.verdict_of(studio, parts, strength)
    if verdict:
        enforce([verdict], registry)
    references = {studio.shelf.cards[key].reference: weight for key, weight in parts.items()}
    licence = rules.licence_of(studio, parts)["expression"]
    kept = add_mix(registry, studio.model.name, references, strength, form.text("name", 128), licence)
    return kept, verdict is not None
