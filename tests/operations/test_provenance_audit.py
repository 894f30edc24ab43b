"""The audit log under the hands of somebody who edits the database, and the commands around keys."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from qrlora.apps.cli import main
from qrlora.errors import RegistryError, SignatureError
from qrlora.operations.provenance import dsse
from qrlora.operations.provenance.audit import GENESIS, entry_hash
from qrlora.operations.provenance.canonical import canonical_json
from qrlora.operations.provenance.keys import SigningKey, Trust, now
from qrlora.operations.registry import Link, Registry
from qrlora.operations.registry.heads import FILE, HEAD, faults_of, sign_head
from qrlora.operations.registry.signatures import SIGNATURE, sign_artifact, verify_artifact


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A registry of six entries, whose head olga, an operator, has signed; then two entries more."""
    folder = tmp_path / "company"
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("QRLORA_REGISTRY", str(folder))
    with contextlib.closing(Registry.open(folder, actor="ada")) as registry:
        for i in range(4):
            registry.add(b"adapter %d" % i, "adapter", name=f"teapot-{i}")
    for name, role in (("olga", "operator"), ("rita", "reviewer")):
        assert main(["keys", "new", name]) == 0
        assert main(["keys", "trust", name, "--key", name, "--role", role]) == 0
    assert main(["audit", "sign", "--key", "olga"]) == 0
    with contextlib.closing(Registry.open(folder, actor="ada")) as registry:
        registry.add(b"adapter 5", "adapter")
        registry.add(b"adapter 6", "adapter")
    assert main(["audit", "verify"]) == 0
    assert "8 entries, 0 faults; signed up to entry 6" in capsys.readouterr().out
    return folder


def edit(folder: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "registry.db")) as database, database:
        for statement in statements:
            database.execute(statement)


def rewritten(folder: Path, change: Callable[[list[list[object]]], list[list[object]]]) -> None:
    """Edit the log as somebody who knows the chain: all hashes are computed anew."""
    with contextlib.closing(sqlite3.connect(folder / "registry.db")) as database, database:
        rows = [
            list(row) for row in database.execute("SELECT seq,at,actor,action,subject,details FROM audit ORDER BY seq")
        ]
        database.execute("DELETE FROM audit")
        previous = GENESIS
        for seq, (_, *fields) in enumerate(change(rows), 1):
            hashed = entry_hash(seq, *fields, previous)
            database.execute("INSERT INTO audit VALUES (?,?,?,?,?,?,?,?)", (seq, *fields, previous, hashed))
            previous = hashed


SWAP = [
    "UPDATE audit SET seq = 99 WHERE seq = 2",
    "UPDATE audit SET seq = 2 WHERE seq = 3",
    "UPDATE audit SET seq = 3 WHERE seq = 99",
]


@pytest.mark.parametrize(
    ("statements", "fault"),
    [
        (["UPDATE audit SET actor = 'adb' WHERE seq = 3"], "entry 3 was changed"),
        (["UPDATE audit SET details = replace(details, 'adapter', 'adaptes') WHERE seq = 1"], "entry 1 was changed"),
        (["UPDATE audit SET at = replace(at, '+00:00', '+00:01') WHERE seq = 8"], "entry 8 was changed"),
        (["UPDATE audit SET hash = '0' || substr(hash, 2) || 'x' WHERE seq = 8"], "entry 8 was changed"),
        (["DELETE FROM audit WHERE seq = 4"], "entry 4 is missing"),
        (["DELETE FROM audit WHERE seq = 1"], "entry 1 is missing"),
        (SWAP, "entry 2 does not follow"),
        (["DELETE FROM audit WHERE seq > 5"], "the signed head at entry 6 is not in the log"),
        (["DELETE FROM audit"], "the signed head at entry 6 is not in the log"),
        (["DELETE FROM audit WHERE seq > 5", "DELETE FROM audit_head"], "the signed head at entry 6"),
    ],
    ids=["actor", "details", "time", "hash", "dropped", "first dropped", "reordered", "cut", "emptied", "heads too"],
)
def test_each_edit_is_found(place: Path, statements: list[str], fault: str, capsys: pytest.CaptureFixture[str]):
    edit(place, *statements)
    for command in ("audit", "registry"):
        assert main([command, "verify"]) == 1
        assert fault in capsys.readouterr().out
    assert main(["audit", "sign", "--key", "olga"]) == 2  # and nobody signs what is broken
    assert "before you sign" in capsys.readouterr().err


def test_every_byte_of_an_entry(place: Path):
    """Every character of one row's texts, changed on a real database."""
    with contextlib.closing(Registry.open(place)) as registry:
        trust, entry = Trust.load(place / "trust.json"), registry.log()[2]
        with contextlib.closing(sqlite3.connect(place / "registry.db", isolation_level=None)) as database:
            for column in ("actor", "action", "details", "previous", "hash"):
                text = getattr(entry, column)
                for i in range(0, len(text), 7):
                    changed = text[:i] + chr(ord(text[i]) ^ 1) + text[i + 1 :]
                    database.execute(f"UPDATE audit SET {column} = ? WHERE seq = 3", (changed,))
                    assert any("entry 3" in fault or "entry 4" in fault for fault in faults_of(registry, trust))
                database.execute(f"UPDATE audit SET {column} = ? WHERE seq = 3", (text,))
        assert faults_of(registry, trust) == []


@pytest.mark.parametrize("change", [lambda rows: rows[1:], lambda rows: [*rows[:2], *rows[3:]], lambda rows: rows[:5]])
def test_a_log_written_anew_does_not_meet_its_signed_head(place: Path, change: Callable, tmp_path: Path):
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes((place / FILE).read_bytes())
    rewritten(place, change)
    assert main(["audit", "verify"]) == 1
    edit(place, "DELETE FROM audit_head")
    (place / FILE).unlink()  # all that is in the folder is under the same hands
    with contextlib.closing(Registry.open(place)) as registry:
        trust = Trust.load(place / "trust.json")
        assert not any("signed head" in fault for fault in faults_of(registry, trust))
        assert any("signed head at entry 6" in fault for fault in faults_of(registry, trust, [copy]))


def test_heads_that_are_not_genuine(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["audit", "sign", "--key", "rita"]) == 2
    assert "rita may not sign the audit log" in capsys.readouterr().err
    stranger = SigningKey.create(tmp_path, "stranger")
    said = {"entries": 3, "signed_at": now().isoformat()}
    heads = {
        "nobody's": dsse.sign(dsse.statement(HEAD, [("audit log", "ab" * 32)], said), stranger),
        "may not sign": dsse.sign(dsse.statement(HEAD, [("audit log", "ab" * 32)], said), SigningKey.load("rita")),
        "another type": dsse.sign(dsse.statement(SIGNATURE, [("x", "ab" * 32)], said), SigningKey.load("olga")),
        "its time": dsse.sign(dsse.statement(HEAD, [("x", "ab" * 32)], {"entries": 3}), SigningKey.load("olga")),
    }
    for fault, envelope in heads.items():
        (tmp_path / "heads").write_bytes(canonical_json(envelope) + b"\n")
        assert main(["audit", "verify", "--heads", str(tmp_path / "heads")]) == 1
        assert fault in capsys.readouterr().out
    (tmp_path / "heads").write_bytes((place / FILE).read_bytes()[:-40])
    assert main(["audit", "verify", "--heads", str(tmp_path / "heads")]) == 1
    assert "not genuine" in capsys.readouterr().out


def test_a_trust_file_changed_by_hand(place: Path, capsys: pytest.CaptureFixture[str]):
    path = place / "trust.json"
    path.write_text(path.read_text().replace('"reviewer"', '"operator"'))
    assert main(["audit", "verify"]) == 1
    assert "was changed, and not by `qrlora keys`" in capsys.readouterr().out
    assert main(["registry", "verify"]) == 1 and "not by `qrlora keys`" in capsys.readouterr().out
    path.write_text("nobody")
    assert main(["registry", "verify"]) == 1 and "no list of trusted people" in capsys.readouterr().out


def test_signatures_of_artifacts(place: Path, capsys: pytest.CaptureFixture[str]):
    name = "registry:teapot-1"
    assert main(["keys", "verify", name]) == 1
    assert main(["keys", "sign", name, "--key", "rita", "--note", "looked at 40 pictures"]) == 0
    capsys.readouterr()
    assert main(["keys", "verify", name]) == 0
    assert "signed by rita (reviewer)" in (said := capsys.readouterr().out) and "40 pictures" in said
    assert main(["audit", "verify"]) == 0
    with contextlib.closing(Registry.open(place)) as registry:
        trust, artifact = Trust.load(place / "trust.json"), registry.get(name)
        [edge] = registry.edges(artifact.digest, relation="signed_by")
        other = registry.get("registry:teapot-2")
        registry.link(other.digest, Link("signed_by", edge.target))  # replayed for another adapter
        with pytest.raises(SignatureError, match="signature of something else"):
            verify_artifact(registry, other, trust)
        stranger = registry.get("registry:teapot-3")
        sign_artifact(registry, stranger, SigningKey.create(place, "stranger"))
        with pytest.raises(SignatureError, match="nobody's"):
            verify_artifact(registry, stranger, trust)
        path = registry.path(artifact)
        path.chmod(0o644)
        path.write_bytes(b"adapter x")
        with pytest.raises(RegistryError, match="not what was registered"):
            verify_artifact(registry, artifact, trust)


def test_rotation_and_revocation_of_a_signer(place: Path, capsys: pytest.CaptureFixture[str]):
    name = "registry:teapot-1"
    assert main(["keys", "sign", name, "--key", "rita"]) == 0
    assert main(["keys", "new", "rita-2"]) == 0
    assert main(["keys", "rotate", "rita", "--key", "rita-2"]) == 0
    assert main(["keys", "verify", name]) == 0  # signed before
    assert main(["keys", "sign", "registry:teapot-2", "--key", "rita"]) == 2
    assert "expired" in capsys.readouterr().err
    old = SigningKey.load("rita").key_id
    assert main(["keys", "revoke", old[:12], "--reason", "laptop stolen"]) == 0
    assert main(["keys", "verify", name]) == 2
    assert "laptop stolen" in capsys.readouterr().err
    assert main(["keys", "revoke", "nobody", "--reason", "x"]) == 2
    assert main(["keys", "revoke", "0" * 12, "--reason", "x"]) == 2
    assert main(["keys", "revoke", "rita-2", "--reason", "x", "--since", "2030-01-01"]) == 0
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert "revoked on" in listed and "rita-2: your key" in listed and "olga: operator" in listed
    assert main(["audit", "verify"]) == 0


def test_signatures_of_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "teapot.safetensors"
    path.write_bytes(b"weights")
    assert main(["keys", "verify", str(path)]) == 1
    assert main(["keys", "sign", str(path), "--key", "rita", "--bundle"]) == 0
    assert main(["keys", "verify", str(path)]) == 0
    bundle = path.with_name("teapot.safetensors.sigstore.json")
    assert json.loads(bundle.read_text())["mediaType"].endswith("v0.3+json")
    assert main(["keys", "sign", str(path), "--key", "rita", "--bundle"]) == 2  # never replaced
    assert main(["keys", "sign", str(path), "--key", "rita"]) == 0
    assert main(["keys", "verify", str(path)]) == 0
    path.write_bytes(b"weighty")
    capsys.readouterr()
    assert main(["keys", "verify", str(path)]) == 2
    assert "is no signature of" in capsys.readouterr().err


def test_a_head_is_signed_by_its_length_and_hash(place: Path):
    with contextlib.closing(Registry.open(place)) as registry:
        seq, head = sign_head(registry, SigningKey.load("olga"), Trust.load(place / "trust.json"))
        assert (seq, head) == (8, registry.log()[-1].hash)
    assert len((place / FILE).read_bytes().splitlines()) == 2
