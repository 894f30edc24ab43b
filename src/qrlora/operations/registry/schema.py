"""Define the tables of the registry. Artifacts, edges and the audit log are only ever added to; names and aliases
move."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, DateTime, Float, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from qrlora._said import said
from qrlora.errors import RegistryError
from qrlora.operations.provenance.canonical import canonical_json, digest_of

DIGEST = String(71)
"""`sha256:` and 64 hexadecimal digits."""
NAME = String(128)
LOGGED = ("kind", "role", "owner", "licence", "stored", "size", "filename", "created_by", "created_at", "facts")
"""What the audit log tells of an artifact's row: all but its digest, which is the entry's subject, and `deprecated`."""


def utc(at: datetime) -> datetime:
    """SQLite forgets the zone; all times are written in UTC."""
    return at.astimezone(timezone.utc) if at.tzinfo else at.replace(tzinfo=timezone.utc)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class ArtifactRow(Base):
    """One immutable object: bytes whose SHA-256 is its key, and the facts read from them when they were added."""

    __tablename__ = "artifact"

    digest: Mapped[str] = mapped_column(DIGEST, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    filename: Mapped[str] = mapped_column(String(255), default="")
    stored: Mapped[bool] = mapped_column(Boolean, default=True)
    """False where only the digest and the facts are held: a base model, a generated picture kept elsewhere."""
    role: Mapped[str] = mapped_column(String(16), default="", index=True)
    owner: Mapped[str] = mapped_column(NAME, default="", index=True)
    licence: Mapped[str] = mapped_column(String(255), default="")
    facts: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    created_by: Mapped[str] = mapped_column(NAME)
    deprecated: Mapped[str] = mapped_column(Text, default="")
    """Why it should no longer be used; empty if it may be."""

    @property
    def logged(self) -> dict[str, Any]:
        """Return `LOGGED` as the audit log has it: JSON, of the facts their digest."""
        special = {"created_at": utc(self.created_at).isoformat(), "facts": digest_of(canonical_json(self.facts))}
        return {key: special.get(key, getattr(self, key)) for key in LOGGED}

    def fill_in(self, again: ArtifactRow) -> None:
        """Set role, owner and licence where the first adding left them empty. RegistryError for another role, owner or
        licence."""
        for key, label in (("role", said("role")), ("owner", said("owner")), ("licence", said("licence"))):
            known, given = getattr(self, key), getattr(again, key)
            if known and given and known != given:
                remedy = said("leave it out: what was registered with one %(key)s keeps it", key=label)
                raise RegistryError(
                    said("%(digest)s has another %(key)s", digest=self.digest[:19], key=label),
                    expected=known,
                    got=given,
                    remedy=remedy,
                )
            setattr(self, key, known or given)
        self.stored = self.stored or again.stored


class EdgeRow(Base):
    """`source` was made from, with or by `target`."""

    __tablename__ = "edge"

    source: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), primary_key=True)
    relation: Mapped[str] = mapped_column(String(24), primary_key=True)
    target: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), primary_key=True, index=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True, default=0)
    weight: Mapped[float | None] = mapped_column(Float)
    """λ of an adapter in a composition."""
    null_space: Mapped[float | None] = mapped_column(Float)


class VersionRow(Base):
    """The numbered versions of a name: NAME@v1, NAME@v2."""

    __tablename__ = "version"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), index=True)


class AliasRow(Base):
    """A moving pointer: NAME@ALIAS. A protected one moves only with `force`."""

    __tablename__ = "alias"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    alias: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), index=True)
    protected: Mapped[bool] = mapped_column(Boolean, default=False)


class TagRow(Base):
    __tablename__ = "tag"

    digest: Mapped[str] = mapped_column(ForeignKey("artifact.digest"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)


class AuditRow(Base):
    """One entry of the audit log; `hash` covers all of it and the hash before it."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[str] = mapped_column(String(40))
    """ISO 8601, in UTC, as it was hashed."""
    actor: Mapped[str] = mapped_column(NAME)
    action: Mapped[str] = mapped_column(String(32), index=True)
    subject: Mapped[str] = mapped_column(String(255), default="", index=True)
    details: Mapped[str] = mapped_column(Text, default="{}")
    """Canonical JSON, as it was hashed."""
    previous: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64), unique=True)


class AuditHeadRow(Base):
    """A signed statement that the log had this hash at this length."""

    __tablename__ = "audit_head"

    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64))
    envelope: Mapped[dict[str, Any]] = mapped_column(JSON)


Index("ix_version_digest_name", VersionRow.digest, VersionRow.name)
