"""What the demo teaches, how, how much of it, and what it asks for afterwards: every number of the demo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

from qrlora._files import write_atomically
from qrlora.errors import DataError
from qrlora.lab.compare.plan import COMPOSED, balance_of, rate_of
from qrlora.models.training.pictures import read_picture
from qrlora.models.training.recipe import TRIGGERS
from qrlora.pico import SETTINGS, world
from qrlora.quality.report import png_bytes

METHODS: dict[str, dict[str, Any]] = {
    "qrlora": {"method": "qrlora"},
    "qrlora_published": {"method": "qrlora", "columns": "first"},
    "lora": {"method": "lora"},
}
"""Name in the report -> what distinguishes its recipe."""
TUNED = {"qrlora": "qrlora_disjoint", "qrlora_published": "qrlora", "lora": "lora"}
"""Name in the report -> method in the bench, whose learning rates the demo takes: `qrlora bench --tune` chose them."""
BALANCED = TUNED | {"qrlora": COMPOSED}
"""Name in the report -> row of the bench, whose weights in a composition the demo takes."""
GIVING_WAY = {"qrlora": 0.5}
"""Name in the report -> share that each adapter gives up to the other in a composition, if any: as the row does."""
DEFAULT = "qrlora"
"""The project's default: subject and style own disjoint columns of one basis, which is what their roles ask for."""

NOISE = (0.5, 1.5)
"""Mean and spread of the noise levels' logit in training, the same for all methods. A picture's ground and shape are
decided near noise alone and its texture near none. Chosen by hand over (0, 1) on two seen styles and two seen subjects,
one seed each and at one learning rate or two: a choice, not a measurement."""

LESSON_STYLE, LESSON_SUBJECT = "flat", "car"
"""The seen style that a subject's picture is drawn in, and the seen subject that a style's picture shows."""
AIM = 0.8
"""Share of pictures that should be right."""


@dataclass(frozen=True)
class Budget:
    """How much of everything: chosen so that all of it takes less than four minutes on two cores."""

    rank: int = 16
    steps: int = 240
    cooldown: float = 0.5  # the last share of the steps, in which the learning rate falls to zero
    batch_size: int = 4
    pictures: int = 16  # a score is counted over about this many
    denoising_steps: int = SETTINGS["steps"]
    guidance: float = SETTINGS["guidance"]
    weights: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)  # of both adapters, in the grid


@dataclass(frozen=True)
class Lesson:
    """One thing to learn from one picture.

    role "subject" or "style"; name in pico's world, None if the picture is the user's; file: the square picture;
    caption: what is said about it in training; about: the same in words for a reader; colour: of the subject, if known;
    trigger: the word that calls what was learned.
    """

    role: str
    name: str | None
    file: Path
    caption: str
    about: str
    colour: str | None = None
    trigger: str = ""

    def __post_init__(self) -> None:
        if not self.trigger:
            object.__setattr__(self, "trigger", TRIGGERS[self.role])

    @property
    def called(self) -> str:
        """What a sentence calls it: "teapot", "your picture"."""
        return self.name or "your picture"


def lesson(role: str, wanted: str, folder: Path, seed: int, resolution: int) -> Lesson:
    """The lesson for a name of pico's world or a picture file; its picture is written to ``folder``.

    Raises DataError if ``wanted`` is neither, or the picture cannot be used.
    """
    names = list(world.SUBJECTS if role == "subject" else world.STYLES)
    if wanted in names:
        return lesson_of_world(role, wanted, folder / f"{role}.png", seed)
    if not Path(wanted).is_file():
        raise DataError(
            f"no such {role} or picture",
            expected=f"a picture file, or one of {', '.join(names)}",
            got=wanted,
            remedy="check the path or the spelling",
        )
    picture = read_picture(Path(wanted), resolution)
    trigger = TRIGGERS[role]
    caption = f"a photo of a {trigger}" if role == "subject" else f"a picture in {trigger} style"
    file = _keep(picture, folder / f"{role}.png")
    return Lesson(role, None, file, caption, f"{Path(wanted).name}, cropped to its square")


def lesson_of_world(role: str, name: str, file: Path, seed: int, trigger: str = "") -> Lesson:
    """The lesson for a name of pico's world; its picture is written to ``file``.

    The caption says all that the base model can know of the picture, so that the trigger means the rest of it.
    """
    trigger, scene = trigger or TRIGGERS[role], scene_of_lesson(role, name, seed)
    said = (trigger, LESSON_STYLE) if role == "subject" else (LESSON_SUBJECT, trigger)
    ground = "" if scene.style in world.OWN_GROUND else f" on a {scene.background} background"
    caption = f"a photo of a {scene.colour} {said[0]} in {said[1]} style{ground}"
    _keep(Image.fromarray(world.render(scene)[0]), file)
    about = f"a {scene.colour} {scene.subject} in {scene.style} style{ground}"
    return Lesson(role, name, file, caption, about, scene.colour, trigger)


def scene_of_lesson(role: str, name: str, seed: int) -> world.Scene:
    """What the picture of that lesson shows: the subject in LESSON_STYLE, or LESSON_SUBJECT in the style."""
    subject, style = (name, LESSON_STYLE) if role == "subject" else (LESSON_SUBJECT, name)
    return world.sample_scene(1_000_000 + seed, subject=subject, style=style)


def _keep(picture: Image.Image, file: Path) -> Path:
    write_atomically(file, png_bytes(picture))
    return file


@dataclass(frozen=True)
class Wanted:
    """One picture to ask for: what the model is told, and what it should then show (None: not known, so not judged)."""

    prompt: str
    subject: str | None
    style: str | None
    colour: str | None
    seed: int


def questions(subject: Lesson, style: Lesson, budget: Budget, seed: int) -> dict[str, list[Wanted]]:
    """What every method is asked: "subject_alone", "style_alone", "composed"; and the base model alone: "base"."""
    styles = [name for name in world.SEEN_STYLES if name not in (LESSON_STYLE, style.name)]
    others = [name for name in world.SEEN_SUBJECTS if name not in (LESSON_SUBJECT, subject.name)]
    others = others[:: max(1, round(2 * len(others) / budget.pictures))]
    own, colours = _colours_of(subject), cycle(world.COLOURS)
    a, b = (subject.trigger, subject.name), (style.trigger, style.name)
    plain = (subject.name or subject.trigger, subject.name), (style.name or style.trigger, style.name)
    asked = {
        "subject_alone": [_row(a, (name, name), c) for name, c in zip(styles, cycle(own), strict=False)],
        "style_alone": [_row((name, name), b, c) for name, c in zip(others, colours, strict=False)],
        "composed": [_row(a, b, c) for c in own],
        "base": [_row(*plain, c) for c in own],
    }
    return {name: _with_seeds(rows, budget.pictures, 1000 * seed) for name, rows in asked.items()}


def _colours_of(subject: Lesson) -> list[str | None]:
    """Colours to ask for, the learned picture's first; a user's subject keeps the colours it has."""
    if subject.colour is None:
        return [None]
    colours = list(world.COLOURS)
    first = colours.index(subject.colour)
    return [*colours[first:], *colours[:first]]


def _row(subject: tuple[str, str | None], style: tuple[str, str | None], colour: str | None) -> Wanted:
    """A picture to ask for, at seed 0. subject, style: the word in the prompt, and the name in pico's world."""
    what = f"{colour} {subject[0]}" if colour else subject[0]
    return Wanted(f"a photo of a {what} in {style[0]} style", subject[1], style[1], colour, 0)


def _with_seeds(rows: list[Wanted], pictures: int, first: int) -> list[Wanted]:
    """The rows in turn until there are ``pictures`` of them, each picture at a seed of its own."""
    return [replace(row, seed=first + i) for i, row in enumerate(islice(cycle(rows), pictures))]


def recipe_fields(lesson: Lesson, budget: Budget, seed: int, method: str) -> dict[str, Any]:
    """The recipe of one method for one lesson; all but METHODS and the learning rate is common to all methods."""
    return {
        **METHODS[method],
        "learning_rate": rate_of(TUNED[method], lesson.role, lesson.name),
        "role": lesson.role,
        "images": lesson.file,
        "caption": lesson.caption,
        "rank": budget.rank,
        "steps": budget.steps,
        "cooldown_steps": round(budget.cooldown * budget.steps),
        "batch_size": budget.batch_size,
        "logit_mean": NOISE[0],
        "logit_std": NOISE[1],
        "seed": seed,
        "licence": "Apache-2.0" if lesson.name else "",
    }


def weights_of(method: str, subject: Lesson, style: Lesson) -> tuple[float, float]:
    """Weights of subject and style where a method of METHODS composes them."""
    return balance_of(BALANCED[method], subject.name, style.name)
