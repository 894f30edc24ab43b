"""The registry: what goes in comes out, what may move moves, and every change behind its back is found."""

from __future__ import annotations

import io
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect

from company import rewritten
from qrlora.errors import QrloraError, RegistryError
from qrlora.operations.provenance.canonical import digest_of
from qrlora.operations.registry import Link, Registry, schema
from qrlora.operations.registry.bundle import export_bundle, import_bundle
from qrlora.operations.registry.database import NEWEST
from qrlora.operations.registry.lineage import draw, graph, lines
from qrlora.operations.registry.references import check_alias, check_name, parse_reference
from qrlora.operations.registry.upkeep import remove_unreferenced, unreferenced, verify


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry", actor="ada")


# references

BAD = [
    *(
        "",
        "..",
        ".",
        "a/..",
        "../a",
        "a/../b",
        "/a",
        "a/",
        "a//b",
        "a/b/c",
        "A",
        "a b",
        "a\n",
        "a\x00",
        "-a",
        "a-",
        "~a",
    ),
    *(
        "a" * 64,
        "a/" + "b" * 64,
        "ä",
        "茶碗",
        "a\u200b",
        "ａ",
        "a\\b",
        "c:a",
        "a:b",
        "a@b",
        "sha256:",
        "%2e%2e",
        "a..b",
    ),
]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_name_is_refused(name: str, registry: Registry) -> None:
    with pytest.raises(RegistryError, match="cannot be a name"):
        check_name(name)
    with pytest.raises(RegistryError):
        registry.add(b"x", "report", name=name or "..")
    assert not registry.log()


@pytest.mark.parametrize("alias", ["", "v1", "v20", "latest", "A", "a/b", "..", "1a", "a" * 64, "é"])
def test_what_cannot_be_an_alias_is_refused(alias: str) -> None:
    with pytest.raises(RegistryError, match="cannot be an alias"):
        check_alias(alias)


def test_a_reference_is_taken_apart() -> None:
    assert parse_reference("registry:teapots/classic@v12").version == 12
    assert parse_reference("chalk@production").alias == "production"
    assert parse_reference("chalk@latest") == parse_reference("chalk")
    assert parse_reference(f"registry:sha256:{'a' * 8}").digest == f"sha256:{'a' * 8}"
    for text in ("sha256:" + "a" * 7, "sha256:" + "A" * 64, "sha256:" + "a" * 65, "chalk@v0", "chalk@@a", "chalk@a@b"):
        with pytest.raises(RegistryError):
            parse_reference(text)


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_text_makes_a_reference_that_leaves_a_folder(text: str) -> None:
    try:
        name = parse_reference(text).name
    except RegistryError as error:
        assert len(str(error)) < 5000
        return
    assert not name or Path("/store", name).resolve().is_relative_to("/store")


# what goes in comes out

NAMES = st.sampled_from(["a", "b", "group/c", "group/d"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), NAMES, st.binary(min_size=1, max_size=3)),
        st.tuples(st.just("alias"), NAMES, st.sampled_from(["draft", "production"])),
        st.tuples(st.just("remove"), NAMES, st.sampled_from(["draft", "production"])),
        st.tuples(st.just("deprecate"), NAMES, st.sampled_from(["", "old"])),
    ),
    max_size=12,
)


@given(STEPS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_adds_and_moves_is_kept(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    """Against a model of three dictionaries; at the end the log tells the same as the tables."""
    registry = Registry.open(tmp_path_factory.mktemp("any"), actor="ada")
    versions: dict[str, list[str]] = {}
    aliases: dict[tuple[str, str], str] = {}
    deprecated: dict[str, str] = {}
    for what, name, value in steps:
        if what == "add":
            digest = registry.add(value, "report", name=name).digest
            assert digest == digest_of(value) and registry.read(digest) == value
            if versions.setdefault(name, [])[-1:] != [digest]:
                versions[name].append(digest)
        elif name not in versions or (what == "remove" and (name, value) not in aliases):
            with pytest.raises(RegistryError, match="no "):
                registry.remove_alias(name, value) if what == "remove" else registry.get(name)
        elif what == "alias":
            registry.set_alias(name, value, name)
            aliases[name, value] = versions[name][-1]
        elif what == "remove":
            registry.remove_alias(name, value)
            del aliases[name, value]
        else:
            registry.deprecate(name, value)
            deprecated[versions[name][-1]] = value
    for name, digests in versions.items():
        assert [registry.get(f"{name}@v{n + 1}").digest for n in range(len(digests))] == digests
        assert registry.get(name).digest == digests[-1]
    for (name, alias), digest in aliases.items():
        assert registry.get(f"registry:{name}@{alias}").digest == digest
    live = {digest for digests in versions.values() for digest in digests if not deprecated.get(digest)}
    assert {one.digest for one in registry.search()} == live
    assert verify(registry) == []
    registry.close()


def test_a_protected_alias_moves_by_force_alone_and_history_stays(registry: Registry) -> None:
    first, second = registry.add(b"1", "report", name="chalk"), registry.add(b"2", "report", name="chalk")
    registry.set_alias("chalk", "production", first.digest, reason="passed", protect=True)
    for move in (
        lambda: registry.set_alias("chalk", "production", second.digest),
        lambda: registry.set_alias("chalk", "production", first.digest, protect=False),
        lambda: registry.remove_alias("chalk", "production"),
    ):
        with pytest.raises(RegistryError, match="protected"):
            move()
    registry.set_alias("chalk", "production", second.digest, reason="better", force=True)
    assert [(one.digest, one.by, one.reason) for one in registry.moves("chalk")] == [
        (first.digest, "ada", "passed"),
        (second.digest, "ada", "better"),
    ]
    assert verify(registry) == []


def test_what_is_there_takes_what_was_unknown_and_nothing_else(registry: Registry) -> None:
    registry.add(b"1", "report", licence="MIT")
    assert registry.add(b"1", "report", owner="acme").owner == "acme"
    with pytest.raises(RegistryError, match="another licence"):
        registry.add(b"1", "report", licence="Apache-2.0")
    with pytest.raises(RegistryError, match="another kind"):
        registry.add(b"1", "picture")
    assert registry.get(digest_of(b"1")).licence == "MIT" and verify(registry) == []


def test_edges_lead_to_what_is_there_alone(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="not in the registry"):
        registry.add(b"1", "report", links=[Link("measured_by", digest_of(b"none"))])
    with pytest.raises(RegistryError, match="relation"):
        registry.add(b"1", "report", links=[Link("likes", registry.add(b"2", "report").digest)])
    assert [one.action for one in registry.log()] == ["add"] and not registry.has(digest_of(b"1"))


def test_bytes_may_lie_on_any_file_system(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry", store="memory://objects", actor="ada")
    one = registry.add(b"content", "report", name="note")
    assert registry.read("note") == b"content" and verify(registry) == []
    place = f"/objects/{one.digest[7:9]}/{one.digest[7:]}"
    registry.store.fs.pipe_file(place, b"c0ntent")  # type: ignore[attr-defined]
    [fault] = verify(registry)  # although the cache has it whole
    assert "not what was registered" in fault
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RegistryError, match="not what was registered"):
        registry.read("note")
    registry.store.fs.pipe_file("/objects/aa/" + "a" * 64, b"lost")  # type: ignore[attr-defined]
    assert unreferenced(registry) == {f"sha256:{'a' * 64}"}
    registry.store.fs.rm("/objects", recursive=True)  # type: ignore[attr-defined]
    assert len(verify(registry)) == 1


def test_a_lineage_is_a_tree_and_the_same_picture_every_time(registry: Registry) -> None:
    picture = registry.add(b"p", "picture", name="photo")
    adapter = registry.add(b"a", "adapter", name="teapot", links=[Link("trained_on", picture.digest)])
    links = [Link("composed_of", adapter.digest, 0.9, 0.5)]
    composed = registry.add(b"c", "composition", name="both", links=links)
    registry.add(b"g", "generated", name="page", links=[Link("generated_by", composed.digest)])
    found = graph(registry, registry.get("teapot"))
    text = "\n".join(lines(found))
    assert "made from\n  └ trained on: photo@v1" in text and "└ composed of x 0.9, null space 0.5: both@v1" in text
    assert draw(found) == draw(found) and draw(found).startswith(b"<?xml")
    assert set(found.nodes) == {one.digest for one in registry.search()}


# migrations


def migrations(connection: Any) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def test_migrations_go_up_and_down_and_make_the_tables_of_the_schema(registry: Registry) -> None:
    with registry.engine.begin() as connection:
        tables = set(inspect(connection).get_table_names())
        assert tables == {*schema.Base.metadata.tables, "alembic_version"}
        for name, table in schema.Base.metadata.tables.items():
            assert {one["name"] for one in inspect(connection).get_columns(name)} == set(table.columns.keys())
        command.check(migrations(connection))
        command.downgrade(migrations(connection), "base")
    with registry.engine.begin() as connection:
        assert set(inspect(connection).get_table_names()) == {"alembic_version"}
        command.upgrade(migrations(connection), "head")
    registry.add(b"again", "report", name="again")


def test_tables_that_are_there_are_opened_without_alembic(registry: Registry, tmp_path: Path) -> None:
    assert ScriptDirectory.from_config(migrations(None)).get_current_head() == NEWEST
    code = f"import sys; from qrlora.operations.registry import Registry; Registry.open({str(registry.folder)!r})"
    code += "; sys.exit('alembic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_database_of_a_later_version_or_of_nobody_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.close()
    with sqlite3.connect(tmp_path / "registry/registry.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(RegistryError, match="upgrade qrlora if a later version wrote it"):
        Registry.open(tmp_path / "registry")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/registry.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(RegistryError, match="cannot open"):
        Registry.open(tmp_path / "other")
    with pytest.raises(RegistryError, match="no registry in"):
        Registry.open(tmp_path / "nowhere", create=False)


# tampering

EDITS = {
    "a licence": "UPDATE artifact SET licence = 'MIT' WHERE kind = 'adapter'",
    "facts": """UPDATE artifact SET facts = '{"score": 1.0}' WHERE kind = 'report'""",
    "a weight": "UPDATE edge SET weight = 0.1 WHERE weight IS NOT NULL",
    "an edge": "DELETE FROM edge",
    "an alias": "UPDATE alias SET digest = (SELECT digest FROM artifact WHERE kind = 'report')",
    "a protection": "UPDATE alias SET protected = 0",
    "a version": "DELETE FROM version WHERE name = 'teapot'",
    "a tag": "INSERT INTO tag SELECT digest, 'approved' FROM artifact WHERE kind = 'adapter'",
    "a deprecation": "UPDATE artifact SET deprecated = ''",
    "who registered it": "UPDATE artifact SET created_by = 'bob' WHERE kind = 'adapter'",
    "when": "UPDATE artifact SET created_at = '2001-01-01 00:00:00.000000' WHERE kind = 'adapter'",
    "a file name": "UPDATE artifact SET filename = 'x' WHERE kind = 'adapter'",
    "a size": "UPDATE artifact SET size = 7 WHERE kind = 'adapter'",
    "an artifact": "DELETE FROM artifact WHERE kind = 'generated'",
    "an entry": "UPDATE audit SET actor = 'bob' WHERE seq = 2",
    "a dropped entry": "DELETE FROM audit WHERE seq = 3",
    "two entries": "UPDATE audit SET seq = CASE seq WHEN 2 THEN -3 WHEN 3 THEN -2 END WHERE seq IN (2, 3)",
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_row_changed_behind_its_back_is_found(registry: Registry, tmp_path: Path, edit: str) -> None:
    adapter = registry.add(b"a", "adapter", name="teapot", licence="Apache-2.0")
    registry.add(b"c", "composition", links=[Link("composed_of", adapter.digest, 0.9, 0.5)])
    registry.add(b"r", "report", facts={"score": 0.2})
    registry.add(b"g", "generated", keep=False)
    registry.set_alias("teapot", "production", "teapot", protect=True)
    registry.deprecate("teapot", "last year's")
    assert verify(registry) == []
    registry.close()
    database = sqlite3.connect(tmp_path / "registry/registry.db")
    database.execute(EDITS[edit])
    if edit == "two entries":
        database.execute("UPDATE audit SET seq = -seq WHERE seq < 0")
    database.commit()
    database.close()
    assert verify(Registry.open(tmp_path / "registry"))


def test_one_changed_byte_and_one_missing_file_are_found_and_never_handed_out(registry: Registry) -> None:
    one, two = registry.add(b"first", "report", name="one"), registry.add(b"second", "report", name="two")
    path = registry.path(one)
    path.chmod(0o644)
    path.write_bytes(b"f1rst")
    registry.path(two).unlink()
    with pytest.raises(RegistryError, match="not what was registered"):
        registry.read("one")
    with pytest.raises(RegistryError, match="missing"):
        registry.read("two")
    assert len(verify(registry)) == 2
    registry.add(b"first", "report")  # a damaged one is mended by its own bytes
    registry.add(b"second", "report")
    assert verify(registry) == []


def test_a_damaged_database_is_said_and_no_traceback(registry: Registry, tmp_path: Path) -> None:
    for number in range(200):
        registry.add(f"{number}".encode(), "report", facts={"long": "x" * 500})
    registry.close()
    with (tmp_path / "registry/registry.db").open("r+b") as stream:
        stream.seek(4096 * 12)
        stream.write(b"\xff" * 4096 * 8)
    try:
        assert verify(Registry.open(tmp_path / "registry"))
    except QrloraError as error:
        assert "remedy" in str(error)


def test_gc_takes_what_nothing_refers_to_and_no_more(registry: Registry) -> None:
    kept = registry.add(b"kept", "report")
    lost = digest_of(b"lost")
    (source := registry.folder / "lost").write_bytes(b"lost")
    registry.store.put(lost, source)
    temporary = registry.path(kept).parent / f".{'0' * 64}.{'a' * 16}.tmp"
    temporary.write_bytes(b"half")
    assert unreferenced(registry) == {lost} and registry.store.has(lost)
    assert remove_unreferenced(registry) == {lost} and not registry.store.has(lost)
    assert not temporary.exists() and registry.read(kept.digest) == b"kept"
    assert remove_unreferenced(registry) == set() and verify(registry) == []


# bundles


def company(folder: Path) -> Registry:
    """A registry with a composition, an approval of it, a policy in force and aliases."""
    registry = Registry.open(folder, actor="mallory")
    picture = registry.add(b"p", "picture", name="photo")
    parts = []
    for name in ("teapot", "chalk"):
        parts.append(registry.add(name.encode(), "export", name=name, links=[Link("trained_on", picture.digest)]))
    record = {"base": None, "basis": "", "null_space": 0.5}
    record["parts"] = [{"adapter": part.digest, "weight": 0.9} for part in parts]
    links = [Link("composed_of", part.digest, 0.9, 0.5) for part in parts]
    both = registry.add_record(record, "composition", name="both", links=links)
    approval = registry.add_record({"approved": both.digest}, "approval")
    policy = registry.add(b"rules", "policy", name="policy")
    registry.link(both.digest, Link("approved_by", approval.digest))
    registry.link(approval.digest, Link("governed_by", policy.digest))
    registry.set_alias("policy", "active", policy.digest, protect=True)
    registry.set_alias("both", "production", both.digest)
    return registry


def test_a_bundle_is_the_same_bytes_every_time_and_comes_in_whole(tmp_path: Path) -> None:
    theirs, ours = company(tmp_path / "theirs"), Registry.open(tmp_path / "ours", actor="ada")
    export_bundle(theirs, ["both"], tmp_path / "one.tar")
    export_bundle(theirs, ["both@production"], tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    found = import_bundle(ours, tmp_path / "one.tar")
    assert ours.read("both") == theirs.read("both") and "imported" in ours.get("both").tags
    both = ours.get("both@production").digest
    assert {(edge.relation, edge.weight) for edge in ours.edges(both)} == {("composed_of", 0.9), ("approved_by", None)}
    assert len(found.added) == 6 and verify(ours) == []
    again = import_bundle(ours, tmp_path / "one.tar")
    assert not again.added and verify(ours) == [] and len(ours.search()) == 6


def test_what_is_ours_is_not_moved_by_a_bundle(tmp_path: Path) -> None:
    """No policy comes into force, no alias of ours moves, no edge is hung on what we have but evidence."""
    theirs, ours = company(tmp_path / "theirs"), Registry.open(tmp_path / "ours", actor="ada")
    forged = theirs.add_record({"score": 1.0}, "report")
    theirs.link("teapot", Link("measured_by", forged.digest))
    theirs.deprecate("chalk", "old")
    export_bundle(theirs, ["both"], tmp_path / "theirs.tar")
    mine = ours.add(b"mine", "export", name="both")
    ours.set_alias("chalk", "production", mine.digest, protect=True)  # a name that has an alias and no version
    ours.set_alias("both", "production", mine.digest, protect=True)
    ours.add(b"teapot", "export", name="teapot")
    found = import_bundle(ours, tmp_path / "theirs.tar")
    assert found.names["chalk"] == "imported/chalk" and ours.get("chalk@production").digest == mine.digest
    assert ours.get("imported/chalk").deprecated == "old"
    assert ours.get("both@production").digest == ours.get("both").digest == mine.digest
    assert found.names["both"] == "imported/both" and ours.get("imported/both").kind == "composition"
    assert not ours.edges(digest_of(b"teapot"), relation="measured_by")
    with pytest.raises(RegistryError, match="no 'policy@active'"):
        ours.get("policy@active")
    assert found.names["policy"] == "imported/policy" and verify(ours) == []
    assert not (ours.folder / "trust.json").exists()


def item(manifest: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(one for one in manifest["artifacts"] if one["kind"] == kind)


def flip(_: dict[str, Any], objects: dict[str, bytes]) -> None:
    name = next(iter(objects))
    objects[name] = bytes([objects[name][0] ^ 1, *objects[name][1:]])


def reweigh(manifest: dict[str, Any], _: Any) -> None:
    next(edge for edge in manifest["edges"] if edge["relation"] == "composed_of")["weight"] = 0.1


def circle(manifest: dict[str, Any], _: Any) -> None:
    edge = next(edge for edge in manifest["edges"] if edge["relation"] == "trained_on")
    manifest["edges"].append({**edge, "source": edge["target"], "target": edge["source"]})


OUTSIDERS: dict[str, Callable[[dict[str, Any], dict[str, bytes]], Any]] = {
    "a changed byte": flip,
    "a weight that is not the record's": reweigh,
    "facts that are not the record's": lambda m, _: item(m, "composition")["facts"].update(null_space=0.0),
    "a circle": circle,
    "a path out of the folder": lambda _, o: o.update({"../../evil": b"x"}),
    "an absolute path": lambda _, o: o.update({"/tmp/evil": b"x"}),
    "an object too many": lambda _, o: o.update({f"objects/{'0' * 64}": b"x"}),
    "an object too few": lambda _, o: o.pop(next(iter(o))),
    "a size that lies": lambda m, _: item(m, "picture").update(size=2**39),
    "a digest that is a path": lambda m, _: item(m, "picture").update(digest="sha256:../../../../etc/passwd"),
    "a name that is a path": lambda m, _: m["names"].append(["../evil", 1, m["artifacts"][0]["digest"]]),
    "an alias that is a version": lambda m, _: m["aliases"].append(["both", "v9", m["artifacts"][0]["digest"]]),
    "an edge out of the bundle": lambda m, _: m["edges"][0].update(target=digest_of(b"elsewhere")),
    "another kind": lambda m, _: item(m, "picture").update(kind="trust"),
    "a relation": lambda m, _: m["edges"][0].update(relation="trusts"),
    "a field": lambda m, _: m.update(trust={"mallory": "approver"}),
    "another format": lambda m, _: m.update(format=2),
    "a tag": lambda m, _: item(m, "picture").update(tags=["../x"]),
    "a time": lambda m, _: item(m, "picture").update(created_at="yesterday"),
    "an artifact twice": lambda m, _: m["artifacts"].append(m["artifacts"][0]),
}


@pytest.mark.parametrize("attempt", OUTSIDERS)
def test_a_bundle_that_is_not_what_it_says_is_refused_whole(tmp_path: Path, attempt: str) -> None:
    export_bundle(company(tmp_path / "theirs"), ["both"], tmp_path / "good.tar")
    bad = rewritten(tmp_path / "good.tar", tmp_path / "bad.tar", OUTSIDERS[attempt])
    ours = Registry.open(tmp_path / "ours", actor="ada")
    with pytest.raises(QrloraError):
        import_bundle(ours, bad)
    assert not ours.search() and not ours.log() and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_link_in_a_bundle_is_refused(tmp_path: Path, kind: bytes) -> None:
    export_bundle(company(tmp_path / "theirs"), ["both"], tmp_path / "good.tar")
    with tarfile.open(tmp_path / "good.tar") as tar:
        members = [(one, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number, (member, content) in enumerate(members):
            if number == 1:
                member.type, member.linkname, member.size, content = kind, "/etc/passwd", 0, b""
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(RegistryError):
        import_bundle(Registry.open(tmp_path / "ours"), tmp_path / "bad.tar")


@pytest.mark.parametrize("content", [b"", b"no tar", b"\x1f\x8b" + b"0" * 100, b"0" * 10240])
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(RegistryError):
        import_bundle(Registry.open(tmp_path / "ours"), tmp_path / "x.tar")
