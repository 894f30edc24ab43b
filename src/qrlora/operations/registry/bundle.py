"""Write a part of a registry as one file, always the same bytes, and read such a file without trusting it.

The file is a tar of `manifest.json` (`Manifest`) and of `objects/<SHA-256>`, nothing else, in this order. A reader
hashes every object again, reads facts of adapters, spaces, recipes and pictures from their bytes, and takes over no
trust, no policy in force, and no alias of a name that it has. Approvals count as of their import.
"""

from __future__ import annotations

import graphlib
import io
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from qrlora._files import check_room, write_atomically
from qrlora._reading import parse_json
from qrlora.errors import RegistryError
from qrlora.operations.provenance.canonical import canonical_json, file_digest
from qrlora.operations.registry.database import writing
from qrlora.operations.registry.intake import described_facts
from qrlora.operations.registry.records import KINDS, RELATIONS, Artifact, Edge, Link
from qrlora.operations.registry.references import check_alias, check_name
from qrlora.operations.registry.registry import Registry
from qrlora.operations.registry.schema import AliasRow, ArtifactRow, VersionRow

FORMAT = 1
MANIFEST = "manifest.json"
MOST_MANIFEST = 64 * 2**20
MOST_BYTES = 2**40
"""Most bytes of all objects together; the free disk is checked as well."""
MOST_OBJECTS = 100_000
DIGEST = r"^sha256:[0-9a-f]{64}$"
OF_POLICY = ("policy", "approval")
"""Kinds that no alias of a bundle may point at."""
ONLY_EVIDENCE = ("approved_by",)
"""Relations that a bundle may add to an artifact that is here already: what they lead to counts by its signatures."""
IMPORTED = "imported"
"""The tag of what came from a bundle: owner, licence and figures of its reports are somebody else's word."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Item(_Strict):
    """An artifact of a bundle."""

    digest: str = Field(pattern=DIGEST)
    kind: str
    size: int = Field(ge=0, le=MOST_BYTES)
    filename: str = Field(max_length=255)
    stored: bool
    role: str = Field(max_length=16)
    owner: str = Field(max_length=128)
    licence: str = Field(max_length=255)
    deprecated: str = Field(max_length=10_000)
    tags: list[str]
    facts: dict[str, Any]
    created_at: AwareDatetime
    created_by: str = Field(max_length=128)


class Arc(_Strict):
    """An edge of a bundle."""

    source: str = Field(pattern=DIGEST)
    relation: str
    target: str = Field(pattern=DIGEST)
    weight: float | None
    null_space: float | None
    position: int = Field(ge=0)


class Manifest(_Strict):
    """The content list of a bundle. names: (name, number, digest); aliases: (name, alias, digest)."""

    format: int
    artifacts: list[Item] = Field(max_length=MOST_OBJECTS)
    edges: list[Arc] = Field(max_length=10 * MOST_OBJECTS)
    names: list[tuple[str, Annotated[int, Field(ge=1, lt=10**9)], str]]
    aliases: list[tuple[str, str, str]]


@dataclass
class Imported:
    """The result of an import.

    Attributes:
        added: digests that were not here.
        names: name in the bundle -> name here.
        left_out: what was not taken, and why.
    """

    added: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


# Writing


def export_bundle(registry: Registry, references: Iterable[str], path: Path) -> Manifest:
    """Write the artifacts and all that they were made from, measured or approved by; the same bytes every time."""
    found: dict[str, Artifact] = {}
    edges: list[Edge] = []
    front = [registry.get(reference) for reference in references]
    while front:
        one = front.pop()
        if one.digest not in found:
            found[one.digest] = one
            out = registry.edges(one.digest)
            edges += out
            front += [registry.get(edge.target) for edge in out]
    artifacts = [found[digest] for digest in sorted(found)]
    names = [(*name.rsplit("@v", 1), one.digest) for one in artifacts for name in one.names]
    movable = [one for one in artifacts if one.kind not in OF_POLICY]
    aliases = [(*alias.split("@", 1), one.digest) for one in movable for alias in one.aliases]
    manifest = Manifest(
        format=FORMAT,
        artifacts=[_item(one) for one in artifacts],
        edges=[Arc(**vars(edge)) for edge in sorted(edges, key=lambda e: (e.source, e.relation, e.target, e.position))],
        names=sorted((str(name), int(number), digest) for name, number, digest in names),
        aliases=sorted((name, alias, digest) for name, alias, digest in aliases),
    )
    files = {one.digest: registry.path(one) for one in artifacts if one.stored}

    def write(stream: BinaryIO) -> None:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            content = canonical_json(manifest.model_dump(mode="json"))
            tar.addfile(_header(MANIFEST, len(content)), io.BytesIO(content))
            for digest, file in files.items():
                with file.open("rb") as opened:
                    tar.addfile(_header(_place(digest), file.stat().st_size), opened)

    check_room(path, sum(one.size for one in artifacts if one.stored))
    write_atomically(path, write)
    return manifest


def _item(one: Artifact) -> Item:
    kept = {key: getattr(one, key) for key in Item.model_fields if key not in ("tags", "facts", "created_at")}
    return Item(**kept, tags=list(one.tags), facts=dict(one.facts), created_at=one.created_at)


def _header(name: str, size: int) -> tarfile.TarInfo:
    """Return a header with the same owner, time and rights for all, so that equal content makes an equal file."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    return header


def _place(digest: str) -> str:
    return f"objects/{digest.removeprefix('sha256:')}"


# Reading


def import_bundle(registry: Registry, path: Path, prefix: str = IMPORTED, *, holding: str = "") -> Imported:
    """Take over a bundle from anybody: all of it or nothing.

    Args:
        prefix: first part of the names of what comes under a name that is something else here.
        holding: digest of an artifact that has to be in it.

    Raises:
        RegistryError: no bundle, or one whose objects are not what it says; nothing was taken then.
    """
    check_name(prefix)
    with tempfile.TemporaryDirectory() as scratch:
        manifest, files = _unpacked(path, Path(scratch))
        if holding and holding not in (digests := [item.digest for item in manifest.artifacts]):
            raise _refuse(f"{path.name} holds something else", holding, digests[:9])
        facts = {item.digest: _facts(item, files.get(item.digest)) for item in manifest.artifacts}
        _check_edges(manifest, facts)
        digest = file_digest(path)
        for one in files:
            registry.store.put(one, files[one])
        with writing(registry.engine) as session:
            for one in files:
                if not registry.store.has(one):  # `remove_unreferenced` came between the two
                    registry.store.put(one, files[one])
            return _Taking(registry, session, manifest, facts, prefix).take(digest)


def _refuse(what: str, expected: object, got: object) -> RegistryError:
    return RegistryError(what, expected=expected, got=got, remedy="ask for another export; nothing of it was taken")


def _unpacked(path: Path, scratch: Path) -> tuple[Manifest, dict[str, Path]]:
    """Read the manifest and the objects, hashed; no path of the file is ever joined to a folder."""
    files: dict[str, Path] = {}
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            manifest = _manifest(path, tar)
            wanted = {_place(item.digest): item for item in manifest.artifacts if item.stored}
            check_room(scratch, sum(item.size for item in wanted.values()), folder=True)
            for member in tar:
                if member.name == MANIFEST and not files:
                    continue  # read already
                item = wanted.pop(member.name, None)
                if item is None or not member.isreg() or member.size != item.size:
                    raise _refuse(f"{path} holds what its manifest does not name", "its objects", member.name[:200])
                files[item.digest] = _copied(tar, member, scratch / item.digest.removeprefix("sha256:"))
                if (got := file_digest(files[item.digest])) != item.digest:
                    raise _refuse(f"{path}: an object was changed", item.digest, got)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _refuse(f"{path} is no bundle", "a file that `qrlora registry export` wrote", error) from error
    if wanted:
        raise _refuse(f"{path} lacks objects", sorted(wanted), "none of them")
    return manifest, files


def _copied(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> Path:
    content = tar.extractfile(member)
    assert content is not None
    with target.open("wb") as stream:
        shutil.copyfileobj(content, stream)
    return target


def _manifest(path: Path, tar: tarfile.TarFile) -> Manifest:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MOST_MANIFEST:
        raise _refuse(f"{path} is no bundle", MANIFEST, first.name[:200] if first else "nothing")
    content = tar.extractfile(first)
    assert content is not None
    said = parse_json(content.read().decode("utf-8", "replace"), f"the manifest of {path}", RegistryError)
    try:
        manifest = Manifest.model_validate_json(canonical_json(said))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise _refuse(f"the manifest of {path} is malformed", "format 1", lines) from error
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path, manifest: Manifest) -> None:
    """Check what the types cannot: format, kinds, relations, and references inside the bundle."""
    digests = {item.digest for item in manifest.artifacts}
    if manifest.format != FORMAT:
        raise _refuse(f"{path} is of another format", FORMAT, manifest.format)
    if len(digests) < len(manifest.artifacts):
        raise _refuse(f"{path} names an artifact twice", "each once", len(manifest.artifacts))
    kinds = sorted({item.kind for item in manifest.artifacts} - set(KINDS))
    relations = sorted({arc.relation for arc in manifest.edges} - set(RELATIONS))
    if kinds or relations:
        raise _refuse(f"{path} has what this version does not know", [*KINDS, *RELATIONS], [*kinds, *relations])
    pointed = [arc.source for arc in manifest.edges] + [arc.target for arc in manifest.edges]
    pointed += [one[2] for one in (*manifest.names, *manifest.aliases)]
    if strange := set(pointed) - digests:
        raise _refuse(f"{path} points out of itself", "artifacts of its own", sorted(strange))
    if sum(item.size for item in manifest.artifacts) > MOST_BYTES:
        raise _refuse(f"{path} is too large", f"{MOST_BYTES:,} bytes", "more")
    for name, _, _ in manifest.names:
        check_name(name)
    for name, alias, _ in manifest.aliases:
        check_name(name), check_alias(alias)
    for item in manifest.artifacts:
        for tag in item.tags:
            check_alias(tag)


def _facts(item: Item, file: Path | None) -> dict[str, Any]:
    """Return the facts that the bytes tell; for those that tell none, and for reports, the facts that the bundle
    states."""
    if file is None:
        return item.facts
    told = described_facts(item.kind, file, item.filename)
    if told is None:
        return item.facts
    differ = {key: value for key, value in told.items() if key in item.facts and item.facts[key] != value}
    if differ:
        said = {key: item.facts[key] for key in differ}
        raise _refuse(f"{item.filename or item.digest[:19]} is not what the bundle says of it", differ, said)
    return told


def _check_edges(manifest: Manifest, facts: dict[str, dict[str, Any]]) -> None:
    """Refuse a composition whose edges differ from its record."""
    for item in manifest.artifacts:
        if item.kind == "composition":
            arcs = [a for a in manifest.edges if (a.source, a.relation) == (item.digest, "composed_of")]
            said = [(a.target, a.weight, a.null_space) for a in arcs]
            record = facts[item.digest]
            told = [(part["adapter"], part["weight"], record["null_space"]) for part in record["parts"]]
            if sorted(map(str, said)) != sorted(map(str, told)):
                raise _refuse("a composition of other parts than its record", told, said)


class _Taking:
    """The transaction in which a checked bundle becomes part of a registry."""

    def __init__(
        self, registry: Registry, session: Session, manifest: Manifest, facts: dict[str, dict[str, Any]], prefix: str
    ) -> None:
        self.registry, self.session, self.manifest, self.facts, self.prefix = registry, session, manifest, facts, prefix
        self.kinds = {item.digest: item.kind for item in manifest.artifacts}
        self.found = Imported()

    def take(self, bundle: str) -> Imported:
        for item in self._targets_first():
            self._artifact(item)
        self._names()
        details = {"added": len(self.found.added), "names": self.found.names, "left_out": len(self.found.left_out)}
        self.registry.audit_in(self.session, "import", bundle, details)
        return self.found

    def _targets_first(self) -> list[Item]:
        below: dict[str, set[str]] = {item.digest: set() for item in self.manifest.artifacts}
        for arc in self.manifest.edges:
            below[arc.source].add(arc.target)
        items = {item.digest: item for item in self.manifest.artifacts}
        try:
            return [items[digest] for digest in graphlib.TopologicalSorter(below).static_order()]
        except graphlib.CycleError as error:
            raise _refuse("the edges of the bundle run in a circle", "none", error.args[1][:3]) from error

    def _artifact(self, item: Item) -> None:
        row = self.session.get(ArtifactRow, item.digest)
        if row is not None and row.kind != item.kind:
            raise _refuse(f"{item.digest[:19]} is of another kind here", row.kind, item.kind)
        arcs = sorted((a for a in self.manifest.edges if a.source == item.digest), key=lambda a: a.position)
        new = row is None
        taken = [arc for arc in arcs if new or arc.relation in ONLY_EVIDENCE]
        if len(taken) < len(arcs):
            known = {(e.relation, e.target) for e in self.registry.edges(item.digest)}
            lost = [arc for arc in arcs if arc not in taken and (arc.relation, arc.target) not in known]
            self.found.left_out += [f"edge {a.relation} of {item.digest[:19]}, which is here already" for a in lost]
        links = [Link(arc.relation, arc.target, arc.weight, arc.null_space) for arc in taken]
        if new:
            made = min(item.created_at, datetime.now(timezone.utc)).astimezone(timezone.utc)
            here = {"created_by": self.registry.actor, "created_at": made, "facts": self.facts[item.digest]}
            row = ArtifactRow(**item.model_dump(exclude={"tags", *here}), **here)
            self.found.added.append(item.digest)
            self.registry.insert(self.session, row, links=links, tags=[*item.tags, IMPORTED])
            if item.deprecated:
                self.registry.audit_in(self.session, "deprecate", item.digest, {"reason": item.deprecated})
        elif links and row is not None:
            again = ArtifactRow(digest=row.digest, kind=row.kind, role="", owner="", licence="", stored=row.stored)
            self.registry.insert(self.session, again, links=links)

    def _names(self) -> None:
        told: dict[str, dict[int, str]] = {}
        for name, number, digest in self.manifest.names:
            told.setdefault(name, {})[number] = digest
        for name, versions in told.items():
            mine = self._versions(name)
            if all(mine.get(number) == digest for number, digest in versions.items()):
                self.found.names[name] = name
                lost = [alias for one, alias, _ in self.manifest.aliases if one == name]
                why = "a name that is here keeps its aliases"
                self.found.left_out += [f"alias {name}@{alias}: {why}" for alias in lost]
                continue
            governs = name == "policy" or any(self.kinds[digest] in OF_POLICY for digest in versions.values())
            here = self._free(name) if governs or self._taken(name) else name
            self.found.names[name] = here
            for number, digest in sorted(versions.items()):
                row = self.session.get_one(ArtifactRow, digest)
                self.registry.insert(self.session, row, here, number=number)
            self._aliases(name, here)

    def _aliases(self, name: str, here: str) -> None:
        for one, alias, digest in self.manifest.aliases:
            if one != name:
                continue
            if self.kinds[digest] in OF_POLICY:
                self.found.left_out.append(f"alias {name}@{alias}: no policy and no approval is in force by an import")
            else:
                self.session.add(AliasRow(name=here, alias=alias, digest=digest, protected=False))
                details = {"digest": digest, "protected": False, "reason": IMPORTED}
                self.registry.audit_in(self.session, "alias", f"{here}@{alias}", details)

    def _versions(self, name: str) -> dict[int, str]:
        rows = self.session.scalars(select(VersionRow).where(VersionRow.name == name))
        return {row.number: row.digest for row in rows}

    def _taken(self, name: str) -> bool:
        """Return True if a name has versions or aliases here, so that nothing of ours gets a name of theirs."""
        aliases = select(AliasRow.alias).where(AliasRow.name == name).limit(1)
        return bool(self._versions(name)) or self.session.scalars(aliases).first() is not None

    def _free(self, name: str) -> str:
        """Return the name under the prefix, numbered if that is taken as well."""
        plain = here = f"{self.prefix.partition('/')[0]}/{re.sub('/', '-', name)[:58].strip('._-')}"
        number = 2
        while self._taken(here):
            here, number = f"{plain}-{number}", number + 1
        return here
