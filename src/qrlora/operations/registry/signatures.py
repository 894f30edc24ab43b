"""Sign registered artifacts, and verify who signed them.

A signature is an artifact of its own (kind `signature`, the DSSE envelope), with an edge `signed_by` to it from what
it signs. It is judged as of the time at which the audit log has it, which no signer can choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from qrlora.errors import QrloraError, SignatureError
from qrlora.operations.provenance import dsse
from qrlora.operations.provenance.canonical import canonical_json
from qrlora.operations.provenance.keys import Person, SigningKey, Trust
from qrlora.operations.registry.records import Artifact, Link
from qrlora.operations.registry.registry import Registry

SIGNATURE = "urn:qrlora:signature:v1"
"""Predicate type: "I answer for these bytes", with a note."""


@dataclass(frozen=True)
class Signed:
    """Somebody's signature of an artifact, and when it came into the registry."""

    person: Person
    at: datetime
    note: str


def trust_path(registry: Registry) -> Path:
    """Return where the registry's list of trusted people is."""
    return registry.folder / "trust.json"


def trust_of(registry: Registry) -> Trust:
    """Return whom the registry trusts to sign as what."""
    return Trust.load(trust_path(registry))


def sign_artifact(registry: Registry, artifact: Artifact, key: SigningKey, note: str = "") -> Artifact:
    """Sign an artifact's digest, and add the signature to the registry. RegistryError if its bytes have changed."""
    if artifact.stored:
        registry.path(artifact)
    made = dsse.statement(SIGNATURE, [(artifact.title, artifact.digest)], {"kind": artifact.kind, "note": note})
    envelope = dsse.sign(made, key)
    facts = {"subject": artifact.digest, "key_id": key.key_id, "note": note}
    added = registry.add(canonical_json(envelope), "signature", filename="signature.dsse.json", facts=facts)
    registry.link(artifact.digest, Link("signed_by", added.digest))
    return added


def verify_artifact(registry: Registry, artifact: Artifact, trust: Trust) -> list[Signed]:
    """Return who signed an artifact; nobody is an empty list. Its bytes are hashed again, where the registry has them.

    Raises:
        SignatureError: a signature is forged, revoked, of something else, or was made when its key was not valid.
        RegistryError: the bytes, of the artifact or a signature, are missing or changed.
    """
    found, faults = signatures_of(registry, artifact, trust)
    for fault in faults:
        raise fault
    return found


def signatures_of(registry: Registry, artifact: Artifact, trust: Trust) -> tuple[list[Signed], list[QrloraError]]:
    """Return the signatures that hold, and what is wrong with each other one: a bad one takes no good one away.

    Raises:
        RegistryError: the bytes of the artifact are missing or changed.
    """
    if artifact.stored:
        registry.path(artifact)
    found, faults = list[Signed](), list[QrloraError]()
    for edge in registry.edges(artifact.digest, relation="signed_by"):
        try:
            found += _signed(registry, artifact, edge.target, trust)
        except QrloraError as error:
            faults.append(error)
    return found, faults


def _signed(registry: Registry, artifact: Artifact, signature: str, trust: Trust) -> list[Signed]:
    envelope, at = dsse.read_envelope(registry.read(signature)), registry.added_at(signature)
    statement, people = dsse.verify(envelope, trust, at=at, predicate_type=SIGNATURE)
    if dsse.subjects_of(statement) != [artifact.digest]:
        got = dsse.subjects_of(statement)
        raise SignatureError(f"a signature of something else stands at {artifact.title}", got=got)
    return [Signed(person, at, str(statement["predicate"].get("note", ""))) for person in people]
