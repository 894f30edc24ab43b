"""Every number of the demo: tasks, methods, budget, and the prompts that are judged afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from qrlora.lab.compare.plan import COMPOSED, DEFAULT, balance_of, rate_of
from qrlora.lab.tasks import (
    RECIPES,
    TRAINING_STYLE,
    TRAINING_SUBJECT,
    LabelledPrompt,
    Task,
    recipe_fields,
)
from qrlora.method.adapter import Adapter
from qrlora.method.composition import default_strength
from qrlora.pico import SETTINGS, world

METHODS = (DEFAULT, "qrlora_published", "lora")
"""Names of `lab.tasks.RECIPES` that are compared, this package's default first."""

AIM = 0.8
"""Share of pictures that should be right."""


@dataclass(frozen=True)
class Budget:
    """Steps, pictures and settings, chosen so that the demo takes less than four minutes on two cores."""

    rank: int = 16
    steps: int = 240
    cooldown: float = 0.5  # the last share of the steps, in which the learning rate falls to zero
    batch_size: int = 4
    pictures: int = 16  # a score is counted over about this many
    denoising_steps: int = SETTINGS["steps"]
    guidance: float = SETTINGS["guidance"]
    weights: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)  # of both adapters, in the grid


def questions(subject: Task, style: Task, budget: Budget, seed: int) -> dict[str, list[LabelledPrompt]]:
    """Return prompts by question: "subject_alone", "style_alone", "composed", and "base" for the base model alone."""
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


def recipe_of(task: Task, budget: Budget, seed: int, method: str) -> dict[str, Any]:
    """Return the recipe of one method for one task; all but RECIPES and the learning rate is common to all methods."""
    common = recipe_fields(
        task,
        rank=budget.rank,
        steps=budget.steps,
        cooldown=budget.cooldown,
        batch_size=budget.batch_size,
        learning_rate=rate_of(method, task.role, task.name),
        seed=seed,
    )
    return {**RECIPES[method], **common}


def null_space_of(method: str, pair: Sequence[Adapter]) -> float:
    """Return the strength of null-space projection in a method's compositions: the package's default for its default
    method, 0 for the others."""
    return default_strength(pair) if method == DEFAULT else 0.0


def weights_of(method: str, subject: Task, style: Task) -> tuple[float, float]:
    """Return the weights of subject and style where a method of METHODS composes them."""
    return balance_of(COMPOSED if method == DEFAULT else method, subject.name, style.name)
