"""Keep the application's state between requests: queue, limits, served adapters, and pictures to be fetched."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from cachetools import TTLCache

from qrlora.apps.serving.dispatch import Dispatcher, Job
from qrlora.apps.serving.metrics import Metrics
from qrlora.apps.serving.names import composition_of
from qrlora.apps.serving.protocol import Engines, Facts, Finish, Limits, Settings
from qrlora.apps.serving.request import ImageRequest, out_of_bounds, side_of
from qrlora.errors import RequestError
from qrlora.models.request import Request

if TYPE_CHECKING:
    from qrlora.apps.serving.permission import Gate


class Kept:
    """A cache of PNG files under random names, limited in age and total bytes."""

    def __init__(self, most_bytes: int, seconds: float):
        self._pictures: TTLCache[str, bytes] = TTLCache(most_bytes, seconds, lambda: time.monotonic(), len)

    def put(self, png: bytes) -> str:
        """Store a PNG file and return its name. The least recently used ones are dropped to make room for it; one that
        is larger than the limit is not stored."""
        name = secrets.token_urlsafe(24)
        if len(png) <= self._pictures.maxsize:
            self._pictures[name] = png
        return name

    def get(self, name: str) -> bytes | None:
        """Return the PNG file, or None if it has been dropped."""
        with contextlib.suppress(KeyError):  # `get` reads the clock twice, and fails if the picture expires in between
            return self._pictures[name]
        return None


class Service:
    """The queue in front of the engines, and what the server knows of them."""

    def __init__(self, engines: Engines, limits: Limits, finish: Finish | None = None):
        self.engines, self.limits, self.metrics = engines, limits, Metrics()
        self.dispatcher = Dispatcher(
            engines,
            self.metrics,
            at_once=limits.at_once,
            batch_size=limits.batch_size,
            queue_length=limits.queue_length,
            finish=finish,
        )
        self.kept = Kept(limits.kept_bytes, limits.kept_seconds)
        self.gate = _gate(limits)
        self._facts: Facts | None = None
        self._looking: asyncio.Task[Facts] | None = None

    async def facts(self) -> Facts:
        """Return the served models and adapters, as last reported."""
        return self._facts or await self.look_again()

    async def look_again(self, seconds: float | None = None) -> Facts:
        """Ask the engines for the served adapters; return the last report if they do not answer in time."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self.engines.facts())
        looking = self._looking  # others may look again before this goes on
        await asyncio.wait({looking}, timeout=seconds if self._facts else None)
        if looking.done() or self._facts is None:
            self._facts = looking.result()
        return self._facts

    async def drain(self) -> None:
        """Finish the requests that were begun, and refuse new ones."""
        await self.dispatcher.drain(self.limits.drain_seconds)

    async def composition(self, model: str | None, field: object) -> dict[str, float]:
        """Return `composition_of` a request; the adapters' folder is read again before a name is called unknown."""
        facts = await self.facts()
        try:
            return composition_of(model, field, facts.model, facts.adapters)
        except RequestError as error:
            if error.status != 404:
                raise
        facts = await self.look_again()
        return composition_of(model, field, facts.model, facts.adapters)

    async def submit(self, wanted: ImageRequest) -> Job:
        """Queue a request. Raises RequestError for values out of bounds and unknown adapters."""
        self.dispatcher.refuse_if_draining()
        limits, facts = self.limits, await self.facts()
        if len(wanted.prompt) > limits.prompt_characters:
            raise out_of_bounds("prompt", f"at most {limits.prompt_characters} characters", len(wanted.prompt))
        count, steps = wanted.n or 1, wanted.steps or facts.steps
        if count > (most := min(limits.pictures, limits.queue_length)):
            raise out_of_bounds("n", f"from 1 to {most}", count)
        if steps > max(limits.steps, facts.steps):
            raise out_of_bounds("steps", f"from 1 to {max(limits.steps, facts.steps)}", steps)
        side = side_of(wanted.size, facts, limits.side)
        composition = await self.composition(wanted.model, wanted.composition)
        guidance = facts.guidance if wanted.guidance is None else wanted.guidance
        seed = secrets.randbelow(2**32) if wanted.seed is None else wanted.seed
        strength = limits.null_space if wanted.null_space is None else wanted.null_space
        strength, digests = await self.permitted(wanted.prompt, composition, strength)
        pictures = [Request(wanted.prompt, (seed + i) % 2**63, composition, strength, digests) for i in range(count)]
        return self.dispatcher.submit(Settings(steps, guidance, side), pictures, progress=bool(wanted.stream))

    async def permitted(
        self, prompt: str, composition: Mapping[str, float], strength: float | None, action: str = "serve"
    ) -> tuple[float | None, dict[str, str] | None]:
        """Return the permitted strength and the files' digests (None without rules). Raises RequestError (403)."""
        if self.gate is None:
            return strength, None
        facts = await self.look_again(seconds=1)  # a file may have been replaced
        composition_of(None, composition, facts.model, facts.adapters)  # or removed
        with self.metrics.permission_seconds.time():
            permit = partial(self.gate.permit, prompt, composition, strength, facts, action)
            return await asyncio.get_running_loop().run_in_executor(None, permit)


def _gate(limits: Limits) -> Gate | None:
    """Return the gate where permission is asked for; nothing of the registry is imported elsewhere."""
    if limits.permission is None:
        return None
    from qrlora.apps.serving.permission import Gate

    return Gate(limits.permission)
