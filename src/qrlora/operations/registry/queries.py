"""Query the tables: which artifact a reference names, what matches, and all that belongs to an artifact."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from qrlora._reading import parse_json
from qrlora._said import said
from qrlora.errors import RegistryError
from qrlora.operations.registry.records import Artifact, Move
from qrlora.operations.registry.references import parse_reference
from qrlora.operations.registry.schema import AliasRow, ArtifactRow, AuditRow, TagRow, VersionRow, utc


def find(session: Session, text: str) -> str:
    """Return the digest of what a reference names. RegistryError if that is not one artifact."""
    reference = parse_reference(text)
    if reference.digest:
        found = list(
            session.scalars(select(ArtifactRow.digest).where(ArtifactRow.digest.startswith(reference.digest)).limit(2))
        )
    elif reference.alias:
        row = session.get(AliasRow, (reference.name, reference.alias))
        found = [row.digest] if row else []
    else:
        versions = select(VersionRow.digest).where(VersionRow.name == reference.name)
        if reference.version:
            versions = versions.where(VersionRow.number == reference.version)
        found = list(session.scalars(versions.order_by(VersionRow.number.desc()).limit(1)))
    if len(found) != 1:
        got = said("several that begin so") if found else said("none")
        remedy = "`qrlora registry search` lists what there is"
        raise RegistryError(
            said("no %(text)s in the registry", text=repr(text[:200])), expected="one artifact", got=got, remedy=remedy
        )
    return found[0]


def matching(
    text: str, exact: Mapping[str, str | None], tag: str | None, fact: tuple[str, str] | None, deprecated: bool
) -> Select[Any]:
    """Return the query for the digests of what matches everything given, newest first. Arguments: `Registry.search`."""
    wanted = select(ArtifactRow.digest).order_by(ArtifactRow.created_at.desc(), ArtifactRow.digest)
    for column, value in exact.items():
        wanted = wanted.where(getattr(ArtifactRow, column) == value) if value else wanted
    if tag:
        wanted = wanted.where(ArtifactRow.digest.in_(select(TagRow.digest).where(TagRow.tag == tag)))
    if fact:
        wanted = wanted.where(ArtifactRow.facts[fact[0]].as_string() == fact[1])
    if not deprecated:
        wanted = wanted.where(ArtifactRow.deprecated == "")
    if text:
        named = select(VersionRow.digest).where(VersionRow.name.contains(text, autoescape=True))
        said = (ArtifactRow.filename, ArtifactRow.facts["trigger"].as_string())
        matches = [column.contains(text, autoescape=True) for column in said]
        wanted = wanted.where(or_(*matches, ArtifactRow.digest.in_(named)))
    return wanted


def load(session: Session, digests: Sequence[str]) -> list[Artifact]:
    """Return the artifacts with these digests, in their order."""
    rows = {row.digest: row for row in _in(session, ArtifactRow, digests)}
    names, aliases, tags = (_grouped(_in(session, kind, digests)) for kind in (VersionRow, AliasRow, TagRow))
    return [_artifact(rows[digest], names, aliases, tags) for digest in digests]


def moves(session: Session, name: str) -> list[Move]:
    """Return the moves of a name's aliases as the audit log tells them, oldest first."""
    wanted = select(AuditRow).where(AuditRow.action.in_(("alias", "remove_alias"))).order_by(AuditRow.seq)
    found, points_at = list[Move](), dict[str, str]()
    for row in session.scalars(wanted.where(AuditRow.subject.startswith(f"{name}@", autoescape=True))):
        what, remedy = f"entry {row.seq} of the audit log", "`qrlora audit verify` says what was changed"
        alias, details = row.subject.partition("@")[2], parse_json(row.details, what, RegistryError, remedy=remedy)
        digest = details.get("digest", "")
        if points_at.get(alias) != digest:  # else its protection alone was changed
            at = datetime.fromisoformat(row.at)
            found.append(Move(name, alias, digest, at, row.actor, details.get("reason", "")))
        points_at[alias] = digest
    return found


def added_at(session: Session, digest: str) -> datetime:
    """Return when an artifact was added first. RegistryError if the audit log does not say."""
    wanted = select(AuditRow.at).where(AuditRow.action == "add", AuditRow.subject == digest).order_by(AuditRow.seq)
    at = session.scalars(wanted.limit(1)).first()
    if at is None:
        remedy = "`qrlora audit verify` says more"
        raise RegistryError(f"the audit log has no entry of {digest[:19]}", remedy=remedy)
    return datetime.fromisoformat(at)


def _in(session: Session, kind: type[Any], digests: Collection[str]) -> list[Any]:
    if not digests:
        return []
    order = [column for column in kind.__table__.primary_key.columns]
    return list(session.scalars(select(kind).where(kind.digest.in_(digests)).order_by(*order)))


def _grouped(rows: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row.digest, []).append(row)
    return found


def _artifact(
    row: ArtifactRow, names: Mapping[str, list[Any]], aliases: Mapping[str, list[Any]], tags: Mapping[str, list[Any]]
) -> Artifact:
    return Artifact(
        digest=row.digest,
        kind=row.kind,
        size=row.size,
        filename=row.filename,
        stored=row.stored,
        role=row.role,
        owner=row.owner,
        licence=row.licence,
        created_at=utc(row.created_at),
        created_by=row.created_by,
        deprecated=row.deprecated,
        names=tuple(f"{one.name}@v{one.number}" for one in names.get(row.digest, ())),
        aliases=tuple(f"{one.name}@{one.alias}" for one in aliases.get(row.digest, ())),
        tags=tuple(one.tag for one in tags.get(row.digest, ())),
        facts=row.facts,
    )
