"""Trace a picture to its origin: its C2PA manifest, its text, the registered bytes, and similar pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select

from qrlora.errors import DataError
from qrlora.models.training.pictures import open_picture
from qrlora.operations.provenance.c2pa import Found, read
from qrlora.operations.provenance.canonical import digest_of
from qrlora.operations.provenance.perceptual import ALIKE, distance, phash
from qrlora.operations.registry.database import reading
from qrlora.operations.registry.records import Artifact
from qrlora.operations.registry.registry import Registry
from qrlora.operations.registry.schema import ArtifactRow

MOST_SHOWN = 5


@dataclass(frozen=True)
class Origins:
    """The findings about a picture, from the strongest to the weakest.

    Attributes:
        manifest: signed, if it holds.
        exact: the registered artifact with these very bytes.
        near: registered pictures that look like it, with the bits of 64 that differ; a hint, never a proof.
        text: what stands in its PNG text; anybody can write that.
    """

    digest: str
    manifest: Found
    exact: Artifact | None = None
    near: tuple[tuple[Artifact, int], ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)


def who_made(
    picture: bytes, registry: Registry | None, roots: Iterable[str] = (), *, sidecar: bytes | None = None
) -> Origins:
    """Return what is known of a picture.

    Args:
        roots: PEM of the certificates that are trusted.
        sidecar: manifest that lies beside it.

    Raises:
        DataError: it cannot be read as a picture, and no manifest says anything of it.
        SignatureError: it is no PNG, JPEG or WebP.
    """
    manifest, digest = read(picture, roots, manifest=sidecar), digest_of(picture)
    try:
        opened = open_picture(Path("the picture"), picture)
    except DataError:
        if manifest.state in ("absent", "invalid"):
            raise
        return Origins(digest, manifest)  # damaged, and its manifest says since when
    hashed, text = phash(opened.image), _text(opened.record)
    if registry is None:
        return Origins(digest, manifest, text=text)
    exact, near = _registered(registry, digest, hashed)
    return Origins(digest, manifest, exact, near, text)


def _text(record: str) -> dict[str, Any]:
    try:
        found = json.loads(record or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _registered(
    registry: Registry, digest: str, hashed: str
) -> tuple[Artifact | None, tuple[tuple[Artifact, int], ...]]:
    """Return the artifact with these bytes, and the nearest pictures; every registered hash is compared."""
    wanted = select(ArtifactRow.digest, ArtifactRow.facts).where(ArtifactRow.kind.in_(("generated", "picture")))
    found, exact = [], False
    with reading(registry.engine) as session:
        for one, facts in session.execute(wanted):
            exact |= one == digest
            if one != digest and "phash" in facts and (bits := distance(hashed, str(facts["phash"]))) <= ALIKE:
                found.append((bits, one))
    near = tuple((registry.get(one), bits) for bits, one in sorted(found)[:MOST_SHOWN])
    return registry.get(digest) if exact else None, near
