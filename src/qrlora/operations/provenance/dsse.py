"""Sign statements, and verify them: in-toto Statement v1 in DSSE envelopes, and the same as sigstore bundles.

envelope = sign(statement(SIGNATURE, [("teapot.safetensors", digest)], {"note": "reviewed"}), key)
found, people = verify(envelope, trust)

DSSE: https://github.com/secure-systems-lab/dsse; statements: https://github.com/in-toto/attestation.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from qrlora._said import said
from qrlora.errors import SignatureError
from qrlora.operations.provenance.algorithms import signature_holds
from qrlora.operations.provenance.canonical import DIGEST, canonical_json
from qrlora.operations.provenance.keys import Person, SigningKey, Trust

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
MOST_BYTES = 4 << 20
"""Largest envelope that is read; a payload, decoded, may have half of that."""
MOST_SIGNATURES, MOST_SUBJECTS, SIGNATURE_BYTES = 16, 10_000, 200


def statement(predicate_type: str, subjects: Iterable[tuple[str, str]], predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return an in-toto statement about (name, `sha256:…`) of each subject.

    Args:
        predicate_type: URI of what is stated; it tells an approval from a signature.
        predicate: JSON of that type.
    """
    named = [{"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}} for name, digest in subjects]
    made = {"_type": STATEMENT, "subject": named, "predicateType": predicate_type, "predicate": dict(predicate)}
    _check_statement(made)
    return made


def subjects_of(found: Mapping[str, Any]) -> list[str]:
    """Return the digests (`sha256:…`) that a statement is about."""
    return [f"sha256:{one['digest']['sha256']}" for one in found["subject"]]


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding, which is what is signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(found: Mapping[str, Any], key: SigningKey) -> dict[str, Any]:
    """Return a DSSE envelope of a statement with one signature."""
    _check_statement(found)
    payload = canonical_json(found)
    if len(payload) > MOST_BYTES // 2:
        raise SignatureError("a statement too long to sign", expected=f"{MOST_BYTES // 2:,} bytes", got=len(payload))
    return {"payload": _b64(payload), "payloadType": PAYLOAD_TYPE, "signatures": [_signature(payload, key)]}


def add_signature(envelope: Mapping[str, Any], key: SigningKey) -> dict[str, Any]:
    """Return the envelope with one signature more. SignatureError if this key has signed it already."""
    payload, signatures = _opened(envelope)
    if any(keyid == key.key_id for keyid, _ in signatures):
        remedy = "a second signature has to be another person's"
        raise SignatureError(f"{key.name} has signed it already", remedy=remedy)
    _parsed(payload)
    return {**envelope, "signatures": [*envelope["signatures"], _signature(payload, key)]}


def verify(
    envelope: Mapping[str, Any], trust: Trust, *, at: datetime | None = None, predicate_type: str | None = None
) -> tuple[dict[str, Any], list[Person]]:
    """Return the statement, and who signed it: each person once, however many keys they signed with.

    Every signature has to hold; one that is unknown, revoked or broken refuses all.

    Args:
        at: when it was signed, as somebody other than the signer wrote it down (the audit log); now if None.
        predicate_type: refuse statements of another type.

    Raises:
        SignatureError: forged, revoked, expired, cut off, of another type, or signed twice with one key.
    """
    payload, signatures = _opened(envelope)
    message, people = pae(PAYLOAD_TYPE, payload), {}
    for keyid, signature in signatures:
        person = trust.person_of(keyid, at)
        if not signature_holds(trust.key(keyid).public, signature, message):
            raise SignatureError(
                said("the signature of %(name)s does not hold", name=person.name),
                expected="what was signed, unchanged",
                got=said("another payload, or a signature by somebody else"),
                remedy="do not use it; get the envelope from its source again",
            )
        people[person.name] = person
    if len({keyid for keyid, _ in signatures}) != len(signatures):
        raise SignatureError("one key has signed twice", expected="one signature of a person")
    found = _parsed(payload)
    if predicate_type is not None and found["predicateType"] != predicate_type:
        raise SignatureError("a statement of another type", expected=predicate_type, got=found["predicateType"])
    return found, list(people.values())


def unverified(envelope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statement of an envelope without verifying it, to find the type to verify it as."""
    return _parsed(_opened(envelope)[0])


def read_envelope(data: bytes) -> dict[str, Any]:
    """Return the JSON of an envelope or a bundle. SignatureError if it is none, or too long."""
    if len(data) > MOST_BYTES:
        raise SignatureError("an envelope too long to read", expected=f"{MOST_BYTES:,} bytes at most", got=len(data))
    return _object(data, "an envelope")


def to_bundles(envelope: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the envelope as sigstore bundles v0.3, one for each signature, as that format wants it.

    They name the key by its id and stand in no transparency log: docs/provenance.md says what that does not prove.
    """
    payload, signatures = _opened(envelope)
    content = {"payload": _b64(payload), "payloadType": PAYLOAD_TYPE}
    return [
        {
            "mediaType": BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": keyid}, "tlogEntries": []},
            "dsseEnvelope": {**content, "signatures": [{"keyid": keyid, "sig": _b64(signature)}]},
        }
        for keyid, signature in signatures
    ]


def from_bundle(bundle: Mapping[str, Any]) -> dict[str, Any]:
    """Return the envelope in a sigstore bundle v0.3. What stands beside it (a log entry, a certificate) is not used."""
    envelope = bundle.get("dsseEnvelope")
    if bundle.get("mediaType") != BUNDLE or not isinstance(envelope, dict):
        got = str(bundle.get("mediaType"))[:100]
        raise SignatureError("no sigstore bundle of a statement", expected=f"{BUNDLE} with dsseEnvelope", got=got)
    return envelope


def _signature(payload: bytes, key: SigningKey) -> dict[str, str]:
    return {"keyid": key.key_id, "sig": _b64(key.sign(pae(PAYLOAD_TYPE, payload)))}


def _opened(envelope: Mapping[str, Any]) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return the payload, and key id and bytes of each signature. SignatureError unless it is an envelope of ours."""
    kind, signatures = envelope.get("payloadType"), envelope.get("signatures")
    if kind != PAYLOAD_TYPE:
        raise SignatureError("an envelope of something else", expected=PAYLOAD_TYPE, got=str(kind)[:100])
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= MOST_SIGNATURES:
        got = len(signatures) if isinstance(signatures, list) else signatures
        raise SignatureError("an envelope without signatures", expected=f"1 to {MOST_SIGNATURES}", got=got)
    found = []
    for one in signatures:
        keyid = one.get("keyid") if isinstance(one, dict) else None
        if not isinstance(keyid, str) or not keyid:
            raise SignatureError("a signature that names no key", expected="keyid and sig")
        found.append((keyid, _bytes(one.get("sig"), SIGNATURE_BYTES, "signature")))
    return _bytes(envelope.get("payload"), MOST_BYTES // 2, "payload"), found


def _parsed(payload: bytes) -> dict[str, Any]:
    found = _object(payload, "a statement")
    _check_statement(found)
    return found


def _check_statement(found: Mapping[str, Any]) -> None:
    subjects = found.get("subject")
    holds = (
        found.get("_type") == STATEMENT
        and isinstance(found.get("predicateType"), str)
        and isinstance(found.get("predicate"), dict)
        and isinstance(subjects, list)
        and 1 <= len(subjects) <= MOST_SUBJECTS
    )
    if not holds:
        expected = f"{STATEMENT} with 1 to {MOST_SUBJECTS:,} subjects, predicateType and predicate"
        raise SignatureError("no in-toto statement", expected=expected, got=sorted(found))
    for one in subjects:  # type: ignore[union-attr]
        digest = one.get("digest") if isinstance(one, dict) else None
        if not isinstance(digest, dict) or not DIGEST.fullmatch(f"sha256:{digest.get('sha256')}"):
            expected = "the SHA-256 of each subject in hexadecimal"
            raise SignatureError("a statement about nothing that can be found again", expected=expected, got=digest)


def _object(data: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object. A key given twice is refused: two readers might each take another of them."""
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise SignatureError(f"{what} that is no JSON", got=(str(error) or "nested too deeply")[:200]) from error
    if not isinstance(found, dict):
        raise SignatureError(f"{what} that is no JSON object", got=type(found).__name__)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: object, most: int, what: str) -> bytes:
    """Decode standard or URL-safe base64, in its one canonical form: else other texts would be the same signature."""
    if not isinstance(text, str) or len(text) > most * 4 // 3 + 4:
        raise SignatureError(f"no {what}", expected=f"base64 of at most {most:,} bytes", got=type(text).__name__)
    standard = text.replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(standard, validate=True)
    except (ValueError, binascii.Error) as error:
        raise SignatureError(f"a {what} that is no base64", got=str(error)[:100]) from error
    if _b64(data) != standard:
        raise SignatureError(f"a {what} in another spelling of base64", expected="its canonical form")
    return data
