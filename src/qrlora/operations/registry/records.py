"""Define what the registry returns: artifacts, edges between them, moves of aliases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

KINDS = (
    *("base", "basis", "adapter", "space", "recipe", "picture", "composition", "brand", "report"),
    *("policy", "approval", "generated", "export", "signature"),
)
RELATIONS = (
    "trained_on",  # an adapter, on a picture, with a recipe
    "based_on",  # an adapter or basis, on a base model; an adapter, on a basis or space
    "composed_of",  # a composition, of adapters, with weight and null-space strength
    "measured_by",  # an adapter or composition, by a report
    "approved_by",  # a composition, by an approval
    "generated_by",  # a generated picture, by a composition, adapter or base model
    "exported_from",  # a file for another tool, from an adapter or composition
    "signed_by",  # anything, by a signature
    "governed_by",  # an approval or a report, by the policy that was in force
)


@dataclass(frozen=True)
class Edge:
    """`source` was made from, with or by `target`; both are digests."""

    source: str
    relation: str
    target: str
    weight: float | None = None
    null_space: float | None = None
    position: int = 0


@dataclass(frozen=True)
class Link:
    """An edge of an artifact that is about to be added: the relation and the digest it leads to."""

    relation: str
    target: str
    weight: float | None = None
    null_space: float | None = None


@dataclass(frozen=True)
class Addition:
    """An object that is about to be added.

    Attributes:
        source: a file, or its bytes.
        name: of which it becomes the newest version (unless it is that already).
        facts: what was read from it; JSON.
        links: edges from it to artifacts that are in the registry, or before it among those that are added.
        keep: False registers digest and facts without storing the bytes.
    """

    source: Path | bytes
    kind: str
    name: str | None = None
    filename: str | None = None
    role: str = ""
    owner: str = ""
    licence: str = ""
    facts: Mapping[str, Any] | None = None
    links: Sequence[Link] = ()
    tags: Iterable[str] = ()
    keep: bool = True


@dataclass(frozen=True)
class Artifact:
    """One immutable object.

    Attributes:
        digest: `sha256:…` of its bytes.
        stored: False where the registry holds its digest and facts alone.
        names: NAME@vN of every name it is a version of.
        aliases: NAME@alias of every alias that points at it.
        facts: what was read from it when it was added, by kind (docs/registry.md).
        deprecated: why it should no longer be used; empty if it may be.
    """

    digest: str
    kind: str
    size: int
    filename: str
    stored: bool
    role: str
    owner: str
    licence: str
    created_at: datetime
    created_by: str
    deprecated: str = ""
    names: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def title(self) -> str:
        """Return what a person calls it: its newest name, else its file name, else the start of its digest."""
        return (self.names[-1] if self.names else self.filename) or self.digest[:19]


@dataclass(frozen=True)
class Move:
    """One move of an alias; `digest` is empty where it was removed."""

    name: str
    alias: str
    digest: str
    at: datetime
    by: str
    reason: str
