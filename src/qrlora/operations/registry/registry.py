"""Add artifacts to a registry, and find them again.

registry = Registry.open("company", actor="ada")
registry.set_alias("chalk", "production", chalk.digest, reason="passed the brand sheet")
path = registry.path("registry:chalk@production")
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from qrlora._files import make_folder
from qrlora._said import said
from qrlora.errors import RegistryError
from qrlora.operations.provenance.audit import GENESIS, Entry, entry_hash
from qrlora.operations.provenance.canonical import canonical_json, file_digest
from qrlora.operations.registry.database import connect, reading, writing
from qrlora.operations.registry.queries import added_at, find, load, matching, moves
from qrlora.operations.registry.records import KINDS, RELATIONS, Addition, Artifact, Edge, Link, Move
from qrlora.operations.registry.references import check_alias, check_name
from qrlora.operations.registry.schema import AliasRow, ArtifactRow, AuditRow, EdgeRow, TagRow, VersionRow
from qrlora.operations.registry.store import Store, store_at

PLACE, ACTOR = "QRLORA_REGISTRY", "QRLORA_ACTOR"


def default_place() -> str:
    """Return where the registry is: $QRLORA_REGISTRY, else `~/.local/share/qrlora/registry`."""
    return os.environ.get(PLACE) or default_place_of_trust()


def default_actor() -> str:
    """Return who acts: $QRLORA_ACTOR, else the user's login name."""
    if named := os.environ.get(ACTOR):
        return named
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


class Registry:
    """Artifacts by digest with their edges, names, aliases, tags and the audit log. Safe for many processes at once.

    Every method that changes something is one transaction, and writes one entry of the audit log in it.

    Raises (all methods): RegistryError.
    """

    def __init__(self, engine: Engine, store: Store, folder: Path, actor: str) -> None:
        self.engine, self.store, self.folder, self.actor = engine, store, folder, actor

    @classmethod
    def open(
        cls, where: str | Path | None = None, *, actor: str | None = None, create: bool = True, store: str | None = None
    ) -> Registry:
        """Open the registry in a folder, or at a database URL with its bytes in `store`.

        Args:
            where: a folder, or `postgresql+psycopg://…`; `default_place()` if None.
            actor: who acts, for the audit log; `default_actor()` if None.
            create: False refuses a folder without a registry.
            store: folder or fsspec URL of the bytes; $QRLORA_REGISTRY_STORE, else `objects` in the folder.
        """
        place, actor = str(where or default_place()), actor or default_actor()
        store = store or os.environ.get("QRLORA_REGISTRY_STORE")
        if "://" in place:
            if not store:
                remedy = "set QRLORA_REGISTRY_STORE to a folder or an fsspec URL"
                raise RegistryError("a registry in a database needs a place for the bytes", remedy=remedy)
            folder = Path(store) if "://" not in store else Path(default_place_of_trust())
            return cls(connect(place), store_at(store), folder, actor)
        folder = Path(place)
        if not create and not (folder / "registry.db").is_file():
            raise RegistryError(
                f"no registry in {folder}",
                expected="a folder that `qrlora registry add` made",
                remedy=f"name it with --registry or {PLACE}",
            )
        make_folder(folder)
        return cls(connect(f"sqlite:///{folder / 'registry.db'}"), store_at(store or folder / "objects"), folder, actor)

    @property
    def place(self) -> str:
        """The argument of `open` for it: its folder, or the URL of its database."""
        url = self.engine.url
        return str(self.folder) if url.drivername == "sqlite" else url.render_as_string(hide_password=False)

    # Adding

    def add(self, source: Path | bytes, kind: str, **described: Any) -> Artifact:
        """Add an object. One that is registered already gets the new name, tags and edges, and role, owner and licence
        where these were empty; nothing else of it changes. described: fields of `Addition`.
        """
        return self.add_many([Addition(source, kind, **described)])[0]

    def add_many(self, additions: Sequence[Addition]) -> list[Artifact]:
        """Add objects in one transaction, each as `add` does: all of them or none."""
        if not additions:
            return []
        for one in additions:
            if one.kind not in KINDS:
                raise RegistryError(f"no such kind: {one.kind!r}", expected=" or ".join(KINDS))
            if one.name:
                check_name(one.name)
        with tempfile.TemporaryDirectory() as scratch:
            paths = [_as_file(one.source, Path(scratch, str(number))) for number, one in enumerate(additions)]
            rows = [self._row(one, path) for one, path in zip(additions, paths, strict=True)]
            stored = [(row.digest, path) for row, path in zip(rows, paths, strict=True) if row.stored]
            digests = [row.digest for row in rows]
            for digest, path in stored:
                self.store.put(digest, path)
            with writing(self.engine) as session:
                for digest, path in stored:
                    if not self.store.has(digest):  # `remove_unreferenced` came between the two
                        self.store.put(digest, path)
                for one, row in zip(additions, rows, strict=True):
                    self.insert(session, row, one.name, one.links, one.tags)
        with reading(self.engine) as session:
            return load(session, digests)

    def _row(self, one: Addition, path: Path) -> ArtifactRow:
        return ArtifactRow(
            digest=file_digest(path),
            kind=one.kind,
            size=path.stat().st_size,
            filename=(one.filename or (one.source.name if isinstance(one.source, Path) else ""))[:255],
            stored=one.keep,
            role=one.role,
            owner=one.owner,
            licence=one.licence,
            facts=dict(one.facts or {}),
            created_at=_now(),
            created_by=self.actor,
        )

    def add_record(self, record: Mapping[str, Any], kind: str, **options: Any) -> Artifact:
        """Add an object that is its canonical JSON: a composition, a report, an approval. Options: as `add`."""
        return self.add(canonical_json(record), kind, facts=options.pop("facts", record), **options)

    def insert(
        self,
        session: Session,
        row: ArtifactRow,
        name: str | None = None,
        links: Sequence[Link] = (),
        tags: Iterable[str] = (),
        number: int | None = None,
    ) -> None:
        """Add a row with its edges in a transaction of the caller's. number: of the name's version, if not the next."""
        there = session.get(ArtifactRow, row.digest)
        if there is None:
            session.add(row)
            session.flush()
        elif there.kind != row.kind:
            raise RegistryError(
                said("%(digest)s is registered as another kind", digest=row.digest[:19]),
                expected=there.kind,
                got=row.kind,
            )
        else:
            there.fill_in(row)
        links, tags = list(links), list(tags)
        for position, link in enumerate(links):
            self._link(session, row.digest, link, position)
        for tag in tags:
            session.merge(TagRow(digest=row.digest, tag=check_alias(tag)))
        details = (there or row).logged | {"links": [vars(link) for link in links], "tags": tags}
        details |= {"name": name, "version": self._version(session, name, row.digest, number) if name else None}
        self.audit_in(session, "add", row.digest, details)

    def _link(self, session: Session, source: str, link: Link, position: int) -> None:
        if link.relation not in RELATIONS:
            raise RegistryError(f"no such relation: {link.relation!r}", expected=" or ".join(RELATIONS))
        if session.get(ArtifactRow, link.target) is None:
            raise RegistryError(f"{link.target[:80]!r} is not in the registry", remedy="add it first")
        position = position if link.relation == "composed_of" else 0
        session.merge(
            EdgeRow(
                source=source,
                relation=link.relation,
                target=link.target,
                position=position,
                weight=link.weight,
                null_space=link.null_space,
            )
        )

    def _version(self, session: Session, name: str, digest: str, number: int | None) -> int:
        if number is not None:
            session.add(VersionRow(name=name, number=number, digest=digest))
            return number
        newest = session.scalars(select(VersionRow).where(VersionRow.name == name).order_by(VersionRow.number.desc()))
        last = newest.first()
        if last and last.digest == digest:
            return last.number
        number = last.number + 1 if last else 1
        session.add(VersionRow(name=name, number=number, digest=digest))
        return number

    def link(self, source: str, *links: Link) -> None:
        """Add edges between artifacts that are there: a report or an approval that came later."""
        with writing(self.engine) as session:
            digest = find(session, source)
            for position, link in enumerate(links):
                self._link(session, digest, link, position)
            self.audit_in(session, "link", digest, {"links": [vars(link) for link in links]})

    # Finding

    def get(self, reference: str) -> Artifact:
        """Return the artifact of a reference (`qrlora.operations.registry.references`)."""
        with reading(self.engine) as session:
            return load(session, [find(session, reference)])[0]

    def has(self, digest: str) -> bool:
        """Return True if this very digest is registered."""
        with reading(self.engine) as session:
            return session.get(ArtifactRow, digest) is not None

    def path(self, artifact: Artifact | str) -> Path:
        """Return a local file with the artifact's bytes, after checking their digest."""
        found = self.get(artifact) if isinstance(artifact, str) else artifact
        if not found.stored:
            remedy = "use the file it was registered from"
            raise RegistryError(
                said("the registry holds no bytes of %(title)s", title=found.title), got=found.kind, remedy=remedy
            )
        return self.store.path(found.digest)

    def read(self, artifact: Artifact | str) -> bytes:
        """Return the artifact's bytes, after checking their digest."""
        return self.path(artifact).read_bytes()

    def edges(self, digest: str, *, into: bool = False, relation: str | None = None) -> list[Edge]:
        """Return the edges from an artifact, or those that lead to it, in their order."""
        side = EdgeRow.target if into else EdgeRow.source
        wanted = select(EdgeRow).where(side == digest).order_by(EdgeRow.relation, EdgeRow.position, EdgeRow.source)
        if relation:
            wanted = wanted.where(EdgeRow.relation == relation)
        with reading(self.engine) as session:
            return [
                Edge(row.source, row.relation, row.target, row.weight, row.null_space, row.position)
                for row in session.scalars(wanted)
            ]

    def search(
        self,
        text: str = "",
        *,
        kind: str | None = None,
        role: str | None = None,
        owner: str | None = None,
        licence: str | None = None,
        tag: str | None = None,
        fact: tuple[str, str] | None = None,
        deprecated: bool = False,
        limit: int = 1000,
    ) -> list[Artifact]:
        """Return the artifacts that match everything given, newest first.

        Args:
            text: looked for in names, file names and triggers.
            fact: key and value of one of its facts that is a text.
            deprecated: also those that should no longer be used.
        """
        exact = {"kind": kind, "role": role, "owner": owner, "licence": licence}
        wanted = matching(text, exact, tag, fact, deprecated).limit(limit)
        with reading(self.engine) as session:
            return load(session, list(session.scalars(wanted)))

    # Changing what may change

    def set_alias(
        self,
        name: str,
        alias: str,
        reference: str,
        *,
        reason: str = "",
        protect: bool | None = None,
        force: bool = False,
    ) -> None:
        """Point NAME@alias at an artifact.

        Args:
            protect: set or clear its protection; as it was if None.
            force: move it although it is protected.
        """
        check_name(name), check_alias(alias)
        with writing(self.engine) as session:
            digest = find(session, reference)
            row = session.get(AliasRow, (name, alias))
            self._check_protected(row, digest, protect, force)
            row = row or AliasRow(name=name, alias=alias)
            row.digest = digest
            row.protected = bool(row.protected) if protect is None else protect
            session.add(row)
            details = {"digest": digest, "protected": row.protected, "reason": reason}
            self.audit_in(session, "alias", f"{name}@{alias}", details)

    def remove_alias(self, name: str, alias: str, *, reason: str = "", force: bool = False) -> None:
        """Remove an alias; its history stays."""
        with writing(self.engine) as session:
            row = session.get(AliasRow, (check_name(name), check_alias(alias)))
            if row is None:
                raise RegistryError(f"no alias {name}@{alias}", remedy="`qrlora registry search` lists what there is")
            self._check_protected(row, "", None, force)
            session.delete(row)
            self.audit_in(session, "remove_alias", f"{name}@{alias}", {"reason": reason})

    @staticmethod
    def _check_protected(row: AliasRow | None, digest: str, protect: bool | None, force: bool) -> None:
        if row and row.protected and not force and (row.digest != digest or protect is False):
            raise RegistryError(
                said("%(name)s@%(alias)s is protected", name=row.name, alias=row.alias),
                got=said("it points at %(digest)s", digest=row.digest[:19]),
                remedy="if you may: `qrlora registry alias ALIAS REFERENCE --force`",
            )

    def moves(self, name: str) -> list[Move]:
        """Return the history of a name's aliases as the audit log tells it, oldest first."""
        with reading(self.engine) as session:
            return moves(session, name)

    def added_at(self, digest: str) -> datetime:
        """Return when the audit log says that an artifact came in, which nobody who made it can choose."""
        with reading(self.engine) as session:
            return added_at(session, digest)

    def tag(self, reference: str, *tags: str) -> None:
        """Add tags to an artifact."""
        with writing(self.engine) as session:
            digest = find(session, reference)
            for tag in tags:
                session.merge(TagRow(digest=digest, tag=check_alias(tag)))
            self.audit_in(session, "tag", digest, {"tags": list(tags)})

    def deprecate(self, reference: str, reason: str) -> None:
        """Say why an artifact should no longer be used; an empty reason takes that back."""
        with writing(self.engine) as session:
            digest = find(session, reference)
            session.get_one(ArtifactRow, digest).deprecated = reason
            self.audit_in(session, "deprecate", digest, {"reason": reason})

    # The audit log

    def audit(self, action: str, subject: str, details: Mapping[str, Any]) -> None:
        """Write an entry of its own: an approval that was given, a check that refused."""
        with writing(self.engine) as session:
            self.audit_in(session, action, subject, details)

    def log(self) -> list[Entry]:
        """Return the audit log from its first entry."""
        with reading(self.engine) as session:
            rows = session.scalars(select(AuditRow).order_by(AuditRow.seq))
            return [
                Entry(row.seq, row.at, row.actor, row.action, row.subject, row.details, row.previous, row.hash)
                for row in rows
            ]

    def audit_in(self, session: Session, action: str, subject: str, details: Mapping[str, Any]) -> None:
        """Write an entry in a transaction of the caller's."""
        session.flush()
        tip = session.execute(select(AuditRow.seq, AuditRow.hash).order_by(AuditRow.seq.desc()).limit(1)).first()
        seq, previous = (tip.seq + 1, tip.hash) if tip else (1, GENESIS)
        text = canonical_json(dict(details)).decode()
        fields = (seq, _now().isoformat(), self.actor, action, subject, text, previous)
        names = ("seq", "at", "actor", "action", "subject", "details", "previous")
        session.add(AuditRow(**dict(zip(names, fields, strict=True)), hash=entry_hash(*fields)))

    def close(self) -> None:
        self.engine.dispose()


def default_place_of_trust() -> str:
    """Return the folder of keys and trust for a registry whose bytes are in no folder."""
    return str(Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share", "qrlora", "registry"))


def _as_file(source: Path | bytes, place: Path) -> Path:
    if isinstance(source, bytes):
        place.write_bytes(source)
        return place
    return source


def _now() -> datetime:
    return datetime.now(timezone.utc)
