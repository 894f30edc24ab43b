"""Run the server in this process alone: the application in uvicorn's event loop, one engine in a thread beside it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

from qrlora.apps.serving.connections import Server
from qrlora.apps.serving.engine import Engine
from qrlora.apps.serving.protocol import Facts, Finish, Limits
from qrlora.apps.serving.service import Service


def run(
    model: str,
    folder: Path,
    dtype: str,
    threads: int | None,
    host: str,
    port: int,
    limits: Limits,
    ready: Callable[[Facts], None],
    finish: Finish | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then take no more connections, and let requests come to an end.

    Args:
        ready: called once requests are answered.
        finish: as `Dispatcher`.

    Raises:
        ModelError: as `load_pipeline`.
        QrloraError: this process may open too few files.
    """
    engine = Engine(model, folder, dtype, threads)
    facts = asyncio.run(engine.facts())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises again, when it has ended, what it was told to end by
    try:
        Server(Service(engine, limits, finish), host, port, lambda: ready(facts)).run()
    finally:
        engine.close()
