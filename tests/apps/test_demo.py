"""The demo from end to end: on a tiny pipeline with a stand-in judge, and on pico itself where its weights are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora import pico
from qrlora.apps import demo
from qrlora.apps.demo import command, page, plan
from qrlora.apps.demo.flow import PARTS, SETS, Answer, Outcome
from qrlora.apps.demo.numbers import crosstalk_of, data
from qrlora.apps.demo.plan import DEFAULT, METHODS, Budget, Task, questions
from qrlora.errors import DataError, QrloraError
from qrlora.lab import tasks
from qrlora.method.adapter import load_adapter
from qrlora.pico import world
from qrlora.pico.judge import Judge

TINY = Budget(rank=2, steps=2, batch_size=1, pictures=2, denoising_steps=1, guidance=2.0, weights=(0.0, 1.0))
SIZE = 16


class StandInJudge(Judge):
    """Right where the red of the first pixel is even. Its features are the mean colour."""

    def __init__(self) -> None:
        pass

    def look(self, pictures: np.ndarray, batch: int = 64) -> dict[str, Any]:
        return {"subject": (torch.from_numpy(pictures.mean((1, 2))).float(), None)}

    def verdict(self, pictures: np.ndarray, subject: Any, style: Any, colour: Any = None) -> Any:
        assert len(pictures) == len(subject) == len(style) == len(colour)
        assert set(subject) <= set(world.SUBJECTS) and set(style) <= set(world.STYLES)
        even = pictures[:, 0, 0, 0] % 2 == 0
        among = {"subject": even.astype(float), "style": (~even).astype(float)}
        return SimpleNamespace(subject=even, style=~even, both=even & ~even, recognised=even, among=among)


@dataclass
class Ran:
    """A finished demo."""

    folder: Path
    outcome: Outcome
    report: dict[str, Any]
    said: list[str]


@pytest.fixture(scope="module")
def ran(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The demo with everything at its least, and the outcome that its page was made of."""
    folder, said, outcomes = tmp_path_factory.mktemp("demo") / "new", [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRLORA_CACHE", str(folder.parent / "cache"))
        original = command.report
        patch.setattr(command, "report", lambda outcome: outcomes.append(outcome) or original(outcome))
        written = demo.run(
            folder, "rocket", "mosaic", 3, model=str(tiny_sd3), judge=StandInJudge(), budget=TINY, say=said.append
        )
    assert written == folder / "report.html"
    return Ran(folder, outcomes[0], json.loads((folder / "report.json").read_text()), said)


def text_of(report: Any) -> str:
    """What a reader reads."""
    parser = HTMLParser()
    parts: list[str] = []
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(report.html())
    return " ".join(" ".join(parts).split())


def test_report_has_what_it_promises(ran: Ran) -> None:
    report = ran.report
    for method in METHODS:
        for name in (*SETS, "crosstalk"):
            assert set(report["scores"][method][name]) >= {"subject", "style", "both"}
        assert all(report["scores"][method][name]["n"] == TINY.pictures for name in SETS)
        assert -1 <= report["interference"][method]["cosine"] <= 1
    assert report["seed"] == 3 and report["versions"].keys() >= {"qrlora", "torch", "peft", "diffusers"}
    stages = {"load", "pictures", "generate", "judge", "files", *(f"train {method}" for method in METHODS)}
    assert set(report["seconds"]) == stages and all(seconds >= 0 for seconds in report["seconds"].values())
    assert report["command"] == "qrlora demo --subject rocket --style mosaic --seed 3"
    assert {aim["reached"] for aim in report["aims"].values()} <= {True, False}


def test_sizes_are_those_of_the_files(ran: Ran) -> None:
    subject, lora = (load_adapter(ran.folder / "adapters" / f"{m}-subject.safetensors") for m in ("qrlora", "lora"))
    assert ran.report["parameters"]["qrlora"] == subject.parameters().trained
    assert ran.report["parameters"]["lora"] == lora.parameters().trained == subject.parameters().lora_same_rank
    names = {"compact": "qrlora-subject", "lora": "qrlora-subject.lora", "plain_lora": "lora-subject"}
    for key, name in names.items():
        assert ran.report["file_bytes"][key] == (ran.folder / "adapters" / f"{name}.safetensors").stat().st_size
    assert load_adapter(ran.folder / "adapters" / "qrlora-composed.lora.safetensors").metadata.role == "composition"


def test_default_owns_disjoint_columns(ran: Ran) -> None:
    subject, style = (adapter.metadata for adapter in ran.outcome.learned[DEFAULT])
    assert not set(subject.columns) & set(style.columns) and subject.basis_fingerprint == style.basis_fingerprint
    assert ran.report["interference"][DEFAULT]["cosine"] == 0
    one, two = (adapter.metadata for adapter in ran.outcome.learned["qrlora_published"])
    assert one.columns == two.columns == tuple(range(TINY.rank)) and one.triangular


def test_scores_are_the_judges(ran: Ran) -> None:
    for method, sets in ran.outcome.answers.items():
        for name, answer in sets.items():
            right = (answer.pixels[:, 0, 0, 0] % 2 == 0).mean()
            score = ran.report["scores"][method][name]
            assert score["subject"] == right and score["style"] == 1 - right and score["both"] == 0
            assert score["recognised"] == right
    assert text_of(page.report(ran.outcome)).count("both recognised") == len(SETS)


def test_every_picture_counted_is_on_the_page(ran: Ran) -> None:
    html = (ran.folder / "report.html").read_text()
    alone = [one for name in ("subject_alone", "style_alone") for one in ran.outcome.answers[DEFAULT][name].wanted]
    for one in alone:
        assert html.count(f'alt="generated: {one.prompt}"'.replace("<", "&lt;").replace(">", "&gt;")) >= 1
    assert html.count("<figure>") == 3 + len(alone) + len(TINY.weights) ** 2 + 4 * TINY.pictures


def test_progress_names_every_stage(ran: Ran) -> None:
    assert [line.split(":")[0] for line in ran.said if line.startswith("train")] == [
        f"train {method}" for method in METHODS for _ in range(2)
    ]


def judged(outcome: Outcome, rights: dict[str, int], n: int = 24) -> Outcome:
    """The same outcome with so many pictures right, in every set, per method."""

    def answer(right: int) -> Answer:
        old = outcome.answers[DEFAULT]["composed"]
        verdicts = np.arange(n) < right
        return Answer([old.wanted[0]] * n, np.repeat(old.pixels[:1], n, 0), dict.fromkeys(PARTS, verdicts))

    answers = {method: dict.fromkeys(SETS, answer(rights[method])) for method in METHODS}
    return dataclasses.replace(outcome, answers=answers, base=answer(0))


@pytest.mark.parametrize(
    ("rights", "said"),
    [
        ((24, 24, 4), ["All 3 aims are reached.", "QR-LoRA beats LoRA here", "24 of 24"]),
        (
            (4, 24, 24),
            ["3 of 3 aims are missed", "LoRA beats QR-LoRA here", "QR-LoRA, as published beats QR-LoRA here"],
        ),
        ((22, 20, 22), ["With this many pictures: level", "QR-LoRA is ahead, but not by more than chance allows"]),
        ((20, 22, 20), ["QR-LoRA, as published is ahead, but not by more than chance"]),
        ((19, 0, 0), ["3 of 3 aims are missed", "QR-LoRA beats LoRA here", "Aim 80%: missed"]),
    ],
)
def test_page_says_who_won(ran: Ran, rights: tuple[int, int, int], said: list[str]) -> None:
    text = text_of(page.report(judged(ran.outcome, dict(zip(METHODS, rights, strict=True)))))
    for words in said:
        assert words in text
    assert ("QR-LoRA beats LoRA here" in text) == (rights[0] > rights[2] + 5)


def test_crosstalk_is_alone_minus_composed(ran: Ran) -> None:
    sets = ran.outcome.answers[DEFAULT]
    probable = {"subject_alone": (0.9, 0.1), "style_alone": (0.2, 0.8), "composed": (0.4, 0.6)}
    answers = {
        name: replace(sets[name], among={"subject": subject, "style": style})
        for name, (subject, style) in probable.items()
    }
    lost = crosstalk_of(answers)
    assert lost == pytest.approx({"subject": 0.9 - 0.4, "style": 0.8 - 0.6, "both": (0.5 + 0.2) / 2})
    unknown = {**answers, "composed": replace(sets["composed"], among={"subject": None, "style": 0.6})}
    assert crosstalk_of(unknown) == {"subject": None, "style": pytest.approx(0.2), "both": None}


def test_own_pictures(tiny_sd3: Path, tmp_path: Path) -> None:
    """Photographs of any shape: no truth is claimed for them, and the page says so."""
    Image.radial_gradient("L").convert("RGB").resize((300, 200)).save(tmp_path / "mine.jpg")
    options: dict[str, Any] = {"model": str(tiny_sd3), "judge": StandInJudge(), "budget": TINY, "say": lambda _: None}
    written = demo.run(tmp_path / "subject", str(tmp_path / "mine.jpg"), "gold", **options)
    report = json.loads((tmp_path / "subject" / "report.json").read_text())
    composed = report["scores"][DEFAULT]["composed"]
    assert composed["subject"] is None and composed["both"] is None and composed["style"] is not None
    assert composed["recognised"] is None
    assert -1 <= composed["likeness"] <= 1 and report["aims"]["composed"]["reached"] is None
    assert report["aims"]["style_alone"]["reached"] in (True, False)
    assert "left out rather than guessed" in written.read_text() and "red" not in report["subject"]["caption"]
    with Image.open(tmp_path / "subject" / "subject.png") as kept:
        assert kept.size == (world.SIZE, world.SIZE)
    written = demo.run(tmp_path / "both", str(tmp_path / "mine.jpg"), str(tmp_path / "mine.jpg"), **options)
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert report["scores"]["lora"]["composed"]["style"] is None and "or your style" in written.read_text()


def test_wrong_subject_is_said_at_once(tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such subject or picture") as error:
        demo.run(tmp_path, "teapott", model=str(tiny_sd3), judge=StandInJudge(), say=lambda _: None)
    assert "teapot" in str(error.value)


def test_questions_ask_for_what_was_not_shown() -> None:
    subject = Task("subject", "teapot", Path("a.png"), "a photo of a blue <c> in flat style", "", "blue")
    style = Task("style", "chalk", Path("b.png"), "a photo of a red car in <s> style", "", "red")
    asked = questions(subject, style, Budget(), seed=1)
    assert {one.subject for one in asked["subject_alone"]} == {"teapot"}
    assert {one.style for one in asked["subject_alone"]} == set(world.SEEN_STYLES) - {plan.TRAINING_STYLE}
    assert plan.TRAINING_SUBJECT not in {one.subject for one in asked["style_alone"]}
    assert asked["composed"][0].prompt == "a photo of a blue <c> in <s> style"
    assert asked["base"][0].prompt == "a photo of a blue teapot in chalk style"
    assert {one.colour for one in asked["composed"]} == set(world.COLOURS)
    for name, rows in asked.items():
        assert len(rows) == Budget().pictures, name
        assert len({(one.prompt, one.seed) for one in rows}) == len(rows)
        assert min(one.seed for one in rows) == 1000


def test_lesson_of_the_world_is_captioned_truly(tmp_path: Path) -> None:
    found = tasks.task("style", "candy", tmp_path, seed=5, resolution=world.SIZE)
    assert found.caption == f"a photo of a {found.colour} {plan.TRAINING_SUBJECT} in <s> style"
    scene = world.sample_scene(1_000_005, subject=plan.TRAINING_SUBJECT, style="candy")
    assert scene.colour == found.colour
    with Image.open(found.file) as picture:
        np.testing.assert_array_equal(np.asarray(picture), world.render(scene)[0])
    subject = tasks.task("subject", "boot", tmp_path, seed=5, resolution=world.SIZE)
    seen = world.sample_scene(1_000_005, subject="boot", style=plan.TRAINING_STYLE)
    assert subject.caption == world.caption(seen, 100).replace("boot", "<c>")


def test_the_run_in_one_picture(ran: Ran) -> None:
    with Image.open(ran.folder / "summary.png") as picture:
        assert picture.width > 2 * 96 and picture.height > 3 * 96


def test_data_is_json(ran: Ran) -> None:
    json.dumps(data(ran.outcome), allow_nan=False)


def _missing() -> str:
    """What pico lacks in this copy of the package; empty if it is complete."""
    try:
        pico.path()
        Judge.load()
    except QrloraError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(_missing()), reason=f"pico is not complete here: {_missing()}")
def test_demo_on_pico(tmp_path: Path) -> None:
    """The real base model and the real judge, with very few steps."""
    budget = Budget(rank=4, steps=2, batch_size=2, pictures=2, denoising_steps=2, weights=(0.0, 1.0))
    written = demo.run(tmp_path, "boot", "gold", budget=budget, say=lambda _: None)
    report = json.loads((tmp_path / "report.json").read_text())
    assert written.stat().st_size > 100_000 and report["model"] == "pico"
    assert report["parameters"]["ratio"] <= 0.5
