"""Hold what all pages share: registry, base model, shelf and training runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from cachetools import LRUCache
from starlette.requests import Request

from qrlora._files import make_folder
from qrlora.apps.serving.permission import Gate
from qrlora.apps.serving.protocol import Limits, Permission
from qrlora.apps.serving.service import Service
from qrlora.apps.studio.model import LazyEngine
from qrlora.apps.studio.runs import ADAPTER, Runs
from qrlora.apps.studio.shelf import StudioShelf
from qrlora.operations.registry import Registry

if TYPE_CHECKING:
    from qrlora.method.composition.interference import LayerInterference

PICTURES_KEPT, COMPOSITIONS_KEPT = 256, 64
DRAIN_SECONDS = 5
"""Seconds that open pages, which listen for events, may delay the end."""


Result = TypeVar("Result")


class Recent(Generic[Result]):
    """A cache of the results that were asked for last, by what they were made of. Safe to use from several threads."""

    def __init__(self, most: int):
        self._results: LRUCache[object, Result] = LRUCache(most)
        self._lock = threading.Lock()

    def get(self, key: object) -> Result | None:
        with self._lock:
            return self._results.get(key)

    def put(self, key: object, result: Result) -> None:
        with self._lock:
            self._results[key] = result


class Studio:
    """One studio: a registry, a base model and a folder of adapters beside the registry's, if any.

    Args:
        keys: of which people log in with one; none: whoever reaches it may use it.
    """

    def __init__(
        self,
        registry: Registry,
        model: str = "pico",
        dtype: str = "float32",
        threads: int | None = None,
        folder: Path | None = None,
        keys: Sequence[str] = (),
    ):
        self.registry, self.keys = registry, keys
        self.place = registry.folder / "studio"
        make_folder(self.place)
        self.shelf = StudioShelf(registry, self.place / "shelf", folder)
        self.model = LazyEngine(model, self.shelf.place, dtype, threads)
        self.service = Service(self.model, Limits(api_keys=keys, drain_seconds=DRAIN_SECONDS))
        self.recent: Recent[bytes] = Recent(PICTURES_KEPT)
        self.interference: Recent[LayerInterference] = Recent(COMPOSITIONS_KEPT)
        self.newest: dict[str, Request] = {}  # of every open page, its newest request for a preview
        self.runs = Runs(self.place / "runs", self._finished, registry.place)
        self._looking = threading.Lock()

    def start(self) -> None:
        """Load the model in the background, and go on with runs that wait."""
        self.shelf.sync()
        self.model.start(self._begin, self.look)
        self.runs.start()

    def _begin(self) -> None:
        from qrlora.apps.studio.records import add_starters  # imports torch, as loading the model does

        if self.model.name == "pico":
            add_starters(self.registry)
        self.service.gate = Gate(Permission(None, None, False, self.model.name), self.registry)
        self.look()

    def close(self) -> None:
        self.runs.close()
        self.model.close()

    def look(self) -> None:
        """Look for new adapters in registry and folder; blocks."""
        with self._looking:
            self.shelf.sync()
            if self.model.ready:
                engine = self.model.engine
                engine.shelf.scan()
                self.shelf.described(*engine.shelf.snapshot())

    def registry_of(self, person: str) -> Registry:
        """Return the registry with this person as the actor."""
        return Registry(self.registry.engine, self.registry.store, self.registry.folder, person)

    def _finished(self, folder: Path, person: str) -> str:
        """Put a training run's adapter, with its pictures, into the registry; returns its reference. What a pilot's
        stage made is there already."""
        from qrlora.apps.studio.records import add_trained

        reference = add_trained(self.registry_of(person), folder) if (folder / ADAPTER).is_file() else ""
        self.look()
        return reference


def studio_of(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


def person_of(request: Request) -> str:
    """Return the person who acts: the name given at the login, else the registry's actor."""
    return str(request.session.get("person") or studio_of(request).registry.actor)


def registry_for(request: Request) -> Registry:
    return studio_of(request).registry_of(person_of(request))
