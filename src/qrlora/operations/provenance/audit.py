"""Chain the audit log by hashes: each entry's hash covers the entry and the hash before it.

Changing, dropping or reordering entries breaks the chain; dropping the newest ones is found by a signed head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qrlora._said import Said, said
from qrlora.operations.provenance.canonical import canonical_json

GENESIS = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One entry of the log, as it is hashed. `details` is canonical JSON."""

    seq: int
    at: str
    actor: str
    action: str
    subject: str
    details: str
    previous: str
    hash: str


def entry_hash(seq: int, at: str, actor: str, action: str, subject: str, details: str, previous: str) -> str:
    """Return the hexadecimal SHA-256 of an entry and the hash before it."""
    return hashlib.sha256(canonical_json([seq, at, actor, action, subject, details, previous])).hexdigest()


def broken(entries: Iterable[Entry], heads: Sequence[tuple[int, str]] = ()) -> list[Said]:
    """Return what is wrong with the log, one line a fault; empty if nothing is.

    Args:
        entries: in the order of `seq`, from the first.
        heads: length and last hash as they were signed at some time, verified by the caller.
    """
    faults, previous, expected, hashes = list[Said](), GENESIS, 1, {0: GENESIS}
    for entry in entries:
        if entry.seq != expected:
            faults.append(
                said(
                    "entry %(expected)s is missing, or out of order: entry %(seq)s stands in its place",
                    expected=expected,
                    seq=entry.seq,
                )
            )
        if entry.previous != previous:
            faults.append(said("entry %(seq)s does not follow the entry before it", seq=entry.seq))
        fields = (entry.seq, entry.at, entry.actor, entry.action, entry.subject, entry.details, entry.previous)
        if entry_hash(*fields) != entry.hash:
            faults.append(said("entry %(seq)s was changed", seq=entry.seq))
        previous, expected = entry.hash, entry.seq + 1
        hashes[entry.seq] = entry.hash
    faults += [
        said("the signed head at entry %(seq)s is not in the log", seq=seq)
        for seq, head in heads
        if hashes.get(seq) != head
    ]
    return faults
