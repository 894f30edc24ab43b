"""Pilots in the studio: projects, the queue, reports, and who may decide."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from qrlora._said import unpacked
from qrlora.apps.pilots import open_pilot
from qrlora.apps.studio import runs, worker
from qrlora.apps.studio.pages import HERE
from qrlora.apps.studio.projects import project_file
from qrlora.apps.studio.state import Studio
from qrlora.operations.pilot import Pilot
from qrlora.operations.policy import approval
from qrlora.operations.policy.combination import combination_of
from qrlora.operations.registry import Registry
from qrlora.operations.registry.intake import add_composition
from studios import Visitor, made_studio, ran_stage, trust, visiting, work_off

PNG = (HERE / "starters" / "gold.png").read_bytes()


def sample(studio: Studio, **changes: str) -> str:
    """The teapots' project file, changed."""
    text = project_file(studio.place, "teapots").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def teapots(studio: Studio, visitor: Visitor) -> str:
    made = visitor.submit("/pilot", sample="teapots")
    assert made.headers["hx-redirect"] == "/pilot/teapots", made.text
    return "/pilot/teapots"


def renamed(studio: Studio, visitor: Visitor, name: str) -> str:
    """A pilot of its own."""
    text = sample(studio).replace('name = "teapots"', f'name = "{name}"')
    made = visitor.submit("/pilot", sample="teapots", toml=text)
    assert made.status_code == 204, made.text
    return f"/pilot/{name}"


def test_a_pilot_is_made_from_a_sample_and_shows_what_is_due(visitor: Visitor, teapots: str) -> None:
    page = visitor.get(teapots).text
    assert "stage 1, one picture" in page and "Run this stage" in page and "not run yet" in page
    assert 'href="/pilot/teapots"' in visitor.get("/pilot").text
    assert visitor.get(f"{teapots}/pictures/teapot.png").headers["content-type"] == "image/png"
    again = visitor.submit("/pilot", sample="teapots")
    assert again.status_code == 409 and "there is a pilot of this name" in again.text
    assert visitor.get("/pilot/nobody").status_code == 404
    assert visitor.get(f"{teapots}/pictures/..%2Fline.toml").status_code == 404
    assert visitor.get(f"{teapots}/report/one_picture").status_code == 404


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('picture = "pictures/gold.png"', 'picture = "/etc/passwd"', "outside the pilot"),
        ('picture = "pictures/gold.png"', 'picture = "pictures/mine.png"', "picture is missing"),
        ('brand = "brand.toml" ', 'brand = "../../session.key" ', "outside the pilot"),
        ('model = "pico" ', 'model = "/models/other" ', "another base model"),
        ("rank = 16", 'rank = 16\noutput = "/tmp/x.safetensors"', "sets itself"),
        ("training = { learning_rate = 3e-3 }", 'training = { images = ["/etc"] }', "sets itself"),
        ("version = 1", "version = 1\nsurprise = 2", "surprise"),
        ("version = 1", "version = ", "TOML"),
    ],
)
def test_a_project_file_that_cannot_be_used_is_refused_in_words(
    studio: Studio, visitor: Visitor, teapots: str, old: str, new: str, words: str
) -> None:
    text = sample(studio, **{old: new})
    for answer in (visitor.submit("/pilot", sample="teapots", toml=text), visitor.submit(f"{teapots}/line", toml=text)):
        assert answer.status_code == 400 and words in answer.text, answer.text
        assert str(studio.place) not in answer.text, "where it lies is no matter of whoever reads the page"
    assert sample(studio) != text and not list(project_file(studio.place, "teapots").parent.glob("changed*"))


def test_ones_own_pictures_come_into_a_pilot(studio: Studio, visitor: Visitor, teapots: str) -> None:
    where = renamed(studio, visitor, "ours")
    assert visitor.submit(f"{where}/pictures?file=mine.png", PNG).status_code == 204
    text = project_file(studio.place, "ours").read_text().replace("pictures/gold.png", "pictures/mine.png")
    assert visitor.submit(f"{where}/line", toml=text).status_code == 204
    assert "pictures/mine.png" in project_file(studio.place, "ours").read_text()
    for name, body, words in (
        ("mine.png", PNG, "there is a picture of this name"),
        ("../mine.png", PNG, "cannot be a picture"),
        ("no.png", b"no picture", "no.png"),
    ):
        refused = visitor.submit(f"{where}/pictures?file={name}", body)
        assert refused.status_code in (400, 409) and words in refused.text, refused.text
    assert not list(project_file(studio.place, "ours").parent.glob("upload-*"))
    other = visitor.submit(f"{where}/line", toml=text.replace('name = "ours"', 'name = "theirs"'))
    assert other.status_code == 400 and "keeps its name" in other.text


def test_a_stage_waits_its_turn_and_is_stopped_and_begun_again(studio: Studio, visitor: Visitor, teapots: str) -> None:
    where = renamed(studio, visitor, "turns")
    assert visitor.submit(f"{where}/run").status_code == 204
    [run] = [run for run in studio.runs.all(*runs.PILOTS) if run.name == "turns"]
    assert (run.role, run.state) == ("one_picture", runs.WAITING)
    assert f'data-id="{run.id}"' in visitor.get(where).text
    told = [f'data-{word}="' in visitor.get(where).text for word in ("train", "generate", "adapter", "picture")]
    assert all(told), "a word for each kind of work that a pilot and its catalog report"
    assert "turns" not in visitor.get("/train").text
    assert visitor.get(f"/train/{run.id}").headers["location"] == where
    assert visitor.submit(f"/train/{run.id}/take", step="1").status_code == 404
    for path, fields in (
        ("run", {}),
        ("decide", {"decision": "go", "reason": "x", "key": "y"}),
        ("line", {"toml": "x"}),
    ):
        busy = visitor.submit(f"{where}/{path}", **fields)
        assert busy.status_code == 409 and "waits or runs" in busy.text
    (studio.runs.folder(run.id) / "events.jsonl").write_text('{"work":"train teapot","at":3,"of":240}\n')
    assert visitor.submit(f"{where}/stop").status_code == 204
    told = json.loads(visitor.get(f"/train/{run.id}/events").text.split("data: ")[1].split("\n")[0])
    assert told["work"] == {"work": "train teapot", "at": 3, "of": 240} and told["run"]["state"] == runs.STOPPED
    assert "not made again" in visitor.get(where).text
    assert visitor.submit(f"{where}/run").status_code == 204
    assert [one.state for one in studio.runs.all(*runs.PILOTS) if one.name == "turns"] == [runs.WAITING]
    early = visitor.submit(f"{where}/stop") and visitor.submit(f"{where}/run", stage="line")
    assert early.status_code == 400 and "has to be run first" in early.text
    assert "on this page" in early.text and "qrlora pilot" not in early.text


def test_the_worker_runs_the_stage_as_who_asked_for_it(
    studio: Studio, visitor: Visitor, teapots: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed(studio, visitor, "worked")
    run = studio.runs.add_stage("worked", "one_picture", "grace")
    asked: list[Any] = []

    def stage(pilot: Pilot, stage: str, show: Any) -> None:
        asked.append((pilot.line.name, stage, pilot.registry.actor))
        show("train teapot", 1, 2)

    monkeypatch.setattr(Pilot, "run", stage)
    monkeypatch.setattr(worker.os, "nice", lambda _: None)
    monkeypatch.setenv("QRLORA_REGISTRY", studio.registry.place)
    handlers = list(logging.getLogger("qrlora").handlers)
    folder = studio.runs.folder(run.id)
    try:
        assert worker.main(folder) == 0
        monkeypatch.setattr(Pilot, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert worker.main(folder) == 130
        (project_file(studio.place, "worked").parent / "pictures" / "gold.png").unlink()
        assert worker.main(folder) == 2
    finally:
        logging.getLogger("qrlora").handlers = handlers
    assert asked == [("worked", "one_picture", "grace")]
    *told, failed = runs.events(folder)
    assert told == [{"work": "train teapot", "at": 1, "of": 2}, {"done": True}, {"stopped": 0}]
    assert "pictures/gold.png" in str(unpacked(failed["error"])) and str(studio.place) not in str(failed)


def test_a_report_has_its_figures_in_both_languages(studio: Studio, visitor: Visitor, teapots: str) -> None:
    where = renamed(studio, visitor, "told")
    ran_stage(studio, "told", "linus")
    page = visitor.get(where).text
    assert "75 %" in page and "3 of 4; 95 % interval 30 % to 95 %" in page
    assert "Cost so far, and of the next stage" in page and "0:01:03" in page and "0:04:12" in page
    assert "a no-go is recommended" in page and "Run by linus" in page and "+0.100" in page
    assert f'src="{where}/pictures/3.png"' in page and visitor.get(f"{where}/pictures/3.png").status_code == 200
    file = visitor.get(f"{where}/report/one_picture")
    assert "attachment" in file.headers["content-disposition"] and "The gate" in file.text
    visitor.submit("/settings", language="ja")
    page = visitor.get(where).text
    visitor.submit("/settings", language="en")
    assert "中止を推奨します" in page and "4件中3件、95 % 信頼区間" in page and "決定待ち" in page
    assert "Run this stage" not in page and "interval" not in page


def test_somebody_else_decides_with_a_key_and_a_reason(
    studio: Studio, visitor: Visitor, teapots: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path))
    where = renamed(studio, visitor, "decided")
    trust(studio.registry, tmp_path, "grace", "ada")
    early = visitor.submit(f"{where}/decide", decision="go", reason="good", key="grace")
    assert early.status_code == 400 and "nothing to decide" in early.text
    ran_stage(studio, "decided", "ada")
    for fields, words in (
        ({"decision": "go", "reason": "mine", "key": "ada"}, "nobody decides on their own work"),
        ({"decision": "go", "reason": " ", "key": "grace"}, "needs a reason"),
        ({"decision": "go", "reason": "good", "key": "nobody"}, "ada or grace"),
        ({"decision": "perhaps", "reason": "good", "key": "grace"}, "go or no-go"),
    ):
        refused = visitor.submit(f"{where}/decide", **fields)
        assert refused.status_code == 400 and words in refused.text, refused.text
    assert visitor.submit(f"{where}/decide", decision="no-go", reason="too soft", key="grace").status_code == 204
    assert "decided by grace: too soft" in visitor.get(where).text
    assert visitor.submit(f"{where}/decide", decision="go", reason="good enough", key="grace").status_code == 204
    pilot = open_pilot(project_file(studio.place, "decided"), studio.registry)
    assert pilot.next == "several_styles" and pilot.verify() == []
    page = visitor.get(where).text
    assert "decided by grace: good enough" in page and page.index("stage 2") < page.index("Run this stage")


def test_three_stages_are_walked_with_a_blind_study_between(
    studio: Studio, visitor: Visitor, teapots: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a no-go, a gate that asks for votes, and a change that sends the pilot back."""
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path))
    where = renamed(studio, visitor, "walked")
    trust(studio.registry, tmp_path, "grace")
    path = project_file(studio.place, "walked")
    path.write_text(path.read_text().replace("crosstalk = 0.2", "crosstalk = 0.2\nacceptance = 0.5"))

    def post(action: str, **form: str) -> str:
        done = visitor.submit(f"{where}/{action}", **form)
        assert done.status_code == 204, done.text
        waiting = visitor.get(where).text
        work_off(studio, "walked", monkeypatch)
        assert ("Stop</button>" in waiting) == (action in ("run", "study"))
        return visitor.get(where).text

    def decide(decision: str, reason: str) -> str:
        return post("decide", decision=decision, reason=reason, key="grace")

    assert "Trains an adapter of the subject" in visitor.get(where).text
    assert "waits for a decision" in post("run") and '<option value="grace">' in visitor.get(where).text
    page = decide("no-go", "too soft")
    assert "Change the project file or its pictures" in page and page.count("decided by grace: too soft") == 2
    assert "Trains an adapter of each style" in decide("go", "soft is fine")

    page = post("run")
    assert "50 % of the votes, and nobody has been asked yet" in page and "not measured yet" in page
    assert visitor.get(f"{where}/study/several_styles/vote").status_code == 404
    refused = visitor.submit(f"{where}/study", stage="line")
    assert refused.status_code == 400 and "no study is made of stage line" in refused.text
    page = post("study", stage="several_styles")
    assert "0 votes count." in page and "4 votes are missing" in page and "does not have these votes" not in page
    voted_for_ours(studio, visitor, f"{where}/study/several_styles", "walked")
    page = post("run", stage="several_styles")
    assert "100 %" in page and "does not have these votes" not in page
    assert "Makes every product in every style" in decide("go", "people like it")

    assert "waits for a decision" in post("run")
    assert "Every stage has its go." in decide("go", "all of it")
    post("line", toml=path.read_text().replace("weight = 1.2", "weight = 1.1"))
    page = visitor.get(where).text
    assert page.count("This report is of earlier inputs") == 3 and "Run this stage" in page


def voted_for_ours(studio: Studio, visitor: Visitor, place: str, name: str) -> None:
    """Vote for the pilot's pictures in the browser, look at the tally, and send in the file of another."""
    ballot = open_pilot(project_file(studio.place, name), studio.registry).ballot("several_styles")
    key = ballot.key()
    assert "No vote counts yet" in visitor.get(f"{place}/tally", headers={"HX-Request": "true"}).text
    for trial in ballot.data()["trials"]:
        known = key["trials"][trial["id"]]
        right = {"tie": "tie", trial["b"]: "right", trial["a"]: "left"}
        ours = {token: side for token, side in right.items() if key["pictures"].get(token, {}).get("arm") == "adapters"}
        [choice] = ours.values() if known["kind"] == "pair" else [right[known["right"]]]
        assert trial["id"] in visitor.get(f"{place}/vote").text
        visitor.submit(f"{place}/vote", trial=trial["id"], choice=choice)
    assert "All pairs are done" in visitor.get(f"{place}/vote").text
    tally = visitor.get(f"{place}/tally").text
    assert "With the adapters" in tally and "100 %" in tally and "1 person" in tally
    assert "attachment" in visitor.get(f"{place}/page").headers["content-disposition"]
    theirs = ballot.given("ada") | {"rater": "linus"}
    ties = [vote | {"choice": "tie"} for vote in theirs["votes"] if key["trials"][vote["trial"]]["kind"] == "pair"]
    for body, words in (
        (b"no votes", "mine.json"),
        (json.dumps(theirs | {"study": "another"}).encode(), "the page of this study saved"),
    ):
        refused = visitor.submit(f"{place}/votes?file=mine.json", body)
        assert refused.status_code == 400 and words in refused.text and str(studio.place) not in refused.text
    assert visitor.submit(f"{place}/votes?file=mine.json", json.dumps(theirs | {"votes": ties}).encode()).is_success
    assert "2 people" in visitor.get(f"{place}/tally").text
    again = visitor.submit(f"{place}/votes?file=mine.json", json.dumps(theirs).encode())
    assert again.status_code == 400 and "there are votes of this rater" in again.text
    (ballot.votes / "note.json").write_text("{}")
    assert "votes/note.json: not a vote file" in visitor.get(f"/pilot/{name}").text
    (ballot.votes / "note.json").unlink()
    page = visitor.get(f"/pilot/{name}").text
    assert "4 votes count." in page and "missing" not in page and ">Vote</a>" not in page
    assert "The report does not have these votes yet." in page


def test_what_is_to_be_approved_is_a_click_away_until_it_is(
    studio: Studio, visitor: Visitor, teapots: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 asks for the approval of the subject in each style; the page of the composition has the form."""
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path))
    where, registry = renamed(studio, visitor, "asked"), studio.registry_of("ada")
    trust(studio.registry, tmp_path, "grace")
    parts = [(registry.get(name), 1.0) for name in ("teapot", "chalk")]
    made = add_composition(registry, registry.get("pico"), parts, 0.5, name="asked/teapot-in-chalk")
    ran_stage(studio, "asked", "ada")
    visitor.submit(f"{where}/decide", decision="go", reason="good", key="grace")
    assert "To be approved" not in visitor.get(where).text
    approval.request(registry, combination_of(registry, made.digest), None)
    page = visitor.get(where).text
    assert "To be approved" in page and f'<a href="/library/{made.digest}">asked/teapot-in-chalk@v1</a>' in page
    assert f"/library/{made.digest}/approve" in visitor.get(f"/library/{made.digest}").text
    given = visitor.submit(f"/library/{made.digest}/approve", decision="approve", reason="good", key="grace")
    assert given.status_code == 204, given.text
    assert "To be approved" not in visitor.get(where).text


def test_a_picture_that_is_gone_is_said_where_it_can_be_added(
    studio: Studio, visitor: Visitor, teapots: str, tmp_path: Path
) -> None:
    where = renamed(studio, visitor, "gone")
    picture = project_file(studio.place, "gone").parent / "pictures" / "gold.png"
    picture.rename(tmp_path / "gold.png")
    page = visitor.get(where)
    assert page.status_code == 200 and "picture is missing" in page.text and "Add pictures" in page.text
    assert "its page takes yours" in page.text and str(studio.place) not in page.text
    refused = visitor.submit(f"{where}/run")
    assert refused.status_code == 400 and "picture is missing" in refused.text and str(studio.place) not in refused.text
    assert visitor.submit(f"{where}/pictures?file=gold.png", PNG).status_code == 204
    assert "Run this stage" in visitor.get(where).text


def test_where_several_log_in_decisions_are_signed_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever has logged in could sign with the key of another."""
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    studio = made_studio(tmp_path, monkeypatch, keys=("open sesame",))
    trust(studio.registry, tmp_path / "keys", "grace")
    with visiting(studio, local=False) as visitor:
        assert visitor.get("/pilot").headers["location"] == "/login"
        visitor.submit("/login", person="linus", key="open sesame")
        visitor.submit("/pilot", sample="icons")
        ran_stage(studio, "icons", "linus")
        page = visitor.get("/pilot/icons").text
        assert 'name="key"' not in page and "qrlora pilot decide" in page
        decided = visitor.submit("/pilot/icons/decide", decision="go", reason="good", key="grace")
        assert decided.status_code == 403 and "own machine" in decided.text
        gold = studio.registry.get("gold").digest
        visitor.submit(f"/library/{gold}/request", reason="winter line")
        approved = visitor.submit(f"/library/{gold}/approve", decision="approve", reason="good", key="grace")
        assert approved.status_code == 403 and "own machine" in approved.text
    assert open_pilot(project_file(studio.place, "icons"), studio.registry).ran("one_picture").go is None  # type: ignore[union-attr]


def test_a_registry_is_opened_again_by_its_place(tmp_path: Path) -> None:
    place = Registry.open(tmp_path / "registry").place
    assert Registry.open(place, create=False).place == place == str(tmp_path / "registry")
