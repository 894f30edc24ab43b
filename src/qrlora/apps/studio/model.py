"""Load the studio's base model in the background, and report until it is ready."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora._said import said
from qrlora.apps.serving.protocol import Event, Facts, Settings
from qrlora.errors import QrloraError, RequestError
from qrlora.models.request import Request

if TYPE_CHECKING:
    from qrlora.apps.serving.engine import Engine

log = logging.getLogger(__name__)
Work = Callable[[], None]


def _nothing() -> None:
    """Do nothing."""


class LazyEngine:
    """An `Engine` that is made in a thread of its own, as `Engines` sees it.

    Attributes:
        failed: why it cannot be loaded, if so.
    """

    def __init__(self, model: str, folder: Path, dtype: str = "float32", threads: int | None = None):
        self.name = model
        self._arguments: tuple[Any, ...] = (model, folder, dtype, threads)
        self._engine: Engine | None = None
        self.failed: QrloraError | None = None

    @property
    def ready(self) -> bool:
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The loaded engine. RequestError (503) until it is loaded."""
        if self.failed:
            raise RequestError(
                "the base model cannot be loaded", status=503, got=self.failed.what, remedy=self.failed.remedy
            )
        if self._engine is None:
            remedy = "wait a moment: the page becomes live by itself"
            raise RequestError("the base model is still being loaded", status=503, retry_after=1, remedy=remedy)
        return self._engine

    def load(self, first: Work = _nothing, then: Work = _nothing) -> None:
        """Load it in this thread, and make one picture, so that the first request is as fast as later ones.

        first, then: called before, when what they need is imported, and when it is ready.
        """
        try:
            from qrlora.apps.serving.engine import Engine

            first()
            engine = Engine(*self._arguments)
            asyncio.run(_warm(engine))
            self._engine = engine
            then()
        except QrloraError as error:
            self.failed = error
        except Exception as error:  # whatever it is, the page has to say it
            log.exception("the base model cannot be loaded")
            self.failed = QrloraError(
                said("%(error)s while loading %(model)s", error=type(error).__name__, model=self.name), got=error
            )

    def start(self, first: Work = _nothing, then: Work = _nothing) -> None:
        """Load it in a thread of its own."""
        threading.Thread(target=self.load, args=(first, then), name="load the model", daemon=True).start()

    def close(self) -> None:
        if self._engine:
            self._engine.close()

    async def facts(self) -> Facts:
        """Return the served adapters, as `Engines.facts` does."""
        return await self.engine.facts()

    async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
        """Make a batch, as `Engines.run` does."""
        async for event in self.engine.run(settings, pictures, progress):
            yield event


async def _warm(engine: Engine) -> None:
    facts = await engine.facts()
    settings = Settings(1, facts.guidance, facts.side)
    async for _ in engine.run(settings, [Request("a picture", 0, {})], False):
        pass
