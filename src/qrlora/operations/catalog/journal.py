"""Record finished pictures: one row each in `catalog.db`, written after the picture's file was renamed.

The process that gives out the work is the only one that writes. A row without its file, or with one of another size, is
no finished picture; a file without its row was finished by a process that was killed, and is found again by its key.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qrlora.errors import OutputError
from qrlora.operations.catalog.plan import Picture

FILE = "catalog.db"
VERSION = 1
TABLES = """
CREATE TABLE picture (
    key TEXT PRIMARY KEY, product TEXT NOT NULL, style TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL,
    file TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, seconds REAL NOT NULL, worker TEXT NOT NULL,
    attempts INTEGER NOT NULL, error TEXT NOT NULL, scored_by TEXT NOT NULL, scores TEXT NOT NULL, passes INTEGER,
    reasons TEXT NOT NULL, at TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE spent (what TEXT PRIMARY KEY, count INTEGER NOT NULL, seconds REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE page (name TEXT PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Outcome:
    """The outcome of making one picture.

    Attributes:
        error: why the picture could not be made; empty if it was.
        digest, size: of its file.
        made: False if a complete file without a row was found instead.
        seconds: of sampling and of scoring.
        final: trying again would give the same error.
        passes: whether it passes the brand sheet; None without one.
    """

    key: str
    error: str = ""
    final: bool = False
    digest: str = ""
    size: int = 0
    made: bool = True
    seconds: float = 0.0
    scoring: float = 0.0
    worker: str = ""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    passes: bool | None = None
    reasons: tuple[str, ...] = ()


class Journal:
    """The rows of one catalog; a context manager. OutputError if the file is none of ours, or cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        try:
            self.database = sqlite3.connect(self.path, isolation_level=None)
            self.database.row_factory = sqlite3.Row
            # One process writes, so the log needs no memory shared with others: it works on a network's file system.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
                self.database.execute(f"PRAGMA {pragma}")
            version = self.database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self.database.executescript(f"BEGIN; {TABLES} PRAGMA user_version={VERSION}; COMMIT;")
            elif version != VERSION:
                raise sqlite3.DatabaseError(f"version {version} of its tables, and {VERSION} is needed")
        except sqlite3.Error as error:
            raise OutputError(
                f"{self.path} cannot be used",
                expected="the journal of a catalog, and no other process that uses it",
                got=error,
                remedy="let the other run end, or use another folder",
            ) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    def rows(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the rows of these pictures, by key."""
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(keys), 500):  # SQLite takes 999 values
            some = keys[start : start + 500]
            query = f"SELECT * FROM picture WHERE key IN ({','.join('?' * len(some))})"
            found |= {row["key"]: _read(row) for row in self.database.execute(query, some)}
        return found

    def commit(self, pairs: Iterable[tuple[Picture, Outcome]]) -> None:
        """Write the outcomes of these pictures, in one transaction. An error never replaces a finished picture's
        row."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        with self.database:
            self.database.execute("BEGIN")
            for picture, one in pairs:
                self.database.execute(
                    "INSERT INTO picture VALUES (?,?,?,?,?,?,?,?,?,?,1,?,?,?,?,?,?) ON CONFLICT (key) DO UPDATE SET "
                    "digest=excluded.digest, size=excluded.size, seconds=excluded.seconds, worker=excluded.worker, "
                    "attempts=attempts+1, error=excluded.error, scored_by=excluded.scored_by, scores=excluded.scores, "
                    "passes=excluded.passes, reasons=excluded.reasons, at=excluded.at, file=excluded.file",
                    (
                        *(picture.key, picture.product, picture.style, picture.prompt, picture.seed, picture.file),
                        *(one.digest, one.size, one.seconds, one.worker, one.error),
                        *("" if one.error else picture.scored_by, json.dumps(one.scores), one.passes),
                        *(json.dumps(one.reasons, ensure_ascii=False), now),
                    ),
                )
                if not one.error:
                    self._spend("sampling", int(one.made), one.seconds)
                    self._spend("scoring", 1, one.scoring)

    def spend(self, what: str, seconds: float) -> None:
        """Add to the time that was spent on something: training, or the runs themselves."""
        with self.database:
            self.database.execute("BEGIN")
            self._spend(what, 1, seconds)

    def _spend(self, what: str, count: int, seconds: float) -> None:
        self.database.execute(
            "INSERT INTO spent VALUES (?,?,?) ON CONFLICT (what) DO UPDATE SET count=count+excluded.count, "
            "seconds=seconds+excluded.seconds",
            (what, count, seconds),
        )

    def page(self, name: str) -> str:
        """Return the digest of what a page shows; empty if it was never written."""
        row = self.database.execute("SELECT digest FROM page WHERE name=?", (name,)).fetchone()
        return row["digest"] if row else ""

    def set_page(self, name: str, digest: str) -> None:
        """Note what a page shows, after it was written."""
        with self.database:
            self.database.execute("INSERT OR REPLACE INTO page VALUES (?,?)", (name, digest))

    def spent(self) -> dict[str, tuple[int, float]]:
        """Return how often and for how many seconds workers trained, sampled and scored, in all runs."""
        return {row["what"]: (row["count"], row["seconds"]) for row in self.database.execute("SELECT * FROM spent")}


def _read(row: sqlite3.Row) -> dict[str, Any]:
    fields = dict(row)
    fields["scores"], fields["reasons"] = json.loads(fields["scores"]), json.loads(fields["reasons"])
    fields["passes"] = None if fields["passes"] is None else bool(fields["passes"])
    return fields
