"""Studios to test: with an engine that makes coloured squares in no time, in this process or behind a real port."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from qrlora.apps.pilots import open_pilot
from qrlora.apps.serving import engine as real
from qrlora.apps.serving.connections import Server
from qrlora.apps.serving.protocol import Event, Facts, Made, Refused, Settings
from qrlora.apps.studio.app import create_app
from qrlora.apps.studio.projects import project_file
from qrlora.apps.studio.runs import DONE, PILOTS, STUDY, WAITING
from qrlora.apps.studio.state import Studio
from qrlora.errors import MismatchError
from qrlora.method.adapter import load_adapter
from qrlora.models.request import Request
from qrlora.operations.pilot import project
from qrlora.operations.pilot.costs import Cost, Parameters
from qrlora.operations.pilot.line import OURS, Stage
from qrlora.operations.pilot.project import Done
from qrlora.operations.pilot.stages import Group, Result, Row
from qrlora.operations.provenance.canonical import known_digest
from qrlora.operations.provenance.keys import SigningKey
from qrlora.operations.registry import Registry
from qrlora.operations.registry.intake import add_report
from qrlora.operations.registry.signatures import trust_of
from qrlora.quality.images.read import load_picture
from qrlora.quality.metrics.shares import Share

SIDE, STEPS = 32, 6


class SquareShelf:
    """The adapters of a folder, as `Shelf` reads them."""

    def __init__(self, folder: Path):
        self.folder, self.adapters, self.digests = folder, dict[str, Any](), dict[str, str]()

    def scan(self) -> None:
        paths = {path.stem: path for path in sorted(self.folder.glob("*.safetensors"))}
        self.adapters = {name: self.adapters.get(name) or load_adapter(path) for name, path in paths.items()}
        self.digests = {name: known_digest(path) for name, path in paths.items()}

    def snapshot(self) -> tuple[dict[str, Any], dict[str, str]]:
        return self.adapters, self.digests


class SquareEngine:
    """Makes a square whose colour says what was asked for. Every batch is in `made`; a step takes `step_seconds`."""

    step_seconds = 0.0

    def __init__(self, model: str, folder: Path, dtype: str = "float32", threads: int | None = None):
        self.model, self.shelf = model, SquareShelf(Path(folder))
        self.made: list[tuple[Settings, list[Request]]] = []
        self.ended: list[Request] = []
        self.shelf.scan()

    def close(self) -> None:
        pass

    async def facts(self) -> Facts:
        self.shelf.scan()
        adapters: dict[str, dict[str, Any]] = {name: {} for name in self.shelf.adapters}
        return Facts(self.model, SIDE, 16, 128, STEPS, 2.0, adapters, digests=self.shelf.digests)

    async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
        self.made.append((settings, list(pictures)))
        for _ in range(settings.steps):
            await asyncio.sleep(self.step_seconds)
        for index, picture in enumerate(pictures):
            self.ended.append(picture)
            if unknown := set(picture.composition) - set(self.shelf.adapters):
                yield Refused(index, MismatchError(f"adapter {sorted(unknown)} is served no more"))
                continue
            yield Made(index, square(settings, picture))


def square(settings: Settings, picture: Request) -> bytes:
    """A PNG whose colour depends on everything that a picture depends on."""
    asked = [settings.steps, picture.prompt, picture.seed, sorted(picture.composition.items()), picture.null_space]
    digest = hashlib.sha256(json.dumps(asked).encode()).digest()
    stream = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), tuple(digest[:3])).save(stream, "PNG")
    return stream.getvalue()


def made_studio(place: Path, patch: pytest.MonkeyPatch, **options: Any) -> Studio:
    """A studio with squares for pictures, its model loaded and the starters in its registry; no training runs."""
    patch.setattr(real, "Engine", SquareEngine)
    studio = Studio(Registry.open(place / "registry", actor="ada"), **options)
    studio.shelf.sync()
    loading = threading.Thread(target=studio.model.load, args=(studio._begin, studio.look))
    loading.start()  # as the command does; Playwright has an event loop in this thread
    loading.join()
    assert studio.model.failed is None, studio.model.failed
    return studio


def trust(registry: Registry, folder: Path, *names: str) -> None:
    """Make a key for each, and trust them as reviewers."""
    people = trust_of(registry)
    for name in names:
        people.add(name, ["reviewer"], SigningKey.create(folder, name).public_pem)
    people.save(registry.folder / "trust.json")


def ran_stage(studio: Studio, name: str, person: str, stage: Stage = "one_picture") -> None:
    """Let a pilot's stage have run: its report in the registry, and squares for its pictures."""
    registry = studio.registry_of(person)
    pilot = open_pilot(project_file(studio.place, name), registry)
    folder = pilot.folder / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number in range(4):
        Image.new("RGB", (SIDE, SIDE), (20, 60 * number, 152)).save(folder / f"{number}.png")
        pictures.append(load_picture(folder / f"{number}.png"))
    groups = [Group("teapot", pictures, 0.75, Share(3, 4), ["house teal covers 1 % of it"])]
    costs, parameters = (
        (Cost(63.0, 0.001, 0.0003, 120_000), Cost(252.0, 0.004, 0.0012, 480_000)),
        Parameters(10, 20, 900),
    )
    rows = [Row("chalk", "subject", 0.8, 0.7, 0.1)]
    gate = getattr(pilot.line.gates, stage)
    result = Result(stage, groups, [], rows, {"chalk": 0.01}, None, 4, 0, 0, *costs, parameters, gate)
    result = replace(result, acceptance=pilot._acceptance(result))
    content = {"pilot": name, "inputs": pilot.inputs(stage), **result.to_dict()}
    report = add_report(registry, content, [], name=f"{name}/{stage.replace('_', '-')}")
    pilot.stages[stage] = Done(report.digest)
    pilot._write(result)
    pilot._save()


def work_off(studio: Studio, name: str, patch: pytest.MonkeyPatch) -> None:
    """Do what the worker would for what waits of a pilot."""

    def arms(work: Any) -> dict[str, Any]:
        made = [load_picture(work.folder / "pictures" / f"{number}.png") for number in range(4)]
        return {OURS: made, "words": [replace(one, pixels=255 - one.pixels) for one in made]}

    patch.setattr(project, "study_arms", arms)
    for run in [run for run in studio.runs.all(*PILOTS) if run.name == name]:
        if run.state == WAITING and run.kind == STUDY:
            pilot = open_pilot(project_file(studio.place, run.name), studio.registry_of(run.person))
            pilot.make_study(run.role)  # type: ignore[arg-type]
        elif run.state == WAITING:
            ran_stage(studio, run.name, run.person, run.role)  # type: ignore[arg-type]
        if run.state == WAITING:
            studio.runs._save(replace(run, state=DONE))


class Visitor(TestClient):
    """A browser without scripts, which sends what the pages' scripts would."""

    def __init__(self, app: Any, address: str = "http://localhost"):
        super().__init__(app, base_url=address, follow_redirects=False)

    def token(self) -> str:
        """The session's, from a page."""
        return self.get("/login").text.split('<meta name="csrf" content="')[1].split('"')[0]

    def submit(self, path: str, content: bytes | None = None, **fields: str) -> Any:
        """A form, or a file, as htmx or a script posts it."""
        headers = {"X-CSRF-Token": self.token(), "HX-Request": "true"}
        if content is not None:
            return self.post(path, content=content, headers=headers)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.post(path, data=fields, headers=headers | form)


@contextlib.contextmanager
def visiting(studio: Studio, **options: Any) -> Iterator[Visitor]:
    with Visitor(create_app(studio, **options)) as visitor:
        yield visitor


@contextlib.contextmanager
def serving(studio: Studio) -> Iterator[str]:
    """The studio behind a port of this machine; yields its address."""
    server = Server(studio.service, "127.0.0.1", 0, app=create_app(studio))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
