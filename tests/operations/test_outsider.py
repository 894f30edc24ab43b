"""What an outsider tries, by the commands that they would type, against a small company with real adapters.

Held elsewhere: members of bundles that leave their folder, links in them, and all that a bundle may lie about
(test_registry); forged and replayed approvals, by each field (test_policy_approval); edited, dropped and reordered rows
of the audit log, signed heads, a trust file changed by hand (test_provenance_audit); each changed place of a marked
picture (test_provenance_pictures); products and styles that are called like paths (test_catalog); the server's
allow-list (test_policy_serve).
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path

import httpx2
import pytest

import catalogs
from qrlora.apps.cli import main
from qrlora.operations.provenance.c2pa import read
from qrlora.operations.provenance.canonical import digest_of, file_digest
from qrlora.operations.provenance.certificates import own_roots
from qrlora.operations.registry import Link, Registry

PEOPLE = {"grace": "reviewer", "olga": "operator"}
POLICY = 'name = "acme"\nversion = {}\n[combine]\nroles = {}\n[approval]\nactions = ["generate"]\n'
STRICT, LAX = '[["subject", "style"]]', '[["subject"], ["style"], ["subject", "style"]]'
PARTS = ["--adapter", "registry:p0:0.9", "--adapter", "registry:s0:0.8", "--null-space", "0.5"]


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


@contextmanager
def acting(folder: Path, actor: str) -> Iterator[None]:
    """The environment of somebody with this folder's registry, and the company's keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRLORA_ACTOR", actor)
        patch.setenv("QRLORA_REGISTRY", str(folder / "registry"))
        patch.setenv("QRLORA_KEYS", str(folder / "keys"))
        yield


def opened(folder: Path) -> closing[Registry]:
    return closing(Registry.open(folder / "registry"))


def requested(folder: Path, *parts: str) -> str:
    """The digest of a request for the approval of these."""
    run("approval", "request", *parts)
    with opened(folder) as registry:
        return next(
            one.digest for one in registry.search(kind="approval") if one.facts.get("type") == "approval-request"
        )


@pytest.fixture(scope="module")
def made(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a base model, adapters, people, a policy of version 2 and one approval."""
    folder = tmp_path_factory.mktemp("acme")
    catalogs.adapters(tiny_sd3, folder, 2, 2)
    with acting(folder, "ada"):
        for name, role in PEOPLE.items():
            run("keys", "new", name)
            run("keys", "trust", name, "--key", name, "--role", role)
        run("keys", "certificate", "acme", "--organisation", "ACME")
        run("registry", "add", tiny_sd3, "--kind", "base", "--name", "tiny", "--licence", "Apache-2.0")
        for name in ("p0", "p1", "s0", "s1"):
            run("registry", "add", folder / f"{name}.safetensors", "--name", name, "--base", "registry:tiny")
        (folder / "policy.toml").write_text(POLICY.format(2, STRICT))
        run("policy", "activate", folder / "policy.toml")
        run("approval", "approve", requested(folder, *PARTS), "--key", "grace")
    return folder


@pytest.fixture
def acme(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, in which things may be broken."""
    shutil.copytree(made, tmp_path / "acme")
    monkeypatch.chdir(tmp_path)
    with acting(tmp_path / "acme", "mallory"):
        yield tmp_path / "acme"


def generate(acme: Path, model: Path, *words: object) -> int:
    sampling = ["--model", model, "--prompt", "a cup", "--seed", "1", "--steps", "1", "--resolution", "32"]
    return main(
        [str(word) for word in ("generate", *sampling, *words, "-o", "out.png", "--registry", acme / "registry")]
    )


def test_what_is_approved_is_made_and_says_so(acme: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(acme, tiny_sd3, *PARTS, "--c2pa", "acme") == 0, capsys.readouterr().err
    with opened(acme) as registry:
        (edge,) = registry.edges(file_digest(Path("out.png")), relation="generated_by")
    capsys.readouterr()
    run("who-made", "out.png", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["c2pa"]["state"] == "valid" and told["c2pa"]["origin"]["composition"] == edge.target
    content = Path("out.png").read_bytes()
    start = content.index(b"iTXt")
    end = start + 4 + int.from_bytes(content[start - 4 : start], "big")
    text = content[start:end].replace(b"a cup", b"a mug")
    Path("edited.png").write_bytes(content[:start] + text + zlib.crc32(text).to_bytes(4, "big") + content[end + 4 :])
    main(["who-made", "edited.png"])
    assert "changed after it was signed by" in capsys.readouterr().out


def listed(port: int) -> str:
    found = httpx2.get(f"http://127.0.0.1:{port}/v1/models", timeout=30).json()["data"]
    return min((str(one["id"]) for one in found), key=len)


def test_what_is_served_is_marked_before_it_is_recorded(acme: Path, tiny_sd3: Path) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--adapter", "registry:p0", "--adapter", "registry:s0", "--registry", acme / "registry", "--record"]
    command = ["-m", "qrlora", "serve", *words, "--c2pa", "acme", "--model", tiny_sd3, "--port", port, "--threads", 1]
    server = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout and any(line.startswith("ready") for line in server.stdout)
        model = f"{listed(port)}+p0:0.9+s0:0.8"
        asked = {"prompt": "a cup", "model": model, "size": "32x32", "steps": 1}
        answer = httpx2.post(f"http://127.0.0.1:{port}/v1/images/generations", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        png = base64.b64decode(answer.json()["data"][0]["b64_json"])
    finally:
        server.terminate()
        server.communicate(timeout=30)
    with opened(acme) as registry:
        (edge,) = registry.edges(digest_of(png), relation="generated_by")
        approved = registry.edges(edge.target, relation="approved_by")
    manifest = read(png, own_roots())
    assert (manifest.state, manifest.origin["composition"]) == ("valid", edge.target) and approved
    assert [name for name, _ in manifest.ingredients] == ["p0.safetensors", "s0.safetensors", str(tiny_sd3)]


def weight(_: Path) -> list[str]:
    return [word.replace("0.9", "0.91") for word in PARTS]


def other_strength(_: Path) -> list[str]:
    return [*PARTS[:-1], "0.51"]


def swapped_in_the_store(acme: Path) -> list[str]:
    with opened(acme) as registry:
        path = registry.path("p0")
    path.chmod(0o644)
    path.write_bytes((acme / "p1.safetensors").read_bytes())
    return PARTS


def swapped_under_its_name(acme: Path) -> list[str]:
    shutil.copy(acme / "p1.safetensors", acme / "p0.safetensors")
    return [word.replace("registry:p0", str(acme / "p0.safetensors")) for word in PARTS]


def another_alias(acme: Path) -> list[str]:
    run("registry", "alias", "p0@live", "p1")
    return [word.replace("registry:p0", "registry:p0@live") for word in PARTS]


def newer_version(acme: Path) -> list[str]:
    run("registry", "add", acme / "p1.safetensors", "--name", "p0")
    return PARTS


def key_of_nobody(acme: Path) -> list[str]:
    run("keys", "new", "mallory")
    request = requested(acme, *weight(acme))
    assert main(["approval", "approve", request, "--key", "mallory"]) == 2
    return weight(acme)


def facts_edited(acme: Path) -> list[str]:
    """The facts of the approval name another weight: its signed bytes do not."""
    with sqlite3.connect(acme / "registry/registry.db") as database:
        changed = database.execute("UPDATE artifact SET facts = replace(facts, '0.9', '0.91') WHERE kind = 'approval'")
        assert changed.rowcount
    return weight(acme)


def older_policy(acme: Path) -> list[str]:
    (acme / "lax.toml").write_text(POLICY.format(1, LAX))
    assert main(["policy", "activate", str(acme / "lax.toml")]) == 2
    with opened(acme) as registry:
        lax = registry.add_record({"name": "acme", "version": 1}, "policy", name="policy")
    run("registry", "alias", "policy@active", lax.digest, "--force")
    return PARTS


def policy_taken_away(_: Path) -> list[str]:
    run("registry", "alias", "policy@active", "--remove", "--force")
    return PARTS


def approval_of_a_stranger(acme: Path) -> list[str]:
    """Their registry trusts Mallory; what she approved there comes in as a bundle, and her trust does not."""
    theirs = acme / "theirs"
    for part in ("registry", "keys"):
        shutil.copytree(acme / part, theirs / part)
    with acting(theirs, "trudy"):
        run("keys", "new", "mallory")
        run("keys", "trust", "mallory", "--key", "mallory", "--role", "reviewer")
        run("approval", "approve", requested(theirs, *weight(acme)), "--key", "mallory")
        run("policy", "activate", acme / "policy.toml")
        with opened(theirs) as registry:
            names = [one.digest for one in registry.search() if one.kind in ("composition", "approval", "policy")]
        run("registry", "export", *names, "-o", acme / "theirs.tar")
    before = (acme / "registry/trust.json").read_bytes()
    run("registry", "import", acme / "theirs.tar")
    assert (acme / "registry/trust.json").read_bytes() == before
    return weight(acme)


def alias_row_edited(acme: Path) -> list[str]:
    """The row of policy@active leads to a laxer policy: no command moved it, so the audit log does not know of it."""
    with opened(acme) as registry:
        lax = registry.add_record({"name": "acme", "version": 3}, "policy", name="policy")
    with sqlite3.connect(acme / "registry/registry.db") as database:
        query = "UPDATE alias SET digest = ? WHERE name = 'policy' AND alias = 'active'"
        assert database.execute(query, [lax.digest]).rowcount
    return PARTS


def revoked_and_replayed(acme: Path) -> list[str]:
    """A bundle from before the revocation brings the approval again."""
    with opened(acme) as registry:
        given = next(one for one in registry.search(kind="approval") if one.facts.get("type") == "approve")
    run("registry", "export", given.digest, "-o", acme / "before.tar")
    run("approval", "revoke", given.digest, "--key", "grace", "--reason", "a mistake")
    run("registry", "import", acme / "before.tar")
    return PARTS


def approval_under_another(acme: Path) -> list[str]:
    """The edge of what is approved leads from something else, too."""
    requested(acme, *weight(acme))
    with opened(acme) as registry:
        given = next(one for one in registry.search(kind="approval") if one.facts.get("type") == "approve")
        for one in registry.search(kind="composition"):
            registry.link(one.digest, Link("approved_by", given.digest))
    return weight(acme)


def backdated_import(acme: Path) -> list[str]:
    """Whoever stole Grace's key signs after its revocation, in a copy, and writes an earlier time into the bundle."""
    theirs = acme / "theirs"
    for part in ("registry", "keys"):
        shutil.copytree(acme / part, theirs / part)
    run("keys", "revoke", "grace", "--since", datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"), "--reason", "x")
    with acting(theirs, "mallory"):
        run("approval", "approve", requested(theirs, *weight(acme)), "--key", "grace")
        with opened(theirs) as registry:
            names = [one.digest for one in registry.search() if one.kind in ("composition", "approval")]
        run("registry", "export", *names, "-o", acme / "theirs.tar")
    with tarfile.open(acme / "theirs.tar") as tar:
        files = {one.name: file.read() for one in tar if (file := tar.extractfile(one))}
    manifest = json.loads(files["manifest.json"])
    for item in manifest["artifacts"]:
        item["created_at"] = "2020-01-01T00:00:00+00:00"
    files["manifest.json"] = json.dumps(manifest).encode()
    with tarfile.open(acme / "earlier.tar", "w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    run("registry", "import", acme / "earlier.tar")
    return weight(acme)


ATTEMPTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a weight changed by 0.01": (weight, "is 0.91, approved was 0.9"),
    "another strength": (other_strength, "null-space strength is 0.51, approved was 0.5"),
    "an adapter swapped in the store": (swapped_in_the_store, "not what was registered"),
    "a file swapped under its name": (swapped_under_its_name, "adapters are"),
    "an alias moved to another adapter": (another_alias, "adapters are"),
    "a newer version of its name": (newer_version, "adapters are"),
    "a key of nobody": (key_of_nobody, "approved by nobody"),
    "an approval whose facts were edited": (facts_edited, "is 0.91, approved was 0.9"),
    "an older policy": (older_policy, "replaced by one that is not newer"),
    "an alias row edited in the database": (alias_row_edited, "no command pointed policy@active at this policy"),
    "an approval that was revoked, imported again": (revoked_and_replayed, "revoked"),
    "an approval linked to something else": (approval_under_another, "is 0.91, approved was 0.9"),
    "an approval by a revoked key, backdated": (backdated_import, "approved by nobody"),
    "no policy any more": (policy_taken_away, "the policy in force was taken away"),
    "an approval from somebody else's registry": (approval_of_a_stranger, "approved by nobody"),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_nobody_approved_is_not_made(
    acme: Path, tiny_sd3: Path, attempt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, said = ATTEMPTS[attempt]
    parts = prepare(acme)
    capsys.readouterr()
    assert generate(acme, tiny_sd3, *parts) == 2
    assert said in re.sub(r"\s+", " ", capsys.readouterr().err) and not Path("out.png").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil", "evil\n", ".evil"])
def test_no_name_leaves_its_folder(acme: Path, tiny_sd3: Path, name: str) -> None:
    assert main(["registry", "add", str(acme / "p1.safetensors"), "--name", name]) == 2
    assert main(["registry", "alias", f"{name}@live", "p0"]) == 2
    assert main(["keys", "new", name]) == 2
    assert main(["keys", "certificate", name, "--organisation", "x"]) == 2
    assert main(["generate", "--model", str(tiny_sd3), "--prompt", "x", "-o", f"registry:{name}"]) == 2
    assert not [path for path in acme.parent.rglob("*") if "evil" in path.name] and not Path("/tmp/evil").exists()
