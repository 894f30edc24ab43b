"""Show the registry in the browser: search, lineage, licence, aliases, approvals, export, verify."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from qrlora._said import Said, joined, said, verbatim
from qrlora.apps.studio.forms import Form, fields, spelt
from qrlora.apps.studio.pages import N_, error_page, page
from qrlora.apps.studio.shelf import SLASH, SUFFIX
from qrlora.apps.studio.state import Studio, registry_for, studio_of
from qrlora.errors import QrloraError, RegistryError, RequestError
from qrlora.operations.policy import approval
from qrlora.operations.policy.check import in_force
from qrlora.operations.policy.combination import combination_of
from qrlora.operations.policy.decisions import find
from qrlora.operations.provenance.audit import broken
from qrlora.operations.provenance.keys import key_names, key_path
from qrlora.operations.registry import Artifact, Registry
from qrlora.operations.registry.lineage import graph

if TYPE_CHECKING:
    from qrlora.operations.provenance.keys import SigningKey

router = APIRouter()
SHOWN = {
    "adapter": N_("Adapters"),
    "composition": N_("Compositions"),
    "space": N_("Spaces"),
    "base": N_("Base models"),
    "picture": N_("Pictures"),
    "report": N_("Reports"),
    "approval": N_("Approvals"),
}
PROGRAMS = {"diffusers": "diffusers", "comfyui": "ComfyUI"}
APPROVABLE = ("adapter", "composition")
MOST_NODES = 60
"""Artifacts of a lineage as a picture; more are no picture."""
LATER = ("measured_by", "approved_by")
"""Relations to what came afterwards."""
BOX, GAP_X, GAP_Y = (168, 44), 56, 20


@router.get("/library")
def library(request: Request, q: str = "", kind: str = "adapter") -> Response:
    found = studio_of(request).registry.search(
        q[:200], kind=kind if kind in SHOWN else None, deprecated=True, limit=300
    )
    part = request.headers.get("hx-target") == "found"
    return page(request, "part_found.html" if part else "library.html", found=found, kinds=SHOWN, kind=kind, q=q)


@router.get("/library/verify")
def verify(request: Request) -> Response:
    """Hash everything that is stored again, and follow the audit log's chain."""
    registry = studio_of(request).registry
    stored = [one for one in registry.search(deprecated=True, limit=100_000) if one.stored]
    faults = [said("%(title)s: %(why)s", title=one.title, why=why) for one in stored if (why := _fault(registry, one))]
    entries = registry.log()
    faults += broken(entries)
    return page(request, "part_verified.html", faults=faults, files=len(stored), entries=len(entries))


def _fault(registry: Registry, artifact: Artifact) -> Said | None:
    try:
        registry.path(artifact)
    except QrloraError as error:
        return joined([error.what, verbatim(error.got)]) if error.got is not None else error.what
    return None


@router.get("/library/{digest}")
def show(request: Request, digest: str) -> Response:
    """Show one artifact."""
    studio = studio_of(request)
    artifact = studio.registry.get(digest)
    lineage = graph(studio.registry, artifact)
    names = {one.partition("@")[0] for one in artifact.names}
    log = [
        entry
        for entry in studio.registry.log()
        if entry.subject == artifact.digest or entry.subject.partition("@")[0] in names
    ]
    return page(
        request,
        "artifact.html",
        artifact=artifact,
        picture=_picture_of(studio, artifact),
        parts=[(lineage.nodes[edge.target], edge) for edge in _parts(studio.registry, artifact)],
        mix=mix_of(studio, artifact),
        drawing=_drawing(lineage.nodes, lineage.edges, artifact.digest),
        log=log[-20:][::-1],
        programs=PROGRAMS if artifact.kind in APPROVABLE else {},
        keys=key_names(),
        **_approval(studio.registry, artifact),
    )


def _parts(registry: Registry, artifact: Artifact) -> list[Any]:
    return registry.edges(artifact.digest, relation="composed_of") if artifact.kind == "composition" else []


def mix_of(studio: Studio, artifact: Artifact) -> dict[str, Any] | None:
    """Return the sliders that an adapter or a composition stands for, if all of its adapters are on the shelf."""
    keys = {card.digest: key for key, card in studio.shelf.cards.items()}
    if artifact.digest in keys:
        return {"c": spelt({keys[artifact.digest]: 1.0}), "n": None}
    parts = _parts(studio.registry, artifact)
    if not parts or any(edge.target not in keys for edge in parts):
        return None
    return {"c": spelt({keys[edge.target]: edge.weight for edge in parts}), "n": parts[0].null_space}


def _picture_of(studio: Studio, artifact: Artifact) -> str:
    """Return the address of a picture that shows it; "" if there is none."""
    if artifact.kind == "picture":
        return f"/library/{artifact.digest}/picture"
    card = studio.shelf.card_of(artifact.digest)
    return f"/thumb/{card.key}.png" if card else ""


@router.get("/library/{digest}/picture")
def picture(request: Request, digest: str) -> Response:
    registry = studio_of(request).registry
    artifact = registry.get(digest)
    if artifact.kind not in ("picture", "generated"):
        raise RequestError("this is no picture", got=artifact.kind)
    return Response(registry.read(artifact), media_type="image/png")


def _approval(registry: Registry, artifact: Artifact) -> dict[str, Any]:
    """Return the policy in force, an artifact's approvals under it, and the open requests about it."""
    policy = in_force(registry)
    if artifact.kind not in APPROVABLE:
        return {"policy": policy, "standing": None, "asked": []}
    standing = find(registry, combination_of(registry, artifact.digest), policy)
    title = combination_of(registry, artifact.digest).title
    requests = [one for one in registry.search(kind="approval") if one.facts.get("title") == title]
    return {"policy": policy, "standing": standing, "asked": requests}


# What is done


@router.post("/library/{digest}/{action}")
async def act(request: Request, digest: str, action: str) -> Response:
    """Move an alias, deprecate, ask for an approval, or give it."""
    form, registry = await fields(request), registry_for(request)
    known: dict[str, Callable[[Registry, Artifact, Form], object]] = {
        "alias": _move_alias,
        "deprecate": lambda registry, artifact, form: registry.deprecate(artifact.digest, form.text("reason", 400)),
        "request": _ask,
        "approve": lambda registry, artifact, form: _approve(registry, artifact, form, studio_of(request)),
    }
    try:
        if action not in known:
            raise RequestError("no such action", status=404, got=action[:40])
        artifact = await run_in_threadpool(registry.get, digest)
        await run_in_threadpool(known[action], registry, artifact, form)
    except QrloraError as error:
        return error_page(request, error)
    return Response(status_code=204, headers={"HX-Redirect": f"/library/{artifact.digest}"})


def _move_alias(registry: Registry, artifact: Artifact, form: Form) -> None:
    if not artifact.names:
        raise RegistryError(
            "an alias needs a name", got=said("an artifact without one"), remedy="add it under a name first"
        )
    name, alias = artifact.names[-1].partition("@")[0], form.text("alias", 63)
    registry.set_alias(name, alias, artifact.digest, reason=form.text("reason", 400))


def _ask(registry: Registry, artifact: Artifact, form: Form) -> None:
    combination = combination_of(registry, artifact.digest)
    approval.request(registry, combination, in_force(registry), form.text("reason", 400))


def reason_and_key(studio: Studio, form: Form) -> tuple[str, SigningKey]:
    """Return the reason and the signing key that a decision's form names: a key of this machine.

    Raises:
        RequestError: no reason, or others reach this studio, whose keys are not on this machine.
        SignatureError: there is no such key, or its passphrase is wrong.
    """
    from qrlora.operations.provenance.keys import SigningKey

    if studio.keys:
        remedy = "copy the command that the page shows"
        raise RequestError("decisions are signed on the reviewer's own machine", status=403, remedy=remedy)
    reason = form.text("reason", 400)
    if not reason:
        raise RequestError("a decision needs a reason", expected="a sentence", got=said("none"))
    return reason, SigningKey.load(key_path(form.text("key", 60)), form.text("passphrase", 200) or None)


def _approve(registry: Registry, artifact: Artifact, form: Form, studio: Studio) -> None:
    """Sign the newest request about an artifact with a key of this machine, or reject it."""
    asked = _approval(registry, artifact)["asked"]
    if not asked:
        raise RequestError("nobody has asked for an approval", remedy="ask for it first")
    reason, key = reason_and_key(studio, form)
    if form.text("decision") == "reject":
        approval.reject(registry, asked[0].digest, key, reason)
    else:
        approval.approve(registry, asked[0].digest, key, in_force(registry))
        registry.audit("approval-reason", artifact.digest, {"reason": reason})


@router.get("/library/{digest}/export/{program}")
def export(request: Request, digest: str, program: str) -> Response:
    """Send an adapter or a composition as a file for another program."""
    studio, registry = studio_of(request), registry_for(request)
    artifact = registry.get(digest)
    if program not in PROGRAMS or artifact.kind not in APPROVABLE:
        raise RequestError(
            "no such export", status=404, got=said("%(kind)s for %(program)s", kind=artifact.kind, program=program[:40])
        )
    stem = artifact.title.partition("@")[0].replace("/", SLASH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{stem}-{program}{SUFFIX}")
        content = _exported(studio, registry, artifact, program, path)
    disposition = {"Content-Disposition": f'attachment; filename="{path.name}"'}
    return Response(content, media_type="application/octet-stream", headers=disposition)


def _exported(studio: Studio, registry: Registry, artifact: Artifact, program: str, path: Path) -> bytes:
    """Write and check an export as `qrlora export` does, if the policy permits it, and record it."""
    from qrlora.method.adapter import basis_of, load_adapter
    from qrlora.method.composition import Composition
    from qrlora.models.exchange import export_adapter, target_of
    from qrlora.models.families import load_pipeline
    from qrlora.operations.policy.check import check, enforce
    from qrlora.operations.registry.intake import add_export

    enforce(
        [check(in_force(registry), combination_of(registry, artifact.digest), "export", registry=registry)], registry
    )
    if artifact.kind == "composition":
        edges = _parts(registry, artifact)
        parts = [(load_adapter(registry.path(edge.target)), float(edge.weight or 0)) for edge in edges]
        adapter = Composition(parts, float(edges[0].null_space or 0)).adapter()
    else:
        adapter = load_adapter(registry.path(artifact))
    pipe, family = load_pipeline(studio.model.name)
    basis = basis_of(family.denoiser_of(pipe), adapter)
    made = export_adapter(adapter, path, target_of(program, family.name), pipe, family, basis=basis)
    add_export(registry, path, artifact, facts={"for": program, "layers": made.layers, "matched": made.matched})
    return path.read_bytes()


def _drawing(nodes: dict[str, Artifact], edges: list[Any], start: str) -> dict[str, Any]:
    """Lay out boxes and lines: sources left of what was made from them."""
    kept = {digest for digest in list(nodes)[:MOST_NODES] if nodes[digest].kind != "basis" or digest == start}
    turned = ((e.source, e.target) if e.relation in LATER else (e.target, e.source) for e in edges)
    lines = {line for line in turned if kept.issuperset(line)}
    depth = {digest: 0 for digest in kept}
    for _ in kept:
        for left, right in lines:
            depth[right] = max(depth[right], depth[left] + 1)
    lines = {(a, b) for a, b in lines if not any((a, c) in lines and (c, b) in lines for c in kept)}  # said by others

    def beside(one: str) -> tuple[str, str]:
        return min((nodes[b].title for a, b in lines if a == one), default=""), nodes[one].title

    rows: dict[str, float] = {}
    for column in range(max(depth.values()) + 1):
        _place(sorted((one for one in kept if depth[one] == column), key=beside), lines, rows)
    lowest = min(rows.values())
    step_x, step_y = BOX[0] + GAP_X, BOX[1] + GAP_Y
    places = {one: (1 + depth[one] * step_x, 1 + (row - lowest) * step_y) for one, row in rows.items()}
    boxes = [{"artifact": nodes[one], "x": x, "y": y, "here": one == start} for one, (x, y) in places.items()]
    ends = [(*places[left], *places[right]) for left, right in sorted(lines)]
    drawn = {"lines": [(x1 + BOX[0], y1 + BOX[1] / 2, x2, y2 + BOX[1] / 2) for x1, y1, x2, y2 in ends]}
    width = max(x for x, _ in places.values()) + BOX[0] + 1
    height = max(y for _, y in places.values()) + BOX[1] + 1
    return {**drawn, "boxes": boxes, "width": width, "height": height, "box": BOX, "more": len(nodes) - MOST_NODES}


def _place(members: list[str], lines: set[tuple[str, str]], rows: dict[str, float]) -> None:
    """Give the members of one column rows near the middle of what they were made from, one apart at least."""

    def middle(one: str) -> float:
        inputs = [rows[left] for left, right in lines if right == one and left in rows]
        return sum(inputs) / len(inputs) if inputs else 0.0

    free = -float("inf")
    for one in sorted(members, key=middle):
        rows[one] = max(middle(one), free)
        free = rows[one] + 1
