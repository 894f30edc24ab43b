"""The studio over HTTP: who may, what is refused in which words, what is made and kept."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from qrlora._said import unpacked
from qrlora.apps.cli import main
from qrlora.apps.studio import forms, runs
from qrlora.apps.studio.guard import HEADERS
from qrlora.apps.studio.model import LazyEngine
from qrlora.apps.studio.pages import HERE
from qrlora.apps.studio.runs import Runs
from qrlora.apps.studio.state import Studio
from qrlora.errors import ModelError, RequestError
from qrlora.operations.policy.check import activate
from qrlora.operations.policy.rules import Policy
from qrlora.operations.registry import Registry
from studios import STEPS, SquareEngine, Visitor, made_studio, serving, visiting

PAGES = ("/mix", "/train", "/library", "/explore", "/prove", "/pilot")
PNG = (HERE / "starters" / "teapot.png").read_bytes()


def engine_of(studio: Studio) -> SquareEngine:
    return studio.model.engine  # type: ignore[return-value]


# Who may


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_no_inline_script_or_style_and_says_so(visitor: Visitor, path: str) -> None:
    answer = visitor.get(path)
    assert answer.status_code == 200
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(
        r"<script(?![^>]* src=)|<style| style=| on[a-z]+=|javascript:|https?://(?!www.w3.org)", answer.text
    )


def test_another_site_another_host_and_a_missing_token_are_refused(studio: Studio, visitor: Visitor) -> None:
    fields = {"data": {"language": "ja"}, "headers": {"Content-Type": "application/x-www-form-urlencoded"}}
    assert visitor.post("/settings", **fields).status_code == 403
    assert visitor.get("/mix", headers={"Origin": "http://evil.example"}).status_code == 403
    assert visitor.get("/picture.png", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert visitor.get("/mix", headers={"Host": "evil.example"}).status_code == 421
    evil = {"Origin": "http://evil.example"}
    assert visitor.post("/api/v1/images/generations", json={"prompt": "a"}, headers=evil).status_code == 403
    assert visitor.submit("/settings", language="ja").status_code == 204
    assert '<html lang="ja"' in visitor.get("/mix").text
    visitor.submit("/settings", language="en")


def test_the_servers_own_endpoints_are_below_api(visitor: Visitor) -> None:
    made = visitor.post("/api/v1/images/generations", json={"prompt": "a mug", "model": "pico+teapot"})
    assert made.status_code == 200 and made.json()["data"][0]["b64_json"]
    assert "pico+chalk" in {one["id"] for one in visitor.get("/api/v1/models").json()["data"]}


def test_people_log_in_with_a_key_and_act_under_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = made_studio(tmp_path, monkeypatch, keys=("open sesame",))
    with visiting(studio, local=False) as visitor:
        assert visitor.get("/mix").headers["location"] == "/login"
        assert visitor.get("/status", headers={"HX-Request": "true"}).headers["hx-redirect"] == "/login"
        assert visitor.post("/api/v1/images/generations", json={"prompt": "a"}).status_code == 401
        assert visitor.submit("/login", person="grace", key="wrong").status_code == 401
        assert visitor.get("/mix").status_code == 303
        assert visitor.submit("/login", person="grace", key="open sesame").headers["hx-redirect"] == "/mix"
        assert visitor.get("/mix").status_code == 200
        kept = visitor.submit("/mix/save", c="teapot:1,chalk:0.5", n="0.5", name="pair")
        assert kept.status_code == 200, kept.text
        visitor.submit("/logout")
        assert visitor.get("/mix").status_code == 303
    assert studio.registry.get("pair").created_by == "grace"


def test_on_another_address_the_command_asks_for_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studio", "--host", "0.0.0.0", "--no-browser"]) == 2
    assert "--api-key-file" in capsys.readouterr().err


# Mix


def test_a_first_look_takes_few_steps_and_a_refined_picture_all(studio: Studio, visitor: Visitor) -> None:
    made = engine_of(studio).made
    before = len(made)
    query = {"c": "teapot:0.9,chalk:1", "n": "0.5", "p": "a <c> in <s> style", "s": "3"}
    first, refined = (visitor.get("/picture.png", params={**query, "stage": stage}) for stage in ("first", "refined"))
    assert [settings.steps for settings, _ in made[before:]] == [4, STEPS]
    [asked] = made[-1][1]
    assert (asked.prompt, asked.seed, asked.null_space) == ("a <c> in <s> style", 3, 0.5)
    assert asked.composition == {"teapot": 0.9, "chalk": 1.0}
    assert first.content != refined.content
    again = visitor.get("/picture.png", params={**query, "stage": "refined"})
    assert again.content == refined.content and len(made) == before + 2  # kept, not made again


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"c": "nobody:1"}, "nobody"),
        ({"c": "teapot:99"}, "from -10 to 10"),
        ({"c": "teapot:1", "n": "7"}, "from 0 to 1"),
        ({"s": "-1"}, "no such seed"),
    ],
)
def test_a_picture_that_cannot_be_made_is_answered_in_words(
    visitor: Visitor, query: dict[str, str], words: str
) -> None:
    answer = visitor.get("/picture.png", params=query, headers={"Accept": "image/png"})
    assert 400 <= answer.status_code < 500
    assert words in answer.text and 'role="alert"' in answer.text and "<html" not in answer.text


def test_of_one_pages_previews_only_the_newest_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine moves of a slider, each before the picture of the one before it is there."""
    studio = made_studio(tmp_path, monkeypatch)
    monkeypatch.setattr(SquareEngine, "step_seconds", 0.05)
    ended = engine_of(studio).ended

    async def slide(address: str) -> list[int]:
        async with httpx2.AsyncClient(base_url=address, timeout=30) as client:

            async def ask(weight: int) -> int:
                query = {"c": f"teapot:0.{weight}", "p": "slide", "page": "tab"}
                try:
                    return (
                        await client.get("/picture.png", params=query, timeout=1.0 if weight < 9 else 30)
                    ).status_code
                except httpx2.TimeoutException:
                    return 0

            asked = []
            for weight in range(1, 10):
                asked.append(asyncio.create_task(ask(weight)))
                await asyncio.sleep(0.02)
            return await asyncio.gather(*asked)

    with serving(studio) as address:
        statuses = asyncio.run(slide(address))
    assert statuses[-1] == 200
    made = [picture.composition["teapot"] for picture in ended if picture.prompt == "slide"]
    assert made[-1] == 0.9 and len(made) <= 2, made


def test_interference_licence_and_policy_are_told_in_words(visitor: Visitor) -> None:
    text = visitor.get("/mix/about", params={"c": "teapot:1,chalk:1", "n": 0.5}).text
    assert "<meter" in text and "Apache-2.0" in text and "No policy is in force" in text
    assert "Begin here" in visitor.get("/mix/about").text


def test_a_grid_has_every_pair_of_weights(visitor: Visitor) -> None:
    text = visitor.get("/mix/grid", params={"c": "teapot:1,chalk:1", "n": 0.5, "p": "a mug"}).text
    assert text.count("/picture.png?") == 16 and "teapot%3A1.5" in text
    alone = visitor.get("/mix/grid", params={"c": "teapot:1"})
    assert alone.status_code == 400 and "two" in alone.text


def test_a_mix_is_kept_with_its_parts_and_opens_again(studio: Studio, visitor: Visitor) -> None:
    kept = visitor.submit("/mix/save", c="teapot:0.9,chalk:1", n="0.5", name="chalk-teapot")
    assert kept.status_code == 200, kept.text
    artifact = studio.registry.get("chalk-teapot")
    parts = {studio.registry.get(one["adapter"]).title: one["weight"] for one in artifact.facts["parts"]}
    assert parts == {"teapot@v1": 0.9, "chalk@v1": 1.0} and artifact.facts["null_space"] == 0.5
    page = visitor.get(f"/library/{artifact.digest}").text
    link = re.search(r'href="(/mix\?c=[^"]+)"', page)
    assert link
    mix = visitor.get(link[1].replace("&amp;", "&")).text
    assert 'value="0.9"' in mix and 'data-null-space="0.5"' in mix
    nothing = visitor.submit("/mix/save", c="", n="0.5", name="empty")
    assert nothing.status_code == 400 and "a slider above zero" in nothing.text


def test_a_file_of_a_folder_is_mixed_but_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.safetensors").write_bytes((HERE / "starters" / "gold.safetensors").read_bytes())
    studio = made_studio(tmp_path, monkeypatch, folder=folder)
    with visiting(studio) as visitor:
        assert 'data-key="mine" data-role="style"' in visitor.get("/mix").text
        refused = visitor.submit("/mix/save", c="mine:1", n="0", name="mine")
        assert refused.status_code == 400 and "only registered adapters" in refused.text


def test_pictures_programs_and_saved_mixes_keep_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that comes into force while the studio runs holds at once, for pictures that were made before, too."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.safetensors").write_bytes((HERE / "starters" / "gold.safetensors").read_bytes())
    studio = made_studio(tmp_path, monkeypatch, folder=folder)
    with visiting(studio) as visitor:
        strong = {"c": "teapot:1,chalk:1.5", "n": "0.5", "p": "a mug"}
        assert visitor.get("/picture.png", params=strong).status_code == 200
        rules = {"name": "ours", "version": 1, "weight": [{"role": "style", "at_most": 1.0}]}
        activate(studio.registry, Policy.parse({**rules, "forbidden": {"words": ["cheap"]}}))
        for query in (strong, {**strong, "c": "teapot:1", "p": "a cheap mug"}):
            refused = visitor.get("/picture.png", params=query, headers={"Accept": "image/png"})
            assert refused.status_code == 403 and "not permitted" in refused.text
        assert visitor.get("/picture.png", params={**strong, "c": "teapot:1,chalk:1"}).status_code == 200
        body = {"prompt": "a mug", "model": "pico+chalk:1.5"}
        assert visitor.post("/api/v1/images/generations", json=body).status_code == 403
        refused = visitor.submit("/mix/save", c=strong["c"], n="0.5", name="loud")
        assert refused.status_code == 400 and "chalk@v1 at weight 1.5" in refused.text
        assert not studio.registry.search(kind="composition")
        audited = {entry.subject for entry in studio.registry.log() if entry.action == "refused"}
        assert audited == {"compose", "generate", "serve"}
        for parts in ("mine:1.5", "teapot:1,nobody:1,chalk:1.5"):
            assert "Not permitted" in visitor.get("/mix/about", params={"c": parts, "n": 0.5}).text
        kept = visitor.submit("/mix/save", c="teapot:1,chalk:1", n="0.5", name="quiet")
        assert "Ask for approval" in kept.text


def test_an_adapter_that_is_not_there_is_no_picture_without_adapters(visitor: Visitor) -> None:
    assert visitor.get("/picture.png", params={"p": "none"}).status_code == 200
    assert visitor.get("/picture.png", params={"p": "none", "c": "nobody:1"}).status_code == 404


def test_until_the_model_is_there_pages_are_and_say_so(tmp_path: Path) -> None:
    studio = Studio(Registry.open(tmp_path / "registry"), model="pico")
    with visiting(studio) as visitor:
        for path in PAGES:
            assert "Loading pico" in visitor.get(path).text
        answer = visitor.get("/picture.png")
        assert answer.status_code == 503 and "still being loaded" in answer.text


def test_a_model_that_cannot_be_loaded_is_named_on_every_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise ModelError("no such model", remedy="name another")

    monkeypatch.setattr("qrlora.apps.serving.engine.Engine", failing)
    studio = Studio(Registry.open(tmp_path / "registry"), model="nothing")
    studio.model.load()
    with visiting(studio) as visitor:
        assert "status failed" in visitor.get("/library").text
        assert "cannot be loaded" in visitor.get("/picture.png").text


# Train


def begin(visitor: Visitor, **fields: str) -> Any:
    token = re.search(r'name="picture" value="([0-9a-f]+)"', visitor.submit("/train/pictures?name=a.png", PNG).text)
    assert token
    asked = {"picture": token[1], "role": "subject", "name": "My Teapot", "noun": "teapot", "preset": "quick", **fields}
    return visitor.submit("/train", **{key.replace("TOKEN", token[1]): value for key, value in asked.items()})


def test_a_picture_is_cropped_and_masked_as_the_page_says(studio: Studio, visitor: Visitor) -> None:
    token = re.search(r'name="picture" value="([0-9a-f]+)"', visitor.submit("/train/pictures?name=a.png", PNG).text)
    assert token
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    assert visitor.submit(f"/train/pictures/{token[1]}/mask", stream.getvalue()).status_code == 204
    fields = {"picture": token[1], f"crop-{token[1]}": "1,0,0.5", "role": "subject", "name": "t", "preset": "quick"}
    where = visitor.submit("/train", **fields).headers["hx-redirect"]
    folder = studio.runs.folder(where.rpartition("/")[2])
    with Image.open(folder / "pictures" / "00.png") as cut, Image.open(HERE / "starters" / "teapot.png") as whole:
        assert cut.tobytes() == whole.convert("RGB").crop((64, 0, 128, 64)).tobytes()
    with Image.open(folder / "pictures" / "00.mask.png") as cut_mask:
        assert cut_mask.size == (64, 64) and cut_mask.getextrema()[0] > 180  # type: ignore[operator]  # was painted
    assert visitor.get(where).status_code == 200
    studio.runs.stop(folder.name)


def test_a_run_is_a_recipe_that_training_takes(studio: Studio, visitor: Visitor) -> None:
    from qrlora.models.training.recipe import Recipe

    where = begin(visitor, licence="CC-BY-4.0").headers["hx-redirect"]
    run = studio.runs.get(where.rpartition("/")[2])
    recipe = Recipe.of(json.loads((studio.runs.folder(run.id) / "recipe.json").read_text()))
    assert (run.name, run.state, recipe.licence) == ("my-teapot", runs.WAITING, "CC-BY-4.0")
    assert recipe.text == "a photo of a <c> teapot" and recipe.sample_every and recipe.checkpoint_every
    studio.runs.stop(run.id)
    assert "stopped" in visitor.get("/train/runs").text
    assert visitor.submit(f"/train/{run.id}/forget").headers["hx-redirect"] == "/train"
    gone = visitor.get(f"/train/{run.id}")
    assert gone.status_code == 404 and "no such training run" in gone.text


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"no picture", 400, "unreadable picture: a.png"),
        (b"%!PS-Adobe-3.0 showpage", 400, "a complete PNG"),
        (PNG + b"0" * 5000, 413, "at most"),
    ],
)
def test_an_upload_is_bounded_and_a_picture(
    studio: Studio, visitor: Visitor, monkeypatch: pytest.MonkeyPatch, content: bytes, status: int, words: str
) -> None:
    monkeypatch.setattr(forms, "MOST_UPLOAD", 4000 + len(PNG))
    before = set((studio.place / "uploads").glob("*")) if (studio.place / "uploads").exists() else set()
    answer = visitor.submit("/train/pictures?name=a.png", content)
    assert answer.status_code == status and words in answer.text, answer.text
    assert str(studio.place) not in answer.text
    assert set((studio.place / "uploads").glob("*")) == before


@pytest.mark.parametrize(
    ("fields", "words"), [({"name": "../etc"}, "cannot be a name"), ({"crop-TOKEN": "1,2"}, "crop")]
)
def test_a_run_that_cannot_be_is_refused_in_words(
    studio: Studio, visitor: Visitor, fields: dict[str, str], words: str
) -> None:
    known = len(studio.runs.all())
    answer = begin(visitor, **fields)
    assert answer.status_code == 400 and words in answer.text
    assert len(studio.runs.all()) == known
    nothing = visitor.submit("/train", role="subject", name="a")
    assert "drop some on the page" in nothing.text


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """A queue whose worker is a few lines that write an adapter; a run's name says what it does."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[-1]); name = json.loads((folder / 'run.json').read_text())['name']\n"
        "def say(**event): (folder / 'events.jsonl').open('a').write(json.dumps(event) + '\\n')\n"
        "say(step=1, loss=0.5, left=1.0)\n"
        "try:\n"
        "    time.sleep(60 if name == 'long' else 0)\n"
        "except KeyboardInterrupt:\n"
        "    say(stopped=1); sys.exit(130)\n"
        "if name == 'bad': say(error='expected a, got b'); sys.exit(2)\n"
        "if name == 'dead': sys.exit('Killed')\n"
        "(folder / 'adapter.safetensors').write_bytes(b'')\n"
    )
    popen = runs.subprocess.Popen
    monkeypatch.setattr(
        runs.subprocess, "Popen", lambda command, **o: popen([sys.executable, str(script), command[-1]], **o)
    )
    made = Runs(tmp_path / "runs", lambda folder, person: f"registry:{folder.name}@v1")
    yield made
    made.close()


def add(queue: Runs, person: str, name: str = "short") -> str:
    return queue.add(queue.new_folder(), person, name, {"role": "style", "steps": 1}).id


def until(queue: Runs, name: str, *states: str) -> runs.Run:
    end = time.monotonic() + 300
    while (run := queue.get(name)).state not in states:
        assert time.monotonic() < end, run
        time.sleep(0.02)
    return run


def test_the_queue_is_fair_to_whoever_has_waited_longest(queue: Runs) -> None:
    order: list[str] = []
    queue.finished = lambda folder, person: order.append(person) or "registry:a@v1"  # type: ignore[func-returns-value]
    ids = [add(queue, person) for person in ("ada", "ada", "ada", "grace", "linus")]
    assert queue.ahead_of(queue.get(ids[-1])) == 4
    queue.start()
    for name in ids:
        until(queue, name, runs.DONE)
    assert order == ["ada", "grace", "linus", "ada", "ada"]


@pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN], ids=["", "SIGINT ignored"])
def test_runs_stop_resume_fail_and_outlive_the_studio(queue: Runs, inherited: signal.Handlers) -> None:
    """Also in a shell's background, where SIGINT is ignored and workers inherit that."""
    before = signal.signal(signal.SIGINT, inherited)
    try:
        check_stops(queue)
    finally:
        signal.signal(signal.SIGINT, before)


def check_stops(queue: Runs) -> None:
    queue.start()
    long, bad, dead = (add(queue, "ada", name) for name in ("long", "bad", "dead"))
    until(queue, long, runs.RUNNING)
    while not runs.events(queue.folder(long)):
        time.sleep(0.02)
    with pytest.raises(RequestError, match="not over"):
        queue.forget(long)
    queue.stop(long)
    assert until(queue, long, runs.STOPPED).state == runs.STOPPED
    assert until(queue, bad, runs.FAILED).error == "expected a, got b"
    assert "Killed" in unpacked(until(queue, dead, runs.FAILED).error)
    queue.resume(long)
    until(queue, long, runs.RUNNING)
    queue.close()
    again = Runs(queue.place, queue.finished)
    assert again.get(long).state == runs.STOPPED


def test_a_page_that_is_opened_late_is_told_everything(studio: Studio, visitor: Visitor) -> None:
    where = begin(visitor).headers["hx-redirect"]
    name = where.rpartition("/")[2]
    folder = studio.runs.folder(name)
    (folder / "events.jsonl").write_text(
        '{"step":1,"loss":0.5,"left":9}\n{"sample":1}\n{"step":2,"loss":0.4,"left":8}\n{"ste'
    )
    studio.runs.stop(name)
    text = visitor.get(f"{where}/events").text
    told = json.loads(text.split("data: ")[1].split("\n")[0])
    assert told["points"] == [[1, 0.5], [2, 0.4]] and told["samples"] == [1] and told["run"]["state"] == "stopped"


# Library


def test_the_library_finds_draws_and_moves(studio: Studio, visitor: Visitor) -> None:
    chalk = studio.registry.get("chalk")
    assert "chalk" in visitor.get("/library", params={"q": "chal"}).text
    assert f"/library/{chalk.digest}" not in visitor.get("/library", params={"q": "teapot"}).text
    page = visitor.get(f"/library/{chalk.digest}").text
    assert "chalk.png" in page and "pico@v1" in page and "<svg" in page
    assert visitor.submit(f"/library/{chalk.digest}/alias", alias="production", reason="liked").status_code == 204
    assert studio.registry.get("chalk@production").digest == chalk.digest
    assert "liked" in visitor.get(f"/library/{chalk.digest}").text
    refused = visitor.submit(f"/library/{chalk.digest}/alias", alias="v1")
    assert refused.status_code == 400 and "cannot be an alias" in refused.text
    visitor.submit(f"/library/{chalk.digest}/deprecate", reason="too white")
    assert "too white" in visitor.get(f"/library/{chalk.digest}").text
    visitor.submit(f"/library/{chalk.digest}/deprecate", reason="")
    missing = visitor.get("/library/nothing-of-that-name")
    assert missing.status_code == 400 and "one artifact" in missing.text


def test_verify_finds_a_file_that_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = made_studio(tmp_path, monkeypatch)
    with visiting(studio) as visitor:
        assert "are as they were written" in visitor.get("/library/verify").text
        path = studio.registry.path("gold")
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert "gold@v1" in visitor.get("/library/verify").text


def test_asking_for_an_approval_is_recorded(studio: Studio, visitor: Visitor) -> None:
    gold = studio.registry.get("gold")
    assert "nobody has asked" in visitor.get(f"/library/{gold.digest}").text
    assert visitor.submit(f"/library/{gold.digest}/request", reason="winter line").status_code == 204
    page = visitor.get(f"/library/{gold.digest}").text
    assert "asked for" in page and 'name="key"' in page
    unknown = visitor.submit(f"/library/{gold.digest}/approve", key="nobody", reason="because", decision="approve")
    assert unknown.status_code == 400 and "nobody" in unknown.text
    silent = visitor.submit(f"/library/{gold.digest}/approve", key="nobody", decision="approve")
    assert "needs a reason" in silent.text


# Explore and prove


def test_a_point_of_the_space_is_the_adapter_that_its_picture_showed(studio: Studio, visitor: Visitor) -> None:
    """The page sends weights of the members; what is kept is the space's own adapter: the same ΔR."""
    from qrlora.method.adapter import load_adapter
    from qrlora.method.composition import Composition

    text = visitor.get("/explore/space", params={"role": "style"}).text
    members = json.loads(re.search(r"data-members='([^']+)'", text)[1])  # type: ignore[index]
    z, mean = [1.5, -0.5], 0.8
    weights = [mean / 3 + sum(z[k] * one["z"][k] for k in range(2)) / 3 for one in members]
    adapters = [load_adapter(studio.registry.path(one["key"])) for one in members]
    shown = Composition(list(zip(adapters, weights, strict=True))).adapter()
    answer = visitor.submit("/explore/save", role="style", z="1.5,-0.5", mean="0.8", name="between")
    assert answer.status_code == 200, answer.text
    kept = load_adapter(studio.registry.path("between"))
    for layer, delta in kept.deltas.items():
        assert (delta - shown.deltas[layer] * shown.scaling / kept.scaling).abs().max() < 1e-5
    alone = visitor.get("/explore/space", params={"role": "subject"}, headers={"HX-Request": "true"})
    assert alone.status_code == 400 and "too few adapters" in alone.text
    studio.registry.deprecate("between", "a test")


def test_a_space_is_kept_and_becomes_a_preset(studio: Studio, visitor: Visitor) -> None:
    """Its recipe is one that a point of the space can be trained by: rank, columns and base model are its own."""
    from qrlora.method.space import load_space
    from qrlora.models.training.recipe import Recipe

    assert "In seconds" not in visitor.get("/train").text
    assert visitor.submit("/explore/space", role="style").status_code == 200
    space = studio.registry.get("styles")
    assert "In seconds" in visitor.get("/train").text
    where = begin(visitor, role="style", preset=f"space:{space.digest}").headers["hx-redirect"]
    folder = studio.runs.folder(where.rpartition("/")[2])
    studio.runs.stop(folder.name)
    recipe = Recipe.of(json.loads((folder / "recipe.json").read_text()))
    assert recipe.space and recipe.learning_rate == 0.03
    mean = load_space(recipe.space).mean.metadata
    assert (recipe.rank, recipe.basis_rank, recipe.columns) == (mean.rank, mean.basis_rank, mean.columns)


def test_two_mixes_are_measured_and_voted_on(studio: Studio, visitor: Visitor) -> None:
    teapot, gold = (studio.registry.get(name).digest for name in ("teapot", "gold"))
    brand = 'name = "B"\n[palette]\ncolours = ["#d7263d"]\ntolerance = 20\nat_least = 0.9\nwhere = "picture"\n'
    where = visitor.submit("/prove", a=teapot, b=gold, prompts="a mug\na hat", seeds="2", brand=brand)
    assert where.status_code == 204, where.text
    path = where.headers["hx-redirect"]
    end = time.monotonic() + 300
    while "progress" in (page := visitor.get(path).text):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "pictures pass" in page and "structure" in page and "texture" in page, page[-3000:]
    report = re.search(r'href="/library/(sha256:[0-9a-f]+)">Report', page)
    assert report and {edge.source for edge in studio.registry.edges(report[1], into=True)} == {teapot, gold}
    assert "No vote counts yet" in visitor.get(f"{path}/tally", headers={"HX-Request": "true"}).text
    for _ in range(20):
        ballot = visitor.get(f"{path}/vote", headers={"HX-Request": "true"}).text
        if (trial := re.search(r'name="trial" value="([0-9a-f]+)"', ballot)) is None:
            break
        assert "teapot" not in ballot and "gold" not in ballot
        visitor.submit(f"{path}/vote", trial=trial[1], choice="tie")
    assert "All pairs are done" in ballot
    wrong = visitor.submit(f"{path}/vote", trial="0", choice="left")
    assert wrong.status_code == 400


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompts": ""}, "no prompts"),
        ({"b": "teapot"}, "compared with itself"),
        ({"brand": "what = ["}, "no brand sheet"),
        ({"brand": '[[logo]]\npicture = "/etc/passwd"'}, "a logo is a file"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(visitor: Visitor, fields: dict[str, str], words: str) -> None:
    answer = visitor.submit("/prove", **{"a": "teapot", "b": "gold", "prompts": "a mug", **fields})
    assert answer.status_code == 400 and words in answer.text


# What is shipped


def test_every_vendored_file_is_in_the_notice() -> None:
    folder = HERE / "static" / "vendor"
    notice = (folder / "NOTICE").read_text()
    for path in folder.iterdir():
        assert path.name == "NOTICE" or path.name in notice


def test_the_first_page_waits_for_no_torch(tmp_path: Path) -> None:
    code = "import sys, qrlora.apps.studio.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_lazy_engine_tells_what_it_waits_for(tmp_path: Path) -> None:
    engine = LazyEngine("pico", tmp_path)
    with pytest.raises(RequestError, match="still being loaded"):
        asyncio.run(engine.facts())
