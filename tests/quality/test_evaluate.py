"""`qrlora evaluate` and `qrlora study` on the command line: what they write, what they say, and how they refuse."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qrlora.apps.cli import main
from qrlora.pico import world

SHEET = """
name = "Mugs"
[[forbidden]]
colour = "#0000ff"
[composition]
passing = 0.5
"""


def scenes(folder: Path, count: int, masks: bool = False, **parts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels, mask = world.render(world.sample_scene(i, **parts))
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if masks:
            Image.fromarray((255 * mask).astype(np.uint8)).save(folder / f"{i}.mask.png")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    scenes(tmp_path / "mugs", 3, True, subject="mug", style="flat", colour="red")
    scenes(tmp_path / "neon", 2, subject="mug", style="neon", colour="red")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    (tmp_path / "brand.toml").write_text(SHEET)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], code: int = 0) -> str:
    assert main(list(arguments)) == code
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err if code == 2 else found.out


def test_folders_are_groups_on_terminal_page_and_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, ["evaluate", "mugs", "neon", "blue.png", "--subject", "mugs/0.png", "--training", "mugs/0.png"])
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert out.splitlines()[0].split() == ["better", "pictures", "mugs", "neon"]
    assert "1.000)" in lines["edges"] and "higher" in lines["edges"] and "copied" in lines
    assert "mugs: copies of a training picture: 0.png" in out
    data = json.loads(Path("evaluation/report.json").read_text())
    assert [one["name"] for one in data["groups"]["mugs"]["pictures"]] == ["0.png", "1.png", "2.png"]
    assert data["groups"]["neon"]["summary"]["edges"]["n"] == 2
    rows = list(csv.DictReader(Path("evaluation/pictures.csv").read_text().splitlines()))
    assert len(rows) == 6 and float(rows[1]["edges"]) == data["groups"]["mugs"]["pictures"][0]["metrics"]["edges"]
    page = Path("evaluation/report.html").read_text()
    assert page.count("<img") == 6 + 2 and "boundary F-measure" in page


def test_a_default_report_is_never_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "mugs", "--style", "neon"]
    said(capsys, arguments)
    assert "already there" in said(capsys, arguments, 2)
    said(capsys, [*arguments, "-o", "evaluation2"])


def test_a_brand_sheet_decides_the_exit_code_only_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    good = said(capsys, ["evaluate", "mugs", "--brand", "brand.toml", "--strict", "-o", "a"])
    assert "mugs: 3 of 3, 95% interval 44 to 100%: enough pass the brand sheet" in good
    bad = ["evaluate", "mugs", "blue.png", "--brand", "brand.toml", "-o", "b"]
    out = said(capsys, bad)
    assert "blue.png: 100 % of the picture is #0000ff within ΔE 5, which is forbidden" in out
    said(capsys, [*bad, "--strict"], 1)
    data = json.loads(Path("b/report.json").read_text())
    assert data["passes"] is False and data["groups"]["mugs"]["brand"]["passes"] is True
    assert data["groups"]["pictures"]["pictures"][0]["brand"]["reasons"]
    assert "which is forbidden" in Path("b/report.html").read_text()
    assert next(csv.DictReader(Path("b/pictures.csv").read_text().splitlines()))["passes"] == "no"


def test_a_sheet_measures_what_it_has_limits_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("limits.toml").write_text('palette = {colours = ["#d7263d"]}\nscores = {palette_subject = 60, copied = 0.9}\n')
    out = said(capsys, ["evaluate", "mugs", "--brand", "limits.toml", "--training", "mugs/1.png"])
    assert "  1.png: copied is 1; at most 0.9 is required" in out
    assert "copied lacks an input" in said(capsys, ["evaluate", "mugs", "--brand", "limits.toml", "-o", "b"], 2)


def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(said(capsys, ["evaluate", "mugs", "--palette", "#d7263d,f00", "--json"]))
    assert data["metrics"]["palette"]["unit"] == "ΔE00" and data["brand"] is None and data["passes"] is None
    assert json.loads(Path("evaluation/report.json").read_text()) == data


def test_the_schema_of_sheets_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--brand-schema"]) == 0
    committed = Path(__file__).parents[2] / "brands" / "brand.schema.json"
    assert capsys.readouterr().out == committed.read_text()


def test_a_composition_is_made_first_and_kept(tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(tiny_sd3), "--rank", "2", "--steps", "2", "--batch-size", "1", "--noun", "mug"]
    Image.radial_gradient("L").convert("RGB").save("learn.png")
    for role in ("subject", "style"):
        assert main(["train", f"--{role}", "learn.png", *common, "-o", f"{role}.safetensors"]) == 0
    prompts = ["--prompt", "a <c> mug", "--prompt", "a <c> mug in <s> style"]
    options = ["--model", str(tiny_sd3), "--steps", "1", "--seeds", "2", "--style", "learn.png"]
    capsys.readouterr()
    out = said(capsys, ["evaluate", "subject.safetensors:0.9", "style.safetensors", *prompts, *options])
    title = "subject 0.9 + style 1, null-space projection 0.5"  # as `generate` makes them
    assert title in out
    made = sorted(Path("evaluation/pictures").iterdir())
    assert [path.name for path in made][::2] == ["00-a-c-mug-seed0.png", "01-a-c-mug-in-s-style-seed0.png"]
    data = json.loads(Path("evaluation/report.json").read_text())
    pictures = data["groups"][title]["pictures"]
    assert [one["prompt"] for one in pictures] == ["a <c> mug"] * 2 + ["a <c> mug in <s> style"] * 2
    way = ["evaluate", "subject.safetensors:90", "style.safetensors:90", *prompts[2:], *options, "-o"]
    assert "style 90, null-space projection 1" in said(capsys, [*way, "way", "--null-space", "1"])
    said(capsys, [*way, "sum", "--null-space", "0"])
    first = "pictures/00-a-c-mug-in-s-style-seed0.png"
    kept, summed = (np.asarray(Image.open(Path(folder, first))).astype(int) for folder in ("way", "sum"))
    assert abs(kept - summed).max() > 1
    # They are measured alike when they are given as pictures.
    again = json.loads(said(capsys, ["evaluate", "evaluation/pictures", "--style", "learn.png", "--json", "-o", "b"]))
    assert again["groups"]["pictures"]["pictures"] == pictures
    refused = said(capsys, ["evaluate", "subject.safetensors", "--style", "learn.png", "-o", "c"], 2)
    assert "no prompt to sample with" in refused
    refused = said(capsys, ["evaluate", "subject.safetensors", "mugs", "--style", "learn.png", "-o", "c"], 2)
    assert "adapters and pictures in one evaluation" in refused
    refused = said(capsys, ["evaluate", "mugs", "--style", "learn.png", "--null-space", "0.5", "-o", "c"], 2)
    assert "null-space projection needs several adapters" in refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to evaluate"),
        (["mugs"], "nothing to compare the pictures with"),
        (["nowhere", "--style", "neon"], "no such picture or folder: nowhere"),
        (["mugs", "--style", "missing.png"], "no such picture: missing.png"),
        (["mugs", "--style", "brand.toml"], "not a picture: brand.toml"),
        (["mugs", "--style", "neon", "--metrics", "colors"], "did you mean colours?"),
        (["mugs", "--style", "neon", "--metrics", "edges"], "--subject"),
        (["mugs", "--style", "neon", "--metrics", "csd"], "CSD has no weights here"),
        (["mugs", "--style", "neon", "--metrics", "csd", "--weights", "csd=brand.toml"], "unreadable weights"),
        (["mugs", "--palette", "red"], "unreadable palette"),
        (["mugs", "--style", "neon", "--prompt", "a", "--prompt", "b"], "one prompt each"),
        (["mugs", "--style", "neon", "--strict"], "--strict needs a brand sheet"),
        (["mugs", "--brand", "missing.toml"], "cannot read the brand sheet"),
        (["mugs", "--brand", "blue.png"], "cannot read the brand sheet"),
    ],
)
def test_what_cannot_be_evaluated_is_said(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in said(capsys, ["evaluate", *arguments], 2)
    assert not Path("evaluation").exists()


def test_unknown_networks_are_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "mugs", "--weights", "dinosaur=x"]) == 2
    assert "NAME one of dino, clip, csd, lpips" in capsys.readouterr().err


# study


def answers(key: dict, choose: str) -> dict:
    """A file of results: of every pair the picture of one arm, of every catch trial what is right."""
    votes = []
    for token, trial in key["trials"].items():
        if trial["kind"] == "pair":
            choice = next(side for side in "ab" if key["pictures"][trial[side]]["arm"] == choose)
        else:
            choice = "tie" if trial["right"] == "tie" else "a" if trial["a"] == trial["right"] else "b"
        side = {"a": "left", "b": "right", "tie": "tie"}[choice]
        votes.append({"trial": token, "left": trial["a"], "right": trial["b"], "choice": side})
    return {"study": key["study"], "rater": "ann", "votes": votes}


def test_a_study_is_made_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    scenes(Path("other"), 3, subject="mug", style="ink")
    out = said(capsys, ["study", "mugs", "other", "--reference", "blue.png", "--question", "Which mug?"])
    assert "3 pairs and 4 catch trials" in out and sorted(p.name for p in Path("study").iterdir()) == [
        "key.json",
        "vote.html",
    ]
    key = json.loads(Path("study/key.json").read_text())
    Path("votes.json").write_text(json.dumps(answers(key, "other")))
    out = said(capsys, ["study", "--tally", "votes.json", "-o", "counted"])
    assert "mugs against other: 0% (0 of 3" in out and "Which mug?" in Path("counted/report.html").read_text()
    data = json.loads(said(capsys, ["study", "--tally", "votes.json", "--json"]))
    assert data["pairs"][0]["losses"] == 3 and data["raters"] == {"ann": 3}
    assert "already there" in said(capsys, ["study", "mugs", "other"], 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mugs"], "at least two folders"),
        (["mugs", "neon"], "no counterpart"),
        (["mugs", "mugs"], "one folder named twice"),
        (["mugs", "blue.png"], "no folder: blue.png"),
        (["--tally", "missing.json"], "cannot read the key"),
        (["--tally", "missing.json", "--key", "brand.toml"], "is no JSON"),
        (["--tally", "missing.json", "--key", "list.json"], "is no key of a study"),
        (["--tally", "missing.json", "--key", "empty.json"], "no key of a study"),
        (["mugs", "--tally", "missing.json"], "--tally counts votes"),
    ],
)
def test_what_cannot_be_asked_or_counted_is_said(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("list.json").write_text("[]")
    Path("empty.json").write_text("{}")
    assert words in said(capsys, ["study", *arguments], 2)
    assert not Path("study").exists()
