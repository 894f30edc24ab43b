"""Train in the browser: take pictures in, queue a run, and show it while it runs."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from PIL import Image

from qrlora._files import make_folder
from qrlora._said import said, unpacked
from qrlora.apps.studio.forms import Form, fields, number, renamed, upload
from qrlora.apps.studio.pages import N_, error_page, in_words, page
from qrlora.apps.studio.runs import ADAPTER, PILOTS, TRAINING, Run, events
from qrlora.apps.studio.state import Studio, person_of, registry_for, studio_of
from qrlora.errors import QrloraError, RequestError
from qrlora.models.training.pictures import OpenPicture, open_picture
from qrlora.models.training.recipe import TRIGGERS
from qrlora.operations.registry.references import check_name

router = APIRouter()
PRESETS = {
    "quick": (N_("Quick"), N_("a first look"), 80),
    "balanced": (N_("Balanced"), N_("what most need"), 200),
    "thorough": (N_("Thorough"), N_("for what is hard to get"), 500),
}
"""Name and purpose of each, and its optimiser steps on pico."""
PICO = {"batch_size": 4, "learning_rate": 5e-3, "logit_mean": 0.5, "logit_std": 1.5, "rank": 16}
"""Fields of recipes/pico-subject.toml, with smaller batches: two cores are shared with the previews."""
OTHERS = {"batch_size": 1, "accumulation": 4, "learning_rate": 1e-4, "rank": 64, "dtype": "bfloat16"}
"""Fields published for FLUX.1 (docs/families.md); a recipe file decides more."""
LONGER = 5
"""Factor from pico's steps to those of other models."""
SHEETS = 8
LONGEST_EDGE = 1024
"""Pixels of the picture that the page shows of an upload."""
MOST_PICTURES = 50
SPACE, SPACE_STEPS = "space:", 24
"""A preset that begins so trains a point of this space of the registry, in so many steps (docs/space.md)."""
KEPT_SECONDS = 24 * 3600
POLL_SECONDS = 0.4


@router.get("/train")
def train(request: Request) -> Response:
    studio = studio_of(request)
    runs, spaces = studio.runs, studio.registry.search(kind="space")
    known = {"presets": PRESETS, "triggers": TRIGGERS, "spaces": [one for one in spaces if one.stored and one.names]}
    return page(request, "train.html", runs=runs.all(TRAINING), ahead=runs.ahead_of, **known)  # type: ignore[arg-type]


@router.get("/train/runs")
def runs(request: Request) -> Response:
    """Show the list of runs alone."""
    queue = studio_of(request).runs
    return page(request, "part_runs.html", runs=queue.all(TRAINING), ahead=queue.ahead_of)


@router.post("/train/pictures")
async def add_upload(request: Request, name: str = "picture") -> Response:
    """Take a picture in: the body is the file. The answer is its card, or why it cannot be used."""
    place = studio_of(request).place / "uploads"
    make_folder(place)
    _tidy(place)
    token = secrets.token_hex(12)
    path = place / token
    try:
        await upload(request, path)
        picture = await run_in_threadpool(open_picture, path)
    except QrloraError as error:
        path.unlink(missing_ok=True)
        return error_page(request, renamed(error, path, name[:100]))
    await run_in_threadpool(_save_shown, picture, path)
    facts = _read_facts(picture)
    return page(request, "part_picture.html", token=token, name=name[:100], picture=picture.image, read=facts)


def _save_shown(picture: OpenPicture, path: Path) -> None:
    """Save the picture as the page shows it: upright, in sRGB, on white."""
    shown = picture.image.copy()
    shown.thumbnail((LONGEST_EDGE, LONGEST_EDGE))
    shown.save(path.with_suffix(".png"))


def _read_facts(picture: OpenPicture) -> dict[str, Any]:
    """Return facts of a picture for the page: transparency, small size, and a record of how it was made."""
    transparent = picture.alpha is not None and picture.alpha.getextrema()[0] < 255  # type: ignore[operator]
    return {"transparent": transparent, "small": min(picture.image.size) < 128, "record": bool(picture.record)}


def _tidy(place: Path) -> None:
    """Remove uploads that no run used."""
    for path in place.iterdir():
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


def _uploaded(studio: Studio, token: str) -> Path:
    path = studio.place / "uploads" / token
    if not re.fullmatch("[0-9a-f]{24}", token) or not path.is_file():
        raise RequestError("this picture is no longer here", status=404, remedy="drop it on the page again")
    return path


@router.get("/train/pictures/{token}.png")
def show_upload(request: Request, token: str) -> Response:
    return FileResponse(_uploaded(studio_of(request), token).with_suffix(".png"), media_type="image/png")


@router.post("/train/pictures/{token}/mask")
async def add_mask(request: Request, token: str) -> Response:
    """Save a mask that was painted over a picture: a PNG, white where it is to be learned."""
    path = _uploaded(studio_of(request), token).with_suffix(".mask")
    path.unlink(missing_ok=True)
    await upload(request, path)
    await run_in_threadpool(open_picture, path)
    return Response(status_code=204)


@router.post("/train")
async def begin(request: Request) -> Response:
    """Queue a run."""
    form, studio = await fields(request), studio_of(request)
    try:
        run = await run_in_threadpool(_queue, studio, form, person_of(request))
    except QrloraError as error:
        return error_page(request, error)
    return Response(status_code=204, headers={"HX-Redirect": f"/train/{run.id}"})


def _queue(studio: Studio, form: Form, person: str) -> Run:
    tokens = form.all("picture")
    if not 0 < len(tokens) <= MOST_PICTURES:
        expected = said("1 to %(most_pictures)s pictures", most_pictures=MOST_PICTURES)
        raise RequestError(
            "no pictures to train on", expected=expected, got=len(tokens), remedy="drop some on the page"
        )
    name = check_name(form.text("name", 60).lower().replace(" ", "-"))
    crops = [_crop(form.text(f"crop-{token}")) for token in tokens]
    uploads = [_uploaded(studio, token) for token in tokens]
    folder = studio.runs.new_folder()
    try:
        for index, (path, crop) in enumerate(zip(uploads, crops, strict=True)):
            _save_cropped(path, crop, folder / "pictures" / f"{index:02d}.png")
        recipe = _recipe(studio, form, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return studio.runs.add(folder, person, name, recipe)


def _crop(text: str) -> tuple[float, float, float]:
    """Parse left, top and side of a square, as shares of the picture's width, height and shorter side."""
    parts = text.split(",") if text else ["0.5", "0.5", "1"]
    if len(parts) != 3:
        raise RequestError("no such crop", expected="x,y,side", got=text[:40])
    x, y, side = (number(said("Crop"), part, 0, 1) for part in parts)
    return x, y, max(side, 0.05)


def _save_cropped(path: Path, crop: tuple[float, float, float], target: Path) -> None:
    """Save the chosen square of a picture, and of its mask if there is one."""
    opened = open_picture(path)
    image = opened.image
    side = round(crop[2] * min(image.size))
    left, top = (round(share * (whole - side)) for share, whole in zip(crop, image.size, strict=False))
    box = (left, top, left + side, top + side)
    image.crop(box).save(target)
    mask = None
    if path.with_suffix(".mask").is_file():
        mask = open_picture(path.with_suffix(".mask")).image.convert("L").resize(image.size, Image.Resampling.BILINEAR)
    elif opened.alpha is not None and opened.alpha.getextrema()[0] < 255:  # type: ignore[operator]
        mask = opened.alpha
    if mask is not None:
        mask.crop(box).save(target.with_name(f"{target.stem}.mask.png"))


def _recipe(studio: Studio, form: Form, folder: Path) -> dict[str, Any]:
    """Return the recipe's fields, checked."""
    from qrlora.models.training.recipe import Recipe, default_caption

    role, preset = form.text("role"), form.text("preset", 100)
    given: dict[str, Any] = {"model": studio.model.name, "role": role, "images": str(folder / "pictures")}
    given |= _of_space(studio, preset, folder) if preset.startswith(SPACE) else _of_preset(studio, preset)
    given |= {"sample_seeds": 1, "log_with": "none"}
    given |= {"trigger": form.text("trigger", 60) or TRIGGERS.get(role, ""), "noun": form.text("noun", 60)}
    given |= {"licence": form.text("licence", 200), "output": str(folder / ADAPTER)}
    if role in TRIGGERS:
        given["caption"] = form.text("caption", 400) or default_caption(role, given["noun"])
    return Recipe.of(given).model_dump(mode="json")


def _of_preset(studio: Studio, name: str) -> dict[str, Any]:
    pico = studio.model.name == "pico"
    steps = PRESETS.get(name, PRESETS["balanced"])[2] * (1 if pico else LONGER)
    every = max(1, steps // SHEETS)
    paced = {"steps": steps, "cooldown_steps": steps // 2, "checkpoint_every": every, "sample_every": every}
    return (PICO if pico else OTHERS) | paced


def _of_space(studio: Studio, name: str, folder: Path) -> dict[str, Any]:
    """Train the coefficients of a space alone: rank and columns are its own."""
    artifact = studio.registry.get(name.removeprefix(SPACE))
    path = folder / f"{artifact.title.partition('@')[0].replace('/', '-')}.space.safetensors"
    shutil.copyfile(studio.registry.path(artifact), path)
    like = {key: artifact.facts[key] for key in ("rank", "alpha", "columns", "basis_rank")}
    paced = {"steps": SPACE_STEPS, "batch_size": PICO["batch_size"], "sample_every": SPACE_STEPS // 4}
    return {**like, **paced, "space": str(path)}


# One run


@router.get("/train/{name}")
def show(request: Request, name: str) -> Response:
    runs = studio_of(request).runs
    run, folder = runs.get(name), runs.folder(name)
    if run.kind in PILOTS:
        return RedirectResponse(f"/pilot/{run.name}", 303)
    recipe = json.loads((folder / "recipe.json").read_text())
    pictures = [path.name for path in sorted((folder / "pictures").glob("*.png")) if ".mask." not in path.name]
    return page(request, "run.html", run=run, recipe=recipe, pictures=pictures, ahead=runs.ahead_of(run))


@router.get("/train/{name}/pictures/{file}")
def picture(request: Request, name: str, file: str) -> Response:
    folder = studio_of(request).runs.folder(name) / "pictures"
    if not re.fullmatch(r"[0-9]{2}(\.mask)?\.png", file) or not (folder / file).is_file():
        raise RequestError("no such picture", status=404, got=file[:40])
    return FileResponse(folder / file)


@router.get("/train/{name}/steps/{step}.png")
def sample(request: Request, name: str, step: int) -> Response:
    path = studio_of(request).runs.folder(name) / "steps" / f"step-{step:06d}.png"
    if not path.is_file():
        raise RequestError("no picture of this step", status=404, got=step)
    return FileResponse(path, headers={"Cache-Control": "private, max-age=3600"})


@router.get("/train/{name}/events")
async def follow(request: Request, name: str) -> Response:
    """Send the events of a run so far, and then new ones, as server-sent events."""
    runs = studio_of(request).runs
    folder = runs.folder(name)

    async def told() -> AsyncIterator[bytes]:
        sent, state = 0, None
        while not await request.is_disconnected():
            run, found = await run_in_threadpool(runs.get, name), await run_in_threadpool(events, folder)
            if len(found) > sent or run.state != state:
                run = replace(run, error=in_words(request, unpacked(run.error)))
                yield _told(run, found[sent:], runs.ahead_of(run))
                sent, state = len(found), run.state
            else:
                yield KEEPALIVE_COMMENT
            if run.over:
                return
            await asyncio.sleep(POLL_SECONDS)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventSourceResponse(told(), headers=headers)


def _told(run: Run, new: Sequence[Mapping[str, Any]], ahead: int) -> bytes:
    steps = [one for one in new if "step" in one]
    content = {
        "run": asdict(run),
        "ahead": ahead,
        "points": [[one["step"], one["loss"]] for one in steps],
        "left": steps[-1]["left"] if steps else None,
        "samples": [one["sample"] for one in new if "sample" in one],
        "notes": [one["note"] for one in new if "note" in one],
        "work": next((one for one in reversed(new) if "work" in one), None),
    }
    return format_sse_event(event="run", data_str=json.dumps(content))


@router.post("/train/{name}/{action}")
async def act(request: Request, name: str, action: str) -> Response:
    """Stop, resume or forget a run, or keep the adapter of one of its steps."""
    studio, form = studio_of(request), await fields(request)
    try:
        if action in ("stop", "resume", "forget"):
            await run_in_threadpool(getattr(studio.runs, action), name)
            target = "/train" if action == "forget" else f"/train/{name}"
            return Response(status_code=204, headers={"HX-Redirect": target})
        if action != "take" or studio.runs.get(name).kind in PILOTS:
            raise RequestError("no such action", status=404, got=action[:40])
        from qrlora.apps.studio.records import add_trained

        step = int(form.number("step", 1, 10**9, 1))
        reference = await run_in_threadpool(add_trained, registry_for(request), studio.runs.folder(name), step)
        await run_in_threadpool(studio.runs.took, name, step, reference)
        await run_in_threadpool(studio.look)
    except QrloraError as error:
        return error_page(request, error)
    return page(request, "part_taken.html", reference=reference, step=step, run=studio.runs.get(name))
