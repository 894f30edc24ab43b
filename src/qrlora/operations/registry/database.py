"""Open the registry's database, and migrate it: SQLite in WAL mode by default, PostgreSQL by URL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from qrlora.errors import RegistryError

BUSY_SECONDS = 60
"""Seconds that a writer waits for the others."""
LOCK = 0x71726C6F7261
"""Key of PostgreSQL's advisory lock: one writer at a time, because the audit log is a chain."""
NEWEST = "0001"
"""The last of migrations/versions. Tables that are there already need no Alembic, which is slow to import."""


def connect(url: str) -> Engine:
    """Open the database and bring its tables up to this version.

    Raises:
        RegistryError: it cannot be reached, is none of ours, or was written by a later version.
    """
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS} if url.startswith("sqlite") else {})
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_immediately)
    try:
        with engine.begin() as connection:
            _lock(connection)
            if _revision(connection) != NEWEST:
                _migrate(connection)
    except (DBAPIError, RegistryError) as error:
        engine.dispose()
        raise error if isinstance(error, RegistryError) else _unusable(engine, error) from error
    return engine


def _unusable(engine: Engine, error: Exception) -> RegistryError:
    return RegistryError(
        f"cannot open the registry's database {engine.url.render_as_string()}",
        got=str(getattr(error, "orig", None) or error).splitlines()[0],
        remedy="check the folder or URL, and that the database runs; upgrade qrlora if a later version wrote it",
    )


def _set_up_sqlite(connection: object, _: object) -> None:
    connection.isolation_level = None  # type: ignore[attr-defined]  # we begin transactions ourselves
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediately(connection: Connection) -> None:
    """Take the write lock first: a transaction that reads and then writes would fail where another wrote between."""
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})


def _revision(connection: Connection) -> str | None:
    """Return the last migration of the tables; None if there are none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return found


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise _unusable(connection.engine, error) from error


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """Write in one transaction: all of it or nothing, and no other writer between its first read and its commit."""
    with _session(engine.connect()) as session, session.begin():
        _lock(session.connection())
        yield session


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """Read in one transaction, which waits for no writer."""
    with _session(engine.connect().execution_options(reads=True)) as session, session.begin():
        yield session


@contextlib.contextmanager
def _session(connection: Connection) -> Iterator[Session]:
    try:
        with connection, Session(connection) as session:
            yield session
    except IntegrityError:
        raise  # a fault of ours
    except DatabaseError as error:
        raise RegistryError(
            "the registry's database does not answer, or is damaged",
            got=str(error.orig).splitlines()[0],
            remedy="check the disk and the database, try again if many write at once; else restore it from a backup",
        ) from error
