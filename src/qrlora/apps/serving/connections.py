"""Cut off HTTP clients that send or read nothing, so that they never shut others out.

uvicorn has no time-out for a request's header and accepts connections until the process has no descriptor left; then
asyncio logs a traceback for every connection that it could not accept. So its HTTP/1.1 protocol gets a deadline here
wherever the client has to act, and its server a limit of connections that the open-files limit of the process allows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qrlora.apps.serving.answer import error_response
from qrlora.apps.serving.app import create_app
from qrlora.apps.serving.service import Service
from qrlora.errors import QrloraError, RequestError

log = logging.getLogger(__name__)

ACCEPTED_AT_ONCE = 8
"""Connections accepted in one turn of the event loop. One that makes room is closed three turns later."""
SPARE = 4 * ACCEPTED_AT_ONCE + 32
"""Descriptors left for connections accepted before others are closed, and for reading adapters."""
LEAST = 8
"""Connections below which the server does not start."""
WAITING_IN_KERNEL = 2048
"""Connections that the kernel holds until they are accepted."""


class Connection(H11Protocol):
    """One connection, whose client has `header_seconds` to send a request or to read an answer.

    When there are more than `most`, the one that has waited longest for its client to send the rest of a request is
    closed; if the server is busy with all of them, the new one is answered 503.
    """

    def __init__(self, most: int, header_seconds: float, **options: Any):
        super().__init__(**options)
        self._most, self._seconds = most, header_seconds
        self._deadline: asyncio.TimerHandle | None = None
        self._unsent = 0
        self.waiting_since = self.loop.time()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits_for_request(self) -> bool:
        """Return True if the client has to send the rest of a request, and no answer is under way."""
        return (not self._answering or self.cycle.more_body) and not self.transport.get_write_buffer_size()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline()
        if len(self.connections) > self._most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self._answering:  # the header is complete; the application itself limits the time of the body
            self._clear_deadline()

    def on_response_complete(self) -> None:
        self.waiting_since, self._unsent = self.loop.time(), 0
        self._set_deadline()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_deadline()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answering:
            self._clear_deadline()

    def _set_deadline(self) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(self._seconds, self._too_late)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent != self._unsent:  # a slow reader, but one that reads
            self._unsent = unsent
            self._set_deadline()
        else:
            self.transport.abort()

    def _make_room(self) -> None:
        there: list[Any] = [one for one in self.connections if not one.transport.is_closing()]
        waiting = [one for one in there if one is not self and one.waits_for_request]
        if len(there) <= self._most:
            return
        if waiting:
            min(waiting, key=lambda one: one.waiting_since).transport.abort()
            return
        log.warning("a connection was refused: all %d are being answered", self._most)
        self.transport.write(_full(self._most))
        self.transport.close()


def _full(most: int) -> bytes:
    error = RequestError(
        "too many connections",
        status=503,
        code="overloaded",
        retry_after=10,
        expected=f"at most {most}",
        remedy="try again in 10 s",
    )
    answer = error_response(error)
    head = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + head + b"connection: close\r\n\r\n" + bytes(answer.body)


def connections_for(wanted: int) -> int:
    """Return the connection limit: the number wanted, or what the process's limit of open files leaves room for.

    Raises:
        QrloraError: it leaves no room for any.
    """
    if sys.platform == "win32":
        return wanted
    import resource

    files, used = resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/dev/fd"))
    if files == resource.RLIM_INFINITY:
        return wanted
    if files - used - SPARE < LEAST:
        raise QrloraError(
            "this process may open too few files to serve",
            expected=f"{used + SPARE + LEAST} or more",
            got=files,
            remedy="raise the limit before the start: ulimit -n 1024",
        )
    return min(wanted, files - used - SPARE)


class OncePerSecond(logging.Filter):
    """Log filter that passes one record a second of each text, so that no client can fill a disk."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text, now = str(record.msg).partition("\n")[0], time.monotonic()
        if now - self._last.get(text, -1.0) < 1:
            return False
        self._last[text] = now
        if text.startswith("socket.accept()") and record.exc_info:
            record.msg, record.exc_info = f"{text}: {record.exc_info[1]}", None
        return True


class Server(uvicorn.Server):
    """The application of a service, listening on one port.

    Args:
        ready: called once requests are answered.
        app: the application in front of the service; `create_app` of it if None.
    """

    def __init__(
        self,
        service: Service,
        host: str,
        port: int,
        ready: Callable[[], None] = lambda: None,
        app: FastAPI | None = None,
    ):
        limits = service.limits
        protocol = partial(Connection, connections_for(limits.connections), limits.header_seconds)
        config = uvicorn.Config(
            app or create_app(service),
            host,
            port,
            loop="asyncio",
            http=protocol,  # type: ignore[arg-type]  # called like the class
            ws="none",
            log_level="warning",
            backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=int(limits.drain_seconds),
        )
        super().__init__(config)
        self._ready = ready
        for name in ("uvicorn.error", "asyncio", __name__):
            logger = logging.getLogger(name)
            if not any(isinstance(known, OncePerSecond) for known in logger.filters):
                logger.addFilter(OncePerSecond())

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                with listening.dup() as same:  # asyncio takes one number for what it accepts at once and what waits
                    same.listen(WAITING_IN_KERNEL)
        if self.started:
            self._ready()
