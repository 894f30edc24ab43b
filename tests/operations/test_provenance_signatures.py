"""Keys, trust and signed statements: what is forged, replayed, cut, reordered, revoked or expired is refused."""

from __future__ import annotations

import base64
import json
import re
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from sigstore_models.bundle.v1 import Bundle

from qrlora.errors import SignatureError
from qrlora.operations.provenance.algorithms import read_public, signature_holds
from qrlora.operations.provenance.dsse import (
    PAYLOAD_TYPE,
    add_signature,
    from_bundle,
    pae,
    read_envelope,
    sign,
    statement,
    subjects_of,
    to_bundles,
    verify,
)
from qrlora.operations.provenance.keys import SigningKey, Trust, changing, key_path

DIGEST = "sha256:" + "ab" * 32
KIND = "urn:qrlora:test/v1"
NOW = datetime(2026, 6, 1, tzinfo=timezone.utc)
DAY = timedelta(days=1)
PEM, PKCS8, PLAIN = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@pytest.fixture
def ada(tmp_path: Path) -> SigningKey:
    return SigningKey.create(tmp_path / "keys", "ada")


@pytest.fixture
def ben(tmp_path: Path) -> SigningKey:
    return SigningKey.create(tmp_path / "keys", "ben", "ecdsa-p256")


@pytest.fixture
def trust(ada: SigningKey, ben: SigningKey) -> Trust:
    trust = Trust()
    trust.add("Ada", ["author"], ada.public_pem, valid_from=NOW - 30 * DAY)
    trust.add("Ben", ["reviewer"], ben.public_pem, valid_from=NOW - 30 * DAY)
    return trust


def signed(key: SigningKey, **predicate: object) -> dict[str, object]:
    return sign(statement(KIND, [("teapot", DIGEST)], predicate), key)


def names(envelope: dict[str, object], trust: Trust, at: datetime = NOW) -> list[str]:
    return [person.name for person in verify(envelope, trust, at=at)[1]]


def test_the_encoding_and_a_signature_of_the_specification():
    """The vector of DSSE's protocol.md, whose signature is r and s side by side."""
    message = pae("http://example.com/HelloWorld", b"hello world")
    assert message == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("é", b"\0\xff") == b"DSSEv1 2 \xc3\xa9 2 \0\xff"  # lengths in bytes
    x = 46950820868899156662930047687818585632848591499744589407958293238635476079160
    y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
    raw = base64.b64decode("A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA==")
    signature = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    assert signature_holds(key, signature, message)
    assert not signature_holds(key, signature, message + b" ")


@pytest.mark.parametrize("algorithm", ["ed25519", "ecdsa-p256"])
def test_a_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path, algorithm: str):
    key = SigningKey.create(tmp_path, "ada", algorithm)
    path = tmp_path / "ada.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = SigningKey.load(path)
    assert (loaded.key_id, loaded.algorithm, loaded.name) == (key.key_id, algorithm, "ada")
    assert signature_holds(read_public((tmp_path / "ada.pub").read_text()), loaded.sign(b"x"), b"x")
    before = path.read_bytes()
    with pytest.raises(SignatureError, match="already there"):
        SigningKey.create(tmp_path, "ada", algorithm)
    assert path.read_bytes() == before
    path.chmod(0o640)
    with pytest.raises(SignatureError, match="chmod 600"):
        SigningKey.load(path)


def test_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path))
    key = SigningKey.create(None, "ada", passphrase="corréct")
    assert b"ENCRYPTED" in (tmp_path / "ada.pem").read_bytes()
    with pytest.raises(SignatureError, match="needs its passphrase"):
        SigningKey.load("ada")
    with pytest.raises(SignatureError, match="cannot be read"):
        SigningKey.load("ada", "wrong")
    monkeypatch.setenv("QRLORA_KEY_PASSPHRASE", "corréct")
    assert SigningKey.load("ada").key_id == key.key_id
    plain = SigningKey.create(None, "ben")
    assert SigningKey.load("ben").key_id == plain.key_id  # the passphrase is another key's


@pytest.mark.parametrize("name", ["../ada", "a/b", "", ".ssh", "a..b", "a" * 65])
def test_names_that_leave_the_folder(tmp_path: Path, name: str):
    with pytest.raises(SignatureError, match="cannot be a key's name"):
        SigningKey.create(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


def test_a_key_by_its_name_is_none_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A page takes names alone: a path from a browser would open files of the server."""
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    SigningKey.create(None, "ada")
    SigningKey.create(tmp_path, "ben")
    assert SigningKey.load(key_path("ada")).name == "ada"
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "ben.pem"), "ben.pem", "ben"):
        with pytest.raises(SignatureError):
            key_path(name)
    with pytest.raises(SignatureError, match=r"no private key of this name on this machine\n  expected: ada"):
        SigningKey.load("ben")


def test_keys_of_other_algorithms(tmp_path: Path):
    for private in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        path = tmp_path / "other.pem"
        path.write_bytes(private.private_bytes(PEM, PKCS8, PLAIN))
        path.chmod(0o600)
        with pytest.raises(SignatureError, match="another kind"):
            SigningKey.load(path)
        public = private.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(SignatureError, match="no key of an algorithm"):
            Trust().add("Eve", ["author"], public.decode())


def test_two_people_sign_in_any_order(ada: SigningKey, ben: SigningKey, trust: Trust):
    envelope = add_signature(signed(ada, note="é"), ben)
    found, people = verify(envelope, trust, at=NOW, predicate_type=KIND)
    assert [(person.name, person.roles) for person in people] == [("Ada", ("author",)), ("Ben", ("reviewer",))]
    assert found["predicate"] == {"note": "é"} and subjects_of(found) == [DIGEST]
    turned = {**envelope, "signatures": envelope["signatures"][::-1]}
    assert names(turned, trust) == ["Ben", "Ada"]
    assert names(read_envelope(json.dumps(envelope).encode()), trust) == ["Ada", "Ben"]


def test_one_person_does_not_count_twice(ada: SigningKey, trust: Trust, tmp_path: Path):
    envelope = signed(ada)
    with pytest.raises(SignatureError, match="signed it already"):
        add_signature(envelope, ada)
    with pytest.raises(SignatureError, match="one key has signed twice"):
        verify({**envelope, "signatures": envelope["signatures"] * 2}, trust, at=NOW)
    second = SigningKey.create(tmp_path, "second")
    trust.add("Ada", ["author"], second.public_pem, valid_from=NOW - DAY)
    assert names(add_signature(envelope, second), trust) == ["Ada"]
    with pytest.raises(SignatureError, match="Ada's already"):
        trust.add("Eve", ["reviewer"], ada.public_pem)


def test_forged_and_wrong_person(ada: SigningKey, ben: SigningKey, trust: Trust, tmp_path: Path):
    eve = SigningKey.create(tmp_path, "eve")
    with pytest.raises(SignatureError, match="nobody's"):
        verify(signed(eve), trust, at=NOW)
    with pytest.raises(SignatureError, match="nobody's"):  # and beside one that holds
        verify(add_signature(signed(ada), eve), trust, at=NOW)
    for forger in (eve, ben):  # signed by one, said to be by Ada: another algorithm too
        forged = signed(forger)
        forged["signatures"][0]["keyid"] = ada.key_id
        with pytest.raises(SignatureError, match="does not hold"):
            verify(forged, trust, at=NOW)


def test_a_signature_of_another_statement_is_no_signature_of_this_one(ada: SigningKey, trust: Trust):
    one, other = signed(ada, weight=1), signed(ada, weight=2)
    with pytest.raises(SignatureError, match="does not hold"):
        verify({**one, "payload": other["payload"]}, trust, at=NOW)
    with pytest.raises(SignatureError, match="another type"):
        verify(one, trust, at=NOW, predicate_type="urn:qrlora:approval/v1")
    raw = ada.sign(base64.b64decode(one["payload"]))  # signed without the type that PAE binds to it
    with pytest.raises(SignatureError, match="does not hold"):
        naked = {"keyid": ada.key_id, "sig": base64.b64encode(raw).decode()}
        verify({**one, "signatures": [naked]}, trust, at=NOW)


def test_every_changed_byte_is_refused(ben: SigningKey, ada: SigningKey, trust: Trust):
    """Each byte of the JSON changed in one bit, and dropped; and the text cut off at each."""
    for key in (ada, ben):
        data = json.dumps(signed(key), separators=(",", ":")).encode()
        assert _holds(data, trust)
        changed = [bytes((*data[:i], data[i] ^ 1 << i % 8, *data[i + 1 :])) for i in range(len(data))]
        changed += [data[:i] + data[i + 1 :] for i in range(len(data))] + [data[:i] for i in range(len(data))]
        assert [one for one in changed if _holds(one, trust)] == []


def _holds(data: bytes, trust: Trust) -> bool:
    try:
        verify(read_envelope(data), trust, at=NOW)
    except SignatureError:
        return False
    return True


def test_each_byte_of_the_payload_and_the_signature(ada: SigningKey, trust: Trust):
    envelope = signed(ada)
    payload = base64.b64decode(envelope["payload"])
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    for i in range(len(payload)):
        other = bytes((*payload[:i], payload[i] ^ 1 << i % 8, *payload[i + 1 :]))
        with pytest.raises(SignatureError, match="does not hold"):
            verify({**envelope, "payload": base64.b64encode(other).decode()}, trust, at=NOW)
    for i in range(len(signature)):
        other = bytes((*signature[:i], signature[i] ^ 1, *signature[i + 1 :]))
        changed = {"keyid": ada.key_id, "sig": base64.b64encode(other).decode()}
        with pytest.raises(SignatureError, match="does not hold"):
            verify({**envelope, "signatures": [changed]}, trust, at=NOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payloadType": "application/json"}, PAYLOAD_TYPE),
        ({"payloadType": None}, PAYLOAD_TYPE),
        ({"signatures": []}, "without signatures"),
        ({"signatures": "x"}, "without signatures"),
        ({"signatures": [{"keyid": "x", "sig": ""}] * 17}, "without signatures"),
        ({"signatures": [{"sig": "AAAA"}]}, "names no key"),
        ({"signatures": ["AAAA"]}, "names no key"),
        ({"signatures": [{"keyid": "x", "sig": "A" * 400}]}, "no signature"),
        ({"payload": 5}, "no payload"),
        ({"payload": "a"}, "no base64"),
        ({"payload": "A" * (6 << 20)}, "no payload"),
    ],
)
def test_envelopes_that_are_none(ada: SigningKey, trust: Trust, change: dict[str, object], message: str):
    with pytest.raises(SignatureError, match=re.escape(message)):
        verify({**signed(ada), **change}, trust, at=NOW)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"\xff", b"{" * 100_000, b"[" * 100_000, b'{"a":1,"a":2}', b'{"a":NaN}', b" " * (5 << 20)],
    ids=["empty", "a list", "no text", "braces", "deep", "a key twice", "NaN", "too long"],
)
def test_texts_that_are_no_envelope(data: bytes):
    with pytest.raises(SignatureError):
        read_envelope(data)


def test_statements_about_nothing(ada: SigningKey):
    with pytest.raises(SignatureError, match="subjects"):
        statement(KIND, [], {})
    with pytest.raises(SignatureError, match="nothing that can be found again"):
        statement(KIND, [("x", "sha256:12")], {})
    with pytest.raises(SignatureError, match="no in-toto statement"):
        sign({"_type": "https://in-toto.io/Statement/v0.1", "subject": [], "predicateType": KIND, "predicate": {}}, ada)


def test_a_revoked_key(ada: SigningKey, trust: Trust):
    """All it ever signed is void, because a thief dates as they like; unless an operator knows since when."""
    envelope = signed(ada)
    trust.revoke(ada.key_id, "laptop stolen", since=NOW - DAY)
    assert names(envelope, trust, NOW - 2 * DAY) == ["Ada"]
    with pytest.raises(SignatureError, match="laptop stolen"):
        verify(envelope, trust, at=NOW)
    with pytest.raises(SignatureError, match="needs a reason"):
        trust.revoke(ada.key_id, " ")
    trust.revoke(ada.key_id, "since when, nobody knows")
    with pytest.raises(SignatureError, match="nobody knows"):
        verify(envelope, trust, at=NOW - 20 * DAY)
    trust.revoke(ada.key_id, "again", since=NOW)  # never lets more through than before
    with pytest.raises(SignatureError, match="revoked"):
        verify(envelope, trust, at=NOW - 20 * DAY)


def test_a_key_expires_and_is_rotated(ada: SigningKey, trust: Trust, tmp_path: Path):
    envelope, later = signed(ada), SigningKey.create(tmp_path, "later")
    trust.rotate("Ada", later.public_pem, at=NOW)
    assert names(envelope, trust, NOW - DAY) == ["Ada"]  # as it was then
    with pytest.raises(SignatureError, match="expired"):
        verify(envelope, trust, at=NOW)
    assert names(signed(later), trust, NOW) == ["Ada"]
    with pytest.raises(SignatureError, match="not valid before"):
        verify(signed(later), trust, at=NOW - DAY)
    with pytest.raises(SignatureError, match="nobody trusted"):
        trust.rotate("Eve", SigningKey.create(tmp_path, "eve").public_pem)
    with pytest.raises(SignatureError, match="never valid"):
        trust.add("Eve", ["author"], SigningKey.create(tmp_path, "eva").public_pem, valid_from=NOW, valid_until=NOW)


def test_the_trust_file(tmp_path: Path, ada: SigningKey, trust: Trust):
    path = tmp_path / "registry" / "trust.json"
    assert Trust.load(path).people == {}
    with changing(path) as written:
        written.people.update(trust.people)
        written.revoke(ada.key_id, "left")
    assert Trust.load(path).people == written.people
    text = path.read_text()
    other = SigningKey.create(tmp_path, "other").public_pem
    changes = {
        "a key under another id": json.loads(text.replace(ada.key_id, "0" * 64)),
        "another key under this id": json.loads(text.replace(json.dumps(ada.public_pem), json.dumps(other))),
        "an unknown field": {**json.loads(text), "all": True},
        "somebody twice": {"people": json.loads(text)["people"] * 2},
        "half a revocation": json.loads(text.replace('"revoked_at"', '"valid_until"')),
        "a role that is none": json.loads(text.replace('"author"', '"god"')),
        "a later version": {**json.loads(text), "version": 2},
    }
    for change, content in changes.items():
        path.write_text(json.dumps(content))
        with pytest.raises(SignatureError):
            Trust.load(path)
            pytest.fail(change)
    path.write_text(text[:-20])
    with pytest.raises(SignatureError, match="restore it"):
        Trust.load(path)


def test_people_who_cannot_be():
    key = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    with pytest.raises(SignatureError, match="no public key"):
        Trust().add("Ada", ["author"], key)


def test_roles_and_names(tmp_path: Path):
    key, trust = SigningKey.create(tmp_path, "x"), Trust()
    for name, roles in [("Ada", ["god"]), ("Ada", []), ("", ["author"]), ("a\nb", ["author"]), (" Ada", ["author"])]:
        with pytest.raises(SignatureError):
            trust.add(name, roles, key.public_pem)
    assert trust.people == {}


def test_bundles_are_what_sigstore_reads(ada: SigningKey, ben: SigningKey, trust: Trust):
    envelope = add_signature(signed(ada), ben)
    for bundle, key in zip(to_bundles(envelope), (ada, ben), strict=True):
        read = Bundle.from_json(json.dumps(bundle))
        assert read.verification_material.public_key.hint == key.key_id
        [signature] = read.dsse_envelope.signatures
        assert signature_holds(
            key.public, signature.sig, pae(read.dsse_envelope.payload_type, read.dsse_envelope.payload)
        )
        again = from_bundle(json.loads(read.to_json()))
        assert [person.key_id for person in trust.people["Ada"].keys] and len(verify(again, trust, at=NOW)[1]) == 1
    with pytest.raises(SignatureError, match="no sigstore bundle"):
        from_bundle(envelope)
