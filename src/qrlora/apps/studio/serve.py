"""Run the studio in this process: its application in uvicorn's event loop, the base model and training beside it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from qrlora.apps.serving.connections import Server
from qrlora.apps.studio.app import create_app
from qrlora.apps.studio.guard import LOCAL
from qrlora.apps.studio.state import Studio
from qrlora.operations.registry import Registry


def serve(options: SimpleNamespace, keys: Sequence[str], ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM. options: of the command; ready: called once pages are answered.

    Raises:
        RegistryError: the registry cannot be opened.
    """
    studio = Studio(
        Registry.open(options.registry), options.model, options.dtype, options.threads, options.adapters, keys
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises again, when it has ended, what it was told to end by

    def begin() -> None:
        ready()
        studio.start()

    app = create_app(studio, local=options.host in LOCAL)
    try:
        Server(studio.service, options.host, options.port, begin, app).run()
    finally:
        studio.close()
