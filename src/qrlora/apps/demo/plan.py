"""Every number of the demo: tasks, methods, budget, and the prompts that are judged afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from qrlora.errors import DataError
from qrlora.lab.compare.plan import COMPOSED, DEFAULT, balance_of, rate_of
from qrlora.lab.tasks import (
    NOISE,
    RECIPES,
    TRAINING_STYLE,
    TRAINING_SUBJECT,
    LabelledPrompt,
    Task,
    save_picture,
    task_of_world,
)
from qrlora.models.training.pictures import read_picture
from qrlora.models.training.recipe import TRIGGERS
from qrlora.pico import SETTINGS, world

METHODS = (DEFAULT, "qrlora_published", "lora")
"""Names of `lab.tasks.RECIPES` that are compared, this package's default first."""
NULL_SPACE = {DEFAULT: 0.5}
"""Method -> strength of the null-space projection that its adapters are composed with; the others' are summed."""

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


def task(role: str, wanted: str, folder: Path, seed: int, resolution: int) -> Task:
    """The task for a name of pico's world or a picture file; its picture is written to ``folder``.

    Raises DataError if ``wanted`` is neither, or the picture cannot be used.
    """
    names = list(world.SUBJECTS if role == "subject" else world.STYLES)
    if wanted in names:
        return task_of_world(role, wanted, folder / f"{role}.png", seed)
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
    file = save_picture(picture, folder / f"{role}.png")
    return Task(role, None, file, caption, f"{Path(wanted).name}, cropped to its square")


def questions(subject: Task, style: Task, budget: Budget, seed: int) -> dict[str, list[LabelledPrompt]]:
    """What every method is asked: "subject_alone", "style_alone", "composed"; and the base model alone: "base"."""
    styles = [name for name in world.SEEN_STYLES if name not in (TRAINING_STYLE, style.name)]
    others = [name for name in world.SEEN_SUBJECTS if name not in (TRAINING_SUBJECT, subject.name)]
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


def _colours_of(subject: Task) -> list[str | None]:
    """Colours to ask for, the learned picture's first; a user's subject keeps the colours it has."""
    if subject.colour is None:
        return [None]
    colours = list(world.COLOURS)
    first = colours.index(subject.colour)
    return [*colours[first:], *colours[:first]]


def _row(subject: tuple[str, str | None], style: tuple[str, str | None], colour: str | None) -> LabelledPrompt:
    """A picture to ask for, at seed 0. subject, style: the word in the prompt, and the name in pico's world."""
    what = f"{colour} {subject[0]}" if colour else subject[0]
    return LabelledPrompt(f"a photo of a {what} in {style[0]} style", subject[1], style[1], colour, 0)


def _with_seeds(rows: list[LabelledPrompt], pictures: int, first: int) -> list[LabelledPrompt]:
    """The rows in turn until there are ``pictures`` of them, each picture at a seed of its own."""
    return [replace(row, seed=first + i) for i, row in enumerate(islice(cycle(rows), pictures))]


def recipe_fields(task: Task, budget: Budget, seed: int, method: str) -> dict[str, Any]:
    """The recipe of one method for one task; all but METHODS and the learning rate is common to all methods."""
    return {
        **RECIPES[method],
        "learning_rate": rate_of(method, task.role, task.name),
        "role": task.role,
        "images": task.file,
        "caption": task.caption,
        "rank": budget.rank,
        "steps": budget.steps,
        "cooldown_steps": round(budget.cooldown * budget.steps),
        "batch_size": budget.batch_size,
        "logit_mean": NOISE[0],
        "logit_std": NOISE[1],
        "seed": seed,
        "licence": "Apache-2.0" if task.name else "",
    }


def weights_of(method: str, subject: Task, style: Task) -> tuple[float, float]:
    """Weights of subject and style where a method of METHODS composes them."""
    return balance_of(COMPOSED if method == DEFAULT else method, subject.name, style.name)
