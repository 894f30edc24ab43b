"""Queue pictures, and send them to the engines in batches of different compositions."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace

from qrlora._said import said
from qrlora.apps.serving.metrics import Metrics
from qrlora.apps.serving.protocol import Engines, Finish, Made, Refused, Settings, Step
from qrlora.errors import RequestError
from qrlora.models.request import Request

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """The pictures of one request, and the events that it has not been sent yet."""

    settings: Settings
    pictures: Sequence[Request]
    progress: bool
    events: asyncio.Queue[tuple[int, Step | Made | RequestError]] = field(default_factory=asyncio.Queue)
    withdrawn: bool = False
    ended: bool = False

    async def follow(self) -> AsyncIterator[tuple[int, Step | Made]]:
        """Yield steps (if `progress`) and pictures as they are made, each with the picture's index in the request.

        Raises:
            RequestError: a picture cannot be made.
        """
        missing = len(self.pictures)
        while missing:
            index, event = await self.events.get()
            missing -= isinstance(event, Made)
            self.ended = not missing or isinstance(event, RequestError)
            if isinstance(event, RequestError):
                raise event
            yield index, event


Place = tuple[Job, int]
"""One picture of a request."""


class Dispatcher:
    """The queue, and the tasks that empty it. Everything here happens in one event loop.

    A batch holds waiting pictures with the settings of the one that has waited longest. Engines that are free at the
    same time divide them.

    Args:
        engines: make the pictures.
        at_once: batches that they make at the same time, the number of engines.
        batch_size: most pictures of a batch.
        queue_length: most pictures that may wait.
        linger: seconds that a batch which is not full waits for others to join.
        finish: called in another thread with every picture; returns the PNG bytes to send. If it raises, the picture is
            not sent.
    """

    def __init__(
        self,
        engines: Engines,
        metrics: Metrics,
        *,
        at_once: int = 1,
        batch_size: int = 8,
        queue_length: int = 256,
        linger: float = 0.01,
        finish: Finish | None = None,
    ):
        self.engines, self.metrics = engines, metrics
        self.at_once, self.batch_size, self.queue_length, self.linger = at_once, batch_size, queue_length, linger
        self.finish = finish
        self.draining = False
        self._waiting: deque[Place] = deque()
        self._running: dict[asyncio.Task[None], dict[int, Place]] = {}
        self._arrived = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._pace = 0.0  # seconds that a picture took of late, all engines taken together
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.running.set_function(lambda: sum(map(len, self._running.values())))

    def submit(self, settings: Settings, pictures: Sequence[Request], progress: bool = False) -> Job:
        """Queue the pictures of a request.

        Raises:
            RequestError: 429 if there is no room for all of them, 503 when shutting down.
        """
        self.refuse_if_draining()
        if len(self._waiting) + len(pictures) > self.queue_length:
            seconds = max(1, math.ceil(self._pace * len(self._waiting)))
            raise RequestError(
                "too many pictures are waiting",
                status=429,
                code="rate_limit_exceeded",
                retry_after=seconds,
                expected=said(
                    "room for %(count)s more in a queue of %(queue_length)s",
                    count=len(pictures),
                    queue_length=self.queue_length,
                ),
                got=said("%(count)s waiting", count=len(self._waiting)),
                remedy=said("try again in %(seconds)s s", seconds=seconds),
            )
        while len(self._workers) < self.at_once:
            self._workers.append(asyncio.create_task(self._work()))
        job = Job(settings, pictures, progress)
        self._waiting.extend((job, index) for index in range(len(pictures)))
        self._arrived.set()
        return job

    def withdraw(self, job: Job) -> None:
        """Forget a request: what waits is not made, and a batch that nobody else waits for ends at its next step."""
        job.withdrawn = True
        self._waiting = deque(place for place in self._waiting if place[0] is not job)
        for batch, owed in self._running.items():
            if owed and all(other.withdrawn for other, _ in owed.values()):  # one that owes nothing ends by itself
                batch.cancel()

    def refuse_if_draining(self) -> None:
        """Raise RequestError (503) when shutting down."""
        if self.draining:
            remedy = "try again later"
            raise RequestError(
                "the server is shutting down", status=503, code="shutting_down", retry_after=10, remedy=remedy
            )

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and finish those there are; end, with an error, those that take longer than this."""
        self.draining = True
        until = time.monotonic() + seconds
        while (self._waiting or self._running) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        batches = list(self._running)
        self._fail([*self._waiting, *(place for owed in self._running.values() for place in owed.values())], 503)
        self._waiting.clear()
        for task in [*self._workers, *batches]:
            task.cancel()
        await asyncio.gather(*self._workers, *batches, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            if len(self._waiting) < self.batch_size:
                await asyncio.sleep(self.linger)
            if places := self._take():
                owed = dict(enumerate(places))
                batch = asyncio.create_task(self._make(places, owed))
                self._running[batch] = owed
                await asyncio.wait({batch})
                del self._running[batch]

    def _take(self) -> list[Place]:
        """Take this engine's share of the waiting pictures that have the settings of the first."""
        if not self._waiting:
            return []
        settings = self._waiting[0][0].settings
        alike = [place for place in self._waiting if place[0].settings == settings]
        free = self.at_once - len(self._running)
        taken = alike[: min(self.batch_size, math.ceil(len(alike) / free))]
        self._waiting = deque(place for place in self._waiting if place not in taken)
        return taken

    async def _make(self, places: list[Place], owed: dict[int, Place]) -> None:
        """Sample the pictures of a batch; each is removed from `owed` once its request has been sent the outcome."""
        started = time.perf_counter()
        pictures = [job.pictures[index] for job, index in places]
        try:
            run = self.engines.run(places[0][0].settings, pictures, any(job.progress for job, _ in places))
            async for event in run:
                if isinstance(event, Step):
                    for job, index in places:
                        if job.progress:
                            job.events.put_nowait((index, event))
                else:
                    if isinstance(event, Made) and self.finish:
                        what = (pictures[event.index], places[0][0].settings, event.png)
                        png = await asyncio.get_running_loop().run_in_executor(None, self.finish, *what)
                        event = replace(event, png=png)
                    self.metrics.pictures.inc(isinstance(event, Made))
                    job, index = owed.pop(event.index)
                    told = _as_request_error(event) if isinstance(event, Refused) else event
                    job.events.put_nowait((index, told))
        except Exception:  # whatever it is: those who wait have to hear of it, and the next batch be made
            log.exception("a batch of %d pictures broke down", len(places))
        self._fail(owed.values(), 500)
        seconds = time.perf_counter() - started
        self._pace = seconds / len(places) / self.at_once
        self.metrics.batch_pictures.observe(len(places))
        self.metrics.batch_compositions.observe(len({tuple(sorted(p.composition.items())) for p in pictures}))
        self.metrics.batch_seconds.observe(seconds)

    def _fail(self, places: Iterable[Place], status: int) -> None:
        what = "the server is shutting down" if status == 503 else "the engine broke down while making this picture"
        for job, index in places:
            error = RequestError(what, status=status, code="server_error", remedy="try again")
            job.events.put_nowait((index, error))


def _as_request_error(refused: Refused) -> RequestError:
    error = refused.error
    return RequestError(error.what, code="invalid_value", expected=error.expected, got=error.got, remedy=error.remedy)
