"""Keep a registry sound: remove bytes that nothing refers to, and find whatever is missing, damaged or was changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import select, text

from qrlora.errors import QrloraError
from qrlora.operations.provenance.audit import Entry
from qrlora.operations.registry.database import reading, writing
from qrlora.operations.registry.heads import faults_of
from qrlora.operations.registry.registry import Registry
from qrlora.operations.registry.schema import LOGGED, AliasRow, ArtifactRow, EdgeRow, TagRow, VersionRow
from qrlora.operations.registry.signatures import trust_of

Progress = Callable[[int, int], None]


def unreferenced(registry: Registry) -> set[str]:
    """Return the digests of bytes in the store that no artifact refers to: of adds that were killed, or refused."""
    there = registry.store.digests()
    with reading(registry.engine) as session:
        return there - set(session.scalars(select(ArtifactRow.digest).where(ArtifactRow.stored)))


def remove_unreferenced(registry: Registry) -> set[str]:
    """Remove the unreferenced bytes and killed processes' temporary files, while additions wait; return the digests."""
    with writing(registry.engine) as session:
        kept = set(session.scalars(select(ArtifactRow.digest).where(ArtifactRow.stored)))
        lost = registry.store.digests() - kept
        for digest in lost:
            registry.store.delete(digest)
        registry.store.sweep()
        if lost:
            registry.audit_in(session, "gc", "", {"removed": sorted(lost)})
    return lost


def verify(registry: Registry, progress: Progress | None = None, heads: Iterable[Path] = ()) -> list[str]:
    """Return what is wrong with a registry, one line a fault; empty if nothing is.

    The database is checked for damage, the audit log and its signed heads as `qrlora audit verify` does it, every row
    against what the log says of it, and every byte in the store against its digest.

    heads: files of signed heads that were kept elsewhere.
    """
    faults = _database(registry)
    if faults:
        return faults
    log = registry.log()
    try:
        faults = [f"audit log: {fault}" for fault in faults_of(registry, trust_of(registry), heads, entries=log)]
    except QrloraError as error:  # the trust file, or that of the heads
        faults = [error.what]
    with reading(registry.engine) as session:
        faults += _differences(_told(log), _rows(session))
        stored = list(
            session.scalars(select(ArtifactRow.digest).where(ArtifactRow.stored).order_by(ArtifactRow.digest))
        )
    for number, digest in enumerate(stored, 1):
        try:
            registry.store.check(digest)
        except (QrloraError, OSError) as error:
            faults.append(f"{digest}: {getattr(error, 'what', error)}")
        if progress:
            progress(number, len(stored))
    return faults


def _database(registry: Registry) -> list[str]:
    """Return the damage that the database itself finds."""
    if registry.engine.dialect.name != "sqlite":
        return []
    with reading(registry.engine) as session:
        said = [row[0] for row in session.execute(text("PRAGMA integrity_check(20)"))]
        keys = session.execute(text("PRAGMA foreign_key_check")).all()
    faults = [f"database: {line}" for line in said if line != "ok"]
    return faults + [f"database: a row of {row[0]} refers to an artifact that is not there" for row in keys[:20]]


State = dict[tuple[str, ...], Any]


def _told(log: Iterable[Entry]) -> State:
    """Return what the tables would hold if the log were all that happened."""
    state: State = {}
    for entry in log:
        try:
            details = json.loads(entry.details)
            _apply(state, entry, details)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # an entry that was changed: the chain tells
    return state


def _apply(state: State, entry: Entry, details: dict[str, Any]) -> None:
    if entry.action == "add":
        state["artifact", entry.subject] = {key: details[key] for key in LOGGED}
        state.setdefault(("deprecated", entry.subject), "")
        if details["name"]:
            state["version", details["name"], str(details["version"])] = entry.subject
    if entry.action in ("add", "link"):
        for position, link in enumerate(details["links"]):
            place = position if link["relation"] == "composed_of" else 0
            numbers = (link["weight"], link["null_space"])
            state["edge", entry.subject, link["relation"], link["target"], str(place)] = numbers
    if entry.action in ("add", "tag"):
        state.update({("tag", entry.subject, tag): True for tag in details["tags"]})
    alias = ("alias", *entry.subject.split("@", 1))
    if entry.action == "alias":
        state[alias] = (details["digest"], details["protected"])
    elif entry.action == "remove_alias":
        state.pop(alias, None)
    elif entry.action == "deprecate":
        state["deprecated", entry.subject] = details["reason"]


def _rows(session: Any) -> State:
    """Return what the tables hold."""
    state: State = {}
    for row in session.scalars(select(ArtifactRow)):
        state["artifact", row.digest] = row.logged
        state["deprecated", row.digest] = row.deprecated
    for row in session.scalars(select(VersionRow)):
        state["version", row.name, str(row.number)] = row.digest
    for row in session.scalars(select(EdgeRow)):
        state["edge", row.source, row.relation, row.target, str(row.position)] = (row.weight, row.null_space)
    for row in session.scalars(select(TagRow)):
        state["tag", row.digest, row.tag] = True
    for row in session.scalars(select(AliasRow)):
        state["alias", row.name, row.alias] = (row.digest, row.protected)
    return state


def _differences(told: State, there: State) -> list[str]:
    """Describe the rows that differ from what the log says was written."""
    faults = []
    for key in sorted({*told, *there}):
        if told.get(key) != there.get(key):
            what = "is missing" if key not in there else "was never written" if key not in told else "was changed"
            named = [part[:19] if part.startswith("sha256:") else part for part in key]
            faults.append(
                f"{named[0]} {' '.join(named[1:])} {what}: expected {told.get(key)}, got {there.get(key)}"[:400]
            )
    return faults
