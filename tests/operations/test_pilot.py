"""The staged way: project files, gates, reports, decisions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from qrlora.apps.cli import main
from qrlora.errors import DataError, PolicyError, RegistryError, SignatureError
from qrlora.operations.pilot import STAGES, Line, Pilot, Scorer
from qrlora.operations.pilot.costs import Spent, cost_of, projected
from qrlora.operations.pilot.line import Costs, Gate
from qrlora.operations.pilot.project import DECISION
from qrlora.operations.pilot.report import report, texts
from qrlora.operations.pilot.stages import Group, Result, Row
from qrlora.operations.provenance.c2pa import read
from qrlora.operations.provenance.canonical import file_digest
from qrlora.operations.provenance.certificates import own_roots
from qrlora.operations.provenance.dsse import sign, statement
from qrlora.operations.provenance.keys import SigningKey, Trust
from qrlora.operations.registry import Registry
from qrlora.operations.registry.intake import add_picture
from qrlora.quality.metrics.shares import Share

SAMPLE = Path(str(files("qrlora.operations") / "pilot" / "samples" / "teapots"))
QUICK = {
    "steps = 240": "steps = 2",
    "cooldown_steps = 120": "cooldown_steps = 1",
    "pictures = 16": "pictures = 2\nsteps = 2",
}


def brightness(pictures, learned_from):
    return [float(picture.pixels.mean()) / 255 for picture in pictures]


SCORERS = {role: Scorer("brightness", brightness) for role in ("subject", "style")}


def quick(sample: Path, folder: Path) -> Path:
    """The sample's project with few steps and pictures."""
    shutil.copytree(sample, folder)
    line = (folder / "line.toml").read_text()
    for long, short in QUICK.items():
        assert long in line
        line = line.replace(long, short)
    (folder / "line.toml").write_text(line)
    return folder / "line.toml"


@pytest.fixture
def project(tmp_path):
    return quick(SAMPLE, tmp_path / "pilot")


@pytest.fixture
def opened(project, tmp_path):
    def again(actor: str = "ada") -> Pilot:
        return Pilot.open(project, Registry.open(tmp_path / "registry", actor=actor), SCORERS)

    return again


@pytest.fixture
def people(tmp_path):
    """Keys of ada (author and reviewer), ben (reviewer), whom the registry trusts, and of eve, whom it does not."""
    keys = {name: SigningKey.create(tmp_path / "keys", name) for name in ("ada", "ben", "eve")}
    (tmp_path / "registry").mkdir()
    trust = Trust.load(tmp_path / "registry" / "trust.json")
    trust.add("ada", ["author", "reviewer"], keys["ada"].public_pem)
    trust.add("ben", ["reviewer"], keys["ben"].public_pem)
    trust.save(tmp_path / "registry" / "trust.json")
    return keys


def result(**changes) -> Result:
    passing = changes.pop("passing", Share(9, 10))
    base = Result("several_styles", [Group("a + b", [], 0.5, passing)])
    return replace(base, **changes)


def test_every_text_is_there_in_both_languages():
    def leaves(table, path=()):
        for key, value in table.items():
            if isinstance(value, dict) and not {"en", "ja"} & set(value):
                yield from leaves(value, (*path, key))
            else:
                yield (*path, key), value

    for path, value in leaves(texts()):
        assert set(value) == {"en", "ja"}, path
        assert value["en"] != value["ja"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "teapot"', 'name = "Tea Pot"', "subject.name"),
        ("version = 1", "version = 2", "version"),
        ("[sampling]", "[sampling]\npicures = 3", "picures"),
        ('"pictures/chalk.png"', '"pictures/none.png"', "none.png"),
        ('name = "chalk"', 'name = "gold"', "names of their own"),
        ("[gates.line]", "[gates.line]\nacceptance = 0.5", "no blind study is made of stage 3"),
        ('composed = ["a photo of a teal {subject} in {style} style"]', 'composed = ["a {subject}"]', "lacks {style}"),
    ],
)
def test_a_project_file_that_cannot_be_used_is_refused(project, old, new, said):
    text = project.read_text()
    assert old in text
    project.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=said):
        Line.load(project)


def test_the_gate_holds_what_it_is_told_to():
    good = result(crosstalk=[Row("b", "style", 0.6, 0.5, 0.1)])
    assert good.passes
    assert not replace(good, gate=Gate(compliance=0.95)).passes
    assert not replace(good, crosstalk=[Row("b", "style", 0.9, 0.5, 0.4)]).passes
    assert not replace(good, gate=Gate(acceptance=0.5)).passes, "a study that nobody counted is no acceptance"
    assert replace(good, gate=Gate(acceptance=0.5), acceptance=Share(8, 10)).passes
    assert not replace(good, stage="line", failed=1).passes


def test_what_the_next_stage_costs_counts_every_picture_of_the_line(opened, people, project):
    project.write_text(project.read_text().replace("per_product = 2", "per_product = 3"))
    pilot = opened()
    pilot.run()
    pilot.decide(True, "good", people["ben"])
    found = pilot.run()
    spent = [one for one in json.loads((pilot.folder / "spent.json").read_text()) if one["what"] == "generate"]
    each = sum(one["seconds"] for one in spent) / sum(one["amount"] for one in spent)
    assert found.next_cost.seconds == pytest.approx(4 * 2 * 3 * each), "products, styles, pictures of each"


def test_a_share_whose_interval_holds_the_limit_is_called_unsure():
    checks = {check.name: check for check in result(passing=Share(9, 10)).checks}
    assert checks["compliance"].passed
    assert not checks["compliance"].sure
    assert {check.name: check for check in result(passing=Share(500, 500)).checks}["compliance"].sure


def test_votes_count_for_the_pictures_they_were_about_alone(opened, people, project):
    """A study of stage 1; then its adapter changes, and the votes about its earlier pictures count no more."""
    text = project.read_text().replace("[gates.one_picture]", "[gates.one_picture]\nacceptance = 0.5")
    project.write_text(text)
    pilot = opened()
    with pytest.raises(PolicyError, match="has to be run first"):
        pilot.make_study("one_picture")
    with pytest.raises(PolicyError, match="no study is made of stage line"):
        pilot.make_study("line")
    assert pilot.run().acceptance is None
    ballot = pilot.make_study("one_picture")
    assert ballot.page.is_file() and pilot.run("one_picture").acceptance is None, "nobody has voted"
    key = ballot.key()
    for trial in ballot.data()["trials"]:
        ours = "left" if key["pictures"][trial["a"]]["arm"] == "adapters" else "right"
        if key["trials"][trial["id"]]["kind"] == "pair":
            ballot.vote("ann", trial["id"], ours)
    found = pilot.run("one_picture")
    assert found.acceptance == Share(2, 2) and {one.name: one.passed for one in found.checks}["acceptance"]
    project.write_text(text.replace("learning_rate = 3e-3", "learning_rate = 2e-3"))
    pilot = opened()
    with pytest.raises(PolicyError, match="before its inputs changed"):
        pilot.make_study("one_picture")
    assert pilot.run("one_picture").acceptance is None
    later = pilot.make_study("one_picture")
    assert later.key()["study"] != key["study"] and not later.files()
    assert (later.folder / key["study"] / "votes").is_dir(), "earlier votes are kept with their key"


def test_costs_are_time_times_price():
    cost = cost_of(3600, 2_000_000_000, Costs(watts=500, per_kwh=0.4, per_hour=2, per_gb_month=0.1))
    assert cost.kwh == pytest.approx(0.5)
    assert cost.money == pytest.approx(0.5 * 0.4 + 2 + 0.2)
    spent = [Spent("one_picture", "train", 10, 100), Spent("one_picture", "generate", 6, 3)]
    assert projected(200, 5, spent, 0, Costs()).seconds == pytest.approx(20 + 10)
    assert projected(200, 5, spent[:1], 0, Costs()) is None, "no pace of pictures is known"


def test_three_stages_from_one_picture_to_the_line(opened, people, project):
    keys = people
    pilot = opened()
    known = add_picture(pilot.registry, project.parent / "pictures" / "teapot.png", licence="Apache-2.0")
    with pytest.raises(PolicyError, match="one_picture has to be run first"):
        pilot.run("several_styles")
    with pytest.raises(PolicyError, match="nothing to decide"):
        pilot.decide(True, "because", keys["ben"])
    for stage in STAGES:
        assert pilot.next == stage
        found = pilot.run()
        assert found.stage == stage
        for language, word in (("en", "The gate"), ("ja", "関門")):
            assert word in (pilot.report_folder(stage, language) / "report.html").read_text()
        pilot = opened()  # from its state on disk
        assert pilot.next == stage, "no stage is done without a decision"
        pilot.decide(True, "good", keys["ben"])
    assert pilot.next is None
    assert pilot.verify() == []
    assert len(found.groups) == 2
    assert found.made == 4 * 2 * 2
    assert pilot.registry.get(known.digest).licence == "Apache-2.0", "what was registered keeps its licence"
    ledger = pilot.folder / "spent.json"
    before = ledger.read_text()
    assert opened().run("several_styles").made
    assert ledger.read_text() == before, "nothing is trained or generated twice"


def forged(pilot: Pilot, key: SigningKey, report_digest: str) -> str:
    """A go that was put into the registry by hand; returns its digest."""
    predicate = {"pilot": pilot.line.name, "stage": "one_picture", "inputs": pilot.inputs("one_picture")}
    predicate |= {"report": report_digest, "go": True}
    envelope = sign(statement(DECISION, [("report", report_digest)], predicate), key)
    return pilot.registry.add_record(envelope, "approval").digest


def test_who_may_decide_and_on_what(opened, people, project):
    keys = people
    pilot = opened()
    pilot.run()
    with pytest.raises(PolicyError, match="own work"):
        pilot.decide(True, "mine", keys["ada"])
    with pytest.raises(SignatureError):
        pilot.decide(True, "mine", keys["eve"])
    with pytest.raises(PolicyError, match="reason"):
        pilot.decide(True, " ", keys["ben"])
    refused = pilot.decide(False, "too soft", keys["ben"])
    with pytest.raises(PolicyError, match="needs a go"):
        pilot.run("several_styles")
    pilot.decide(True, "good enough", keys["ben"])
    assert opened().verify() == []

    state = pilot.folder / "state.json"
    good = json.loads(state.read_text())["one_picture"]
    assert good["decision"] != refused
    by_hand = [
        (refused, "a no-go"),
        ("", "no decision"),
        (forged(pilot, keys["ada"], good["report"]), "nobody decides on their own work"),
        (forged(pilot, keys["ben"], "sha256:" + "0" * 64), "on another report"),
        (forged(pilot, keys["eve"], good["report"]), "nobody's whom this registry trusts"),
    ]
    for decision, why in by_hand:
        state.write_text(json.dumps({"one_picture": {**good, "decision": decision}}))
        with pytest.raises(PolicyError, match="needs a go") as caught:
            opened().run("several_styles")
        assert why in str(caught.value)
    state.write_text(json.dumps({"one_picture": {**good, "author": "somebody else"}}))
    with pytest.raises(RegistryError, match="no state of a pilot"):
        opened()
    state.write_text(json.dumps({"one_picture": good}))
    assert opened().verify() == []

    shutil.copy(project.parent / "pictures" / "gold.png", project.parent / "pictures" / "teapot.png")
    changed = opened()
    assert changed.next == "one_picture", "a changed picture voids what was decided"
    with pytest.raises(PolicyError, match="has to be run first"):
        changed.run("several_styles")


@pytest.mark.slow
def test_the_line_obeys_the_policy_and_its_pictures_are_marked_and_recorded(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("QRLORA_ACTOR", "ada")
    place, line = str(tmp_path / "registry"), str(project)
    assert main(["keys", "new", "ben"]) == 0
    assert main(["keys", "trust", "ben", "--key", "ben", "--role", "reviewer", "--registry", place]) == 0
    assert main(["keys", "certificate", "acme", "--organisation", "ACME"]) == 0
    asked = []
    for _ in STAGES:
        capsys.readouterr()
        options = ["--registry", place, "--require-approval", "--c2pa", "acme", "--json"]
        assert main(["pilot", "run", line, *options]) in (0, 1)
        asked.append(json.loads(capsys.readouterr().out).get("to_approve", []))
        go = ["--go", "--reason", "good", "--key", "ben", "--registry", place]
        assert main(["pilot", "decide", line, *go]) == 0
        for one in asked[-1][:1]:
            assert main(["approval", "approve", one["request"], "--key", "ben", "--registry", place]) == 0
    assert [len(some) for some in asked] == [0, 2, 1], "a combination of several products is asked for once"
    requests = [{one["request"] for one in some} for some in asked]
    assert len(requests[1] & requests[2]) == 1, "what was asked for is not asked for again"
    report_page = project.with_suffix(".pilot") / "reports/several_styles/en/report.html"
    assert f"qrlora approval approve {asked[1][0]['request']}" in report_page.read_text()

    registry = Registry.open(place)
    assert {one.kind for one in registry.search(limit=1000)} >= {"brand", "base", "picture", "recipe", "basis"}
    pictures = sorted((project.with_suffix(".pilot") / "catalog/pictures").rglob("*.png"))
    assert len(pictures) == 8, "of four products in two styles one style is approved"
    for path in pictures:
        found = registry.get(file_digest(path))
        (edge,) = registry.edges(found.digest, relation="generated_by")
        manifest = read(path.read_bytes(), own_roots())
        assert (manifest.state, manifest.origin["composition"]) == ("valid", edge.target)
        assert registry.edges(edge.target, relation="approved_by") and registry.edges(
            edge.target, relation="measured_by"
        )


def test_a_report_says_what_it_does_not_show(project):
    line = Line.load(project)
    page = report(result(), line, SCORERS, "en", "line.toml").html()
    assert "blind to much that a person sees" in page
    assert "No blind study" in page
    assert "no brand sheet" in report(result(), line.model_copy(update={"brand": None}), SCORERS, "en", "x").html()


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QRLORA_REGISTRY", str(tmp_path / "registry"))
    line = str(tmp_path / "p" / "line.toml")
    assert main(["pilot", "new", line, "--sample", "icons"]) == 0
    assert main(["pilot", "new", line]) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["pilot", "status", line]) == 0
    assert "one_picture: not run" in capsys.readouterr().out
    assert main(["pilot", "decide", line, "--go", "--reason", "x", "--key", "nobody"]) == 2
    assert "no private key" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["status"], ["decide", "--go", "--reason", "good", "--key", "ben"]])
def test_status_and_decide_wait_for_no_torch(opened, people, project, tmp_path, command):
    opened().run()
    code = (
        "import sys; from qrlora.apps.cli import main\n"
        f"code = main(['pilot', {command[0]!r}, {str(project)!r}, *{command[1:]!r}])\n"
        "sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    places = {"QRLORA_REGISTRY": str(tmp_path / "registry"), "QRLORA_KEYS": str(tmp_path / "keys")}
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, **places}).returncode == 0
