"""Sign heads of the audit log, so that cutting it off or rewriting it is found.

They are stored in the database and in a file outside it: hiding a change takes both, and every copy of the file
elsewhere.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select

from qrlora._files import claimed, write_atomically
from qrlora.errors import SignatureError
from qrlora.operations.provenance import dsse
from qrlora.operations.provenance.audit import Entry, broken
from qrlora.operations.provenance.canonical import canonical_json, file_digest
from qrlora.operations.provenance.keys import SigningKey, Trust, now
from qrlora.operations.registry.database import reading, writing
from qrlora.operations.registry.registry import Registry
from qrlora.operations.registry.schema import AuditHeadRow
from qrlora.operations.registry.signatures import trust_path

HEAD = "urn:qrlora:audit-head:v1"
FILE = "audit-heads.jsonl"
MOST_BYTES = 64 << 20


def sign_head(registry: Registry, key: SigningKey, trust: Trust, files: Iterable[Path] = ()) -> tuple[int, str]:
    """Sign the log as it is now; return its length and last hash.

    Args:
        trust: the key has to be an operator's.
        files: to which the head is added, beside `audit-heads.jsonl` in the registry's folder.

    Raises:
        SignatureError: the log is broken, so that nothing of it is worth signing; or the key is no operator's.
    """
    _check_operator(trust, key.key_id, now())
    entries = registry.log()
    if faults := faults_of(registry, trust, files, entries=entries):
        raise SignatureError("the audit log is broken", got=faults, remedy="find out who changed it before you sign")
    if not entries:
        raise SignatureError("the audit log is empty", remedy="add something to the registry first")
    tip = entries[-1]
    predicate = {"entries": tip.seq, "signed_at": now().isoformat()}
    envelope = dsse.sign(dsse.statement(HEAD, [("audit log", tip.hash)], predicate), key)
    with writing(registry.engine) as session:
        session.merge(AuditHeadRow(seq=tip.seq, key_id=key.key_id, hash=tip.hash, envelope=envelope))
    for path in (registry.folder / FILE, *files):
        _append(path, envelope)
    return tip.seq, tip.hash


def faults_of(
    registry: Registry, trust: Trust, files: Iterable[Path] = (), *, entries: list[Entry] | None = None
) -> list[str]:
    """Return what is wrong with the audit log, its signed heads and the trust file, one line a fault."""
    faults, heads = [], []
    for line, where in _heads(registry, files).items():
        try:
            heads.append(_verified(dsse.read_envelope(line), trust))
        except SignatureError as error:
            faults.append(f"a signed head in {where} is not genuine: {error.what}; {error.got or 'nothing to compare'}")
    entries = registry.log() if entries is None else entries
    return [*broken(entries, sorted(set(heads))), *faults, *_changed_trust(registry, entries)]


@dataclass(frozen=True)
class Signed:
    """Up to where the audit log is signed.

    Attributes:
        seq, hash: of the entry that the newest genuine head signs; 0 and empty if there is none.
        after: number of entries that follow it, which could be cut off unseen.
    """

    seq: int
    hash: str
    after: int

    @property
    def words(self) -> str:
        """A sentence for people."""
        named = f"signed up to entry {self.seq} (head {self.hash[:12]})" if self.seq else "no head is signed"
        unsigned = f"the {self.after} entries {'after it ' if self.seq else ''}could be cut off unseen"
        return f"{named}: {unsigned} (`qrlora audit sign`)" if self.after else named


def newest_head(registry: Registry, trust: Trust, entries: Sequence[Entry], files: Iterable[Path] = ()) -> Signed:
    """Return up to where these entries, the whole log, are signed. Heads that are not genuine are `faults_of`'s."""
    found = [(0, "")]
    for line in _heads(registry, files):
        with contextlib.suppress(SignatureError):
            found.append(_verified(dsse.read_envelope(line), trust))
    seq, head = max(found)
    return Signed(seq, head, max(len(entries) - seq, 0))


def _verified(envelope: Mapping[str, Any], trust: Trust) -> tuple[int, str]:
    """Return length and hash of a head that an operator signed, whose key was in force when they say they did."""
    claimed_at = str(dsse.unverified(envelope)["predicate"].get("signed_at"))
    try:
        at = datetime.fromisoformat(claimed_at)
    except ValueError as error:
        raise SignatureError("a head without its time", expected="signed_at", got=claimed_at[:100]) from error
    if at.tzinfo is None:
        raise SignatureError("a head whose time has no zone", got=claimed_at)
    statement, _ = dsse.verify(envelope, trust, at=at, predicate_type=HEAD)
    for signature in envelope["signatures"]:
        _check_operator(trust, signature["keyid"], at)
    seq, digests = statement["predicate"].get("entries"), dsse.subjects_of(statement)
    if not isinstance(seq, int) or seq < 1 or len(digests) != 1:
        raise SignatureError("a head of no log", expected="the number of entries, and one hash", got=seq)
    return seq, digests[0].removeprefix("sha256:")


def _check_operator(trust: Trust, key_id: str, at: datetime) -> None:
    person = trust.person_of(key_id, at)
    if "operator" not in person.roles:
        remedy = "an operator signs the log; `qrlora keys list` shows who is"
        raise SignatureError(
            f"{person.name} may not sign the audit log", expected="operator", got=person.roles, remedy=remedy
        )


def _heads(registry: Registry, files: Iterable[Path]) -> dict[bytes, str]:
    """Return all heads there are, each once, with where it is."""
    with reading(registry.engine) as session:
        rows = session.scalars(select(AuditHeadRow).order_by(AuditHeadRow.seq))
        found = {canonical_json(row.envelope): "the database" for row in rows}
    for path in (registry.folder / FILE, *files):
        if path.exists():
            if path.stat().st_size > MOST_BYTES:
                raise SignatureError(f"{path} is too large", expected=f"{MOST_BYTES:,} bytes at most")
            found |= dict.fromkeys(path.read_bytes().splitlines(), str(path))
    return found


def _append(path: Path, envelope: Mapping[str, Any]) -> None:
    with claimed(path):
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, before + canonical_json(envelope) + b"\n", rescue=False)


def log_trust(registry: Registry, change: str, person: str, key_id: str) -> None:
    """Write to the audit log how the trust file was changed, and what it is now."""
    path = trust_path(registry)
    registry.audit("trust", person, {"change": change, "key_id": key_id, "digest": file_digest(path)})


def _changed_trust(registry: Registry, entries: list[Entry]) -> list[str]:
    """Return a fault if the trust file is not what the log says of its last change."""
    path = trust_path(registry)
    last = next((entry for entry in reversed(entries) if entry.action == "trust"), None)
    wanted = json.loads(last.details).get("digest") if last else None
    got = file_digest(path) if path.exists() else None
    return [] if wanted == got else [f"{path} was changed, and not by `qrlora keys`"]
