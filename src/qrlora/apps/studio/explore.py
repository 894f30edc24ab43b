"""Explore the space of the adapters of one role. A point is an adapter, and its picture follows the sliders.

ΔR of a point = m · mean + Σ zₖ cₖ is a weighted sum of the members, because mean and components are: so previews need
no adapter of their own, only weights of those that the engine has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from qrlora._said import said
from qrlora.apps.studio.forms import fields, number
from qrlora.apps.studio.pages import error_page, page
from qrlora.apps.studio.shelf import SUFFIX
from qrlora.apps.studio.state import Studio, person_of, registry_for, studio_of
from qrlora.errors import QrloraError, RequestError
from qrlora.operations.registry import Artifact, Link, Registry
from qrlora.operations.registry.references import check_name

router = APIRouter()
COMPONENTS = 6
"""Sliders of a page: the components that hold most."""
FARTHEST = 2.5
"""Standard deviations."""


@router.get("/explore")
def explore(request: Request, role: str = "style") -> Response:
    return page(request, "explore.html", role="subject" if role == "subject" else "style")


@router.get("/explore/space")
def space(request: Request, role: str = "style") -> Response:
    """Show the sliders and the map, once the base model has read the adapters."""
    studio = studio_of(request)
    studio.look()
    try:
        keys, found = _space(studio, role)
    except QrloraError as error:
        return error_page(request, error)
    count = min(COMPONENTS, found.count)
    members = [
        {"key": key, "title": studio.shelf.cards[key].title, "z": found.coordinates[place, :count].tolist()}
        for place, key in enumerate(keys)
    ]
    prompt = f"a photo of a red mug in {found.mean.metadata.trigger} style"
    if role == "subject":
        prompt = f"a photo of a {found.mean.metadata.trigger}"
    values = {"members": members, "shares": found.shares[:count], "farthest": FARTHEST, "prompt": prompt, "role": role}
    return page(request, "part_space.html", **values)


def _space(studio: Studio, role: str) -> tuple[list[str], Any]:
    """Return the space of a role and the keys of its adapters: all that share basis, rank and columns."""
    from qrlora.errors import MismatchError
    from qrlora.method.space import Space
    from qrlora.method.space.record import check_alike

    known = studio.model.engine.shelf.adapters
    keys = [key for key, card in studio.shelf.cards.items() if card.role == role and card.reference and key in known]
    alike: list[str] = []
    for key in keys:
        try:
            if alike:
                check_alike(known[alike[0]], known[key])
            alike.append(key)
        except MismatchError:  # of another rank or basis: a space of its own
            continue
    if len(alike) < 2:
        raise RequestError(
            "too few adapters for a space",
            expected="two or more of one role, rank and base model",
            got=len(alike),
            remedy="train more of them",
        )
    return alike, Space.of([known[key] for key in alike], min(COMPONENTS, len(alike) - 1))


@router.post("/explore/space")
async def keep_space(request: Request) -> Response:
    """Save the space itself, so that training can find a picture's point in it within seconds."""
    studio, form = studio_of(request), await fields(request)
    role = "subject" if form.text("role") == "subject" else "style"
    try:
        kept = await run_in_threadpool(_keep_space, studio, registry_for(request), role)
    except QrloraError as error:
        return error_page(request, error)
    return page(request, "part_saved.html", artifact=kept, policy=False)


def _keep_space(studio: Studio, registry: Registry, role: str) -> Artifact:
    from qrlora.method.space import save_space
    from qrlora.operations.registry.intake import add_space

    _, found = _space(studio, role)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{role}s.space.safetensors")
        save_space(found, path)
        return add_space(registry, path, name=f"{role}s")


@router.post("/explore/save")
async def save(request: Request) -> Response:
    """Save a point of a space as an adapter."""
    form, studio = await fields(request), studio_of(request)
    try:
        z = [number(said("a coordinate"), part, -10, 10) for part in filter(None, form.text("z").split(","))]
        mean, name = form.number("mean", -2, 3, 1), check_name(form.text("name", 60))
        role = "subject" if form.text("role") == "subject" else "style"
        kept = await run_in_threadpool(_keep, studio, registry_for(request), role, z, mean, name, person_of(request))
        await run_in_threadpool(studio.look)
    except QrloraError as error:
        return error_page(request, error)
    return page(request, "part_saved.html", artifact=kept, policy=False)


def _keep(
    studio: Studio, registry: Registry, role: str, z: Sequence[float], mean: float, name: str, owner: str
) -> Artifact:
    from qrlora.apps.studio.records import base_in
    from qrlora.method.adapter import save_adapter
    from qrlora.operations.registry.intake import add_adapter

    keys, found = _space(studio, role)
    members = [registry.get(studio.shelf.cards[key].digest) for key in keys]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name.replace('/', '-')}{SUFFIX}")
        save_adapter(found.adapter(z, mean, name), path)
        links = [Link("based_on", one.digest) for one in members]
        base = base_in(registry, studio.model.name)
        return add_adapter(registry, path, name=name, owner=owner, base=base, links=links, tags=["point"])
