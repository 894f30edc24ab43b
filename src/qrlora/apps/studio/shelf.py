"""Offer the adapters of the registry and of a folder, as files for the engine and as cards for the pages."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qrlora._files import make_folder
from qrlora._reading import visible
from qrlora.operations.registry import Artifact, Registry

SUFFIX = ".safetensors"
SLASH = "~"
"""Stands for / of a registry's name in a file's, where no registry's name has one."""


@dataclass(frozen=True)
class Card:
    """The facts of an adapter that a page shows.

    Attributes:
        key: what the engine calls it.
        title: what a person calls it.
        reference: registry:NAME@vN; empty for a file of the folder.
        picture: digest of a picture that it was trained on, if the registry has one.
    """

    key: str
    title: str
    role: str = ""
    trigger: str = ""
    licence: str = ""
    digest: str = ""
    reference: str = ""
    caption: str = ""
    picture: str = ""

    @property
    def version(self) -> str:
        return self.reference.rpartition("@")[2]

    @property
    def prompt(self) -> str:
        """A prompt that shows the adapter alone: that of its training."""
        return self.caption or (
            f"a mug in {self.trigger} style" if self.role == "style" else f"a photo of a {self.trigger}"
        )


class StudioShelf:
    """A folder of links to adapter files: the newest version of every name in the registry, and those of a folder."""

    def __init__(self, registry: Registry, place: Path, folder: Path | None):
        self.registry, self.place, self.folder = registry, place, folder
        self.cards: dict[str, Card] = {}
        self._files: dict[str, Path] = {}  # of every artifact, hashed once
        make_folder(place)

    def sync(self) -> None:
        """Look at the registry and the folder again."""
        cards: dict[str, Card] = {}
        wanted: dict[str, Path] = {}
        for artifact in reversed(self.registry.search(kind="adapter")):
            if not artifact.stored or not artifact.names:
                continue
            name, _, version = artifact.names[-1].partition("@")
            key = name.replace("/", SLASH)
            known = cards.get(key)
            if known and int(known.version[1:]) > int(version[1:]):
                continue
            known = self.cards.get(key)
            same = known and (known.digest, known.version) == (artifact.digest, version)
            cards[key] = known if known and same else _card(self.registry, artifact, key, name)
            if artifact.digest not in self._files:
                self._files[artifact.digest] = self.registry.store.path(artifact.digest).resolve()
            wanted[key] = self._files[artifact.digest]
        for path in visible(self.folder) if self.folder else []:
            if path.suffix == SUFFIX:
                key = path.stem if path.stem not in cards else f"{path.stem}{SLASH}file"
                wanted[key] = path.resolve()
                cards[key] = Card(key, path.stem)
        self._link(wanted)
        self.cards = dict(sorted(cards.items()))

    def card_of(self, digest: str) -> Card | None:
        """Return the card of a registered adapter, if it is the newest of its name."""
        return next((card for card in self.cards.values() if card.digest == digest), None)

    def _link(self, wanted: Mapping[str, Path]) -> None:
        for path in visible(self.place):
            if wanted.get(path.stem) != path.resolve():
                path.unlink()
        for key, source in wanted.items():
            link = self.place / f"{key}{SUFFIX}"
            if link.exists():
                continue
            try:
                link.symlink_to(source)
            except OSError:  # Windows lets few people make links
                shutil.copyfile(source, link)

    def described(self, adapters: Mapping[str, Any], digests: Mapping[str, str]) -> None:
        """Complete the cards by what the engine read: key -> `Adapter`, and the digest of its file."""
        for key, adapter in adapters.items():
            meta, card = adapter.metadata, self.cards.get(key, Card(key, key))
            caption = str(meta.recipe.get("caption", "")).replace("[trigger]", meta.trigger)
            self.cards[key] = replace(
                card,
                role=meta.role,
                trigger=meta.trigger,
                licence=card.licence or meta.licence,
                digest=digests[key],
                caption=caption or card.caption,
            )


def _card(registry: Registry, artifact: Artifact, key: str, name: str) -> Card:
    trained_on = [edge.target for edge in registry.edges(artifact.digest, relation="trained_on")]
    kinds = {digest: registry.get(digest).kind for digest in trained_on}
    facts = artifact.facts
    return Card(
        key,
        name,
        artifact.role or str(facts.get("role", "")),
        str(facts.get("trigger", "")),
        artifact.licence,
        artifact.digest,
        f"registry:{artifact.names[-1]}",
        picture=next((digest for digest, kind in kinds.items() if kind == "picture"), ""),
    )
