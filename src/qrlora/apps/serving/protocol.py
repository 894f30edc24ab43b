"""What front and engine say to each other: plain values, which travel between machines and need no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from qrlora.errors import QrloraError


class Settings(NamedTuple):
    """What the pictures of one batch have in common: denoising steps, guidance scale, side in pixels."""

    steps: int
    guidance: float
    side: int


@dataclass(frozen=True)
class Picture:
    """What makes one picture, besides its settings: prompt, seed, adapters' weights by name, and the share that these
    give up to one another."""

    prompt: str
    seed: int
    composition: Mapping[str, float]
    giving_way: float = 0.0


@dataclass(frozen=True)
class Step:
    """A denoising step of the batch is done."""

    done: int
    of: int


@dataclass(frozen=True)
class Made:
    """Picture `index` of the batch, as PNG."""

    index: int
    png: bytes


@dataclass(frozen=True)
class Refused:
    """Picture `index` of the batch cannot be made, which its request is to blame for."""

    index: int
    error: QrloraError


Event = Step | Made | Refused


@dataclass(frozen=True)
class Facts:
    """What an engine serves.

    Attributes:
        model: what requests call the base model.
        side, unit, largest_side: of its pictures in pixels: its own, what sides are multiples of, its limit if any.
        steps, guidance: where a request names none.
        adapters: name -> what is known of it (role, trigger, licence).
        left_out: file of the folder -> why it is not served.
    """

    model: str
    side: int
    unit: int
    largest_side: int | None
    steps: int
    guidance: float
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Engines(Protocol):
    """One engine, or many that look like one."""

    def run(self, settings: Settings, pictures: Sequence[Picture], progress: bool) -> AsyncIterator[Event]:
        """Make a batch; `Step`s only if `progress`. Closing the iterator, or cancelling who waits for it, ends it."""

    async def facts(self) -> Facts:
        """What is served now, with adapters that came or went since."""
