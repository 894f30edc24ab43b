"""Define the messages between HTTP front and engine: plain values that travel between machines and need no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from qrlora.errors import QrloraError
from qrlora.models.request import Request


class Settings(NamedTuple):
    """Settings that the pictures of one batch share: denoising steps, guidance scale, side in pixels."""

    steps: int
    guidance: float
    side: int


Finish = Callable[[Request, Settings, bytes], bytes]
"""Marks or records a picture before it is handed out, and returns its PNG."""


@dataclass(frozen=True)
class Step:
    """A finished denoising step of the batch."""

    done: int
    of: int


@dataclass(frozen=True)
class Made:
    """Picture `index` of the batch, as PNG."""

    index: int
    png: bytes


@dataclass(frozen=True)
class Refused:
    """Picture `index` of the batch cannot be made, by a fault of its request."""

    index: int
    error: QrloraError


Event = Step | Made | Refused


@dataclass(frozen=True)
class Facts:
    """Base model and adapters that an engine serves.

    Attributes:
        model: what requests call the base model.
        side, unit, largest_side: of its pictures in pixels: its own, what sides are multiples of, its limit if any.
        steps, guidance: where a request names none.
        adapters: name -> what is known of it (role, trigger, licence).
        left_out: file of the folder -> why it is not served.
        digests: name of an adapter -> `sha256:…` of its file.
    """

    model: str
    side: int
    unit: int
    largest_side: int | None
    steps: int
    guidance: float
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Engines(Protocol):
    """One engine, or several behind the same methods."""

    def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
        """Make a batch; `Step`s only if `progress`. Closing the iterator, or cancelling who waits for it, ends it."""

    async def facts(self) -> Facts:
        """Return the served adapters, including files added or removed since."""


@dataclass(frozen=True)
class Permission:
    """Rules for the composition of every request.

    Attributes:
        registry: folder or URL of the registry with the policy and the approvals; None if only a file has rules.
        policy: file of more rules.
        approval: serve only what is approved.
        model: the base model; its files are hashed when the server starts.
    """

    registry: str | None
    policy: Path | None
    approval: bool
    model: str


@dataclass(frozen=True)
class Limits:
    """Limits and keys of the HTTP front.

    Attributes:
        api_keys: every request under /v1 has to send one of them; if empty, no key is needed.
        connections: most that are open at the same time; fewer if the process may not open so many files.
        header_seconds: how long a request's header may take to come, and how long a client may read nothing.
        body_bytes, body_seconds: most of a request's body, and how long it may take to come.
        prompt_characters, pictures, steps: most of a request; pictures are never more than the queue holds.
        side: longest side of a picture in pixels; twice the model's own if None.
        at_once, batch_size, queue_length: as `Dispatcher`.
        null_space: strength of null-space projection where a request names none; None: `default_strength` of its
            adapters.
        kept_bytes, kept_seconds: how many pictures asked for as urls are kept, and for how long.
        drain_seconds: how long requests may take to end when shutting down.
        permission: rules for compositions; None permits all.
    """

    api_keys: Sequence[str] = ()
    connections: int = 1000
    header_seconds: float = 10
    body_bytes: int = 64 * 1024
    body_seconds: float = 30
    prompt_characters: int = 4000
    pictures: int = 10
    steps: int = 100
    side: int | None = None
    at_once: int = 1
    batch_size: int = 8
    queue_length: int = 256
    null_space: float | None = None
    kept_bytes: int = 256 * 2**20
    kept_seconds: float = 3600
    drain_seconds: float = 60
    permission: Permission | None = None
