"""The server in this process alone: the application in uvicorn's event loop, one engine in a thread beside it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from qrlora.serving.app import Limits, Service, create_app
from qrlora.serving.engine import Engine
from qrlora.serving.protocol import Facts


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def run(
    model: str,
    folder: Path,
    dtype: str,
    threads: int | None,
    host: str,
    port: int,
    limits: Limits,
    ready: Callable[[Facts], None],
) -> None:
    """Serve until SIGINT or SIGTERM; then take no more connections, and let requests come to an end.

    Args:
        ready: called once requests are answered.

    Raises:
        ModelError: as `load_pipeline`.
    """
    engine = Engine(model, folder, dtype, threads)
    facts = asyncio.run(engine.facts())
    config = uvicorn.Config(
        create_app(Service(engine, limits)),
        host,
        port,
        log_level="warning",
        ws="none",
        timeout_graceful_shutdown=int(limits.drain_seconds),
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises again, when it has ended, what it was told to end by
    try:
        _Server(config, lambda: ready(facts)).run()
    finally:
        engine.close()
