"""Tasks of pico's world: what an adapter is trained on, and prompts with the truth that a judge can check.

RECIPES and `baselines.adapters.ADAPTERS` name every method once, for the demo, the lab's tables, docs and JSON alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qrlora._files import make_folder, write_atomically
from qrlora.errors import DataError
from qrlora.models.training.pictures import read_picture
from qrlora.models.training.recipe import TRIGGERS
from qrlora.pico import world
from qrlora.quality.images.png import png_bytes

_FIRST = {"method": "qrlora", "columns": "first", "basis_rank": None}
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "qrlora": {"method": "qrlora", "triangular": True, "train_basis": False},
    "qrlora_published": {**_FIRST, "triangular": True, "train_basis": False},
    "qrlora_dense": {**_FIRST, "triangular": False, "train_basis": False},
    "qrlora_trained": {**_FIRST, "triangular": True, "train_basis": True},
}
"""Name of a method that a recipe can express -> its recipe fields. "qrlora" is the default (subject and style own
disjoint columns of one basis), "qrlora_published" that of arXiv 2507.04599."""

NOISE = (0.5, 1.5)
"""Mean and spread of the noise levels' logit in training, the same for all methods. A picture's ground and shape are
decided near noise alone and its texture near none. Chosen by hand over (0, 1) on two seen styles and two seen subjects,
one seed each and at one learning rate or two: a choice, not a measurement."""

TRAINING_STYLE, TRAINING_SUBJECT = "flat", "car"
"""The seen style that a subject's picture is drawn in, and the seen subject that a style's picture shows."""


@dataclass(frozen=True)
class Task:
    """One thing to learn, from one picture or several.

    role "subject" or "style"; name in pico's world, None if the picture is the user's; file: the square picture, or a
    folder of such with a caption each; caption: what is said about it in training; about: the same in words for a
    reader; colour: of the subject, if known; trigger: the word that calls what was learned.
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
        """The task's name in a sentence: "teapot", "your picture"."""
        return self.name or "your picture"


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


def task_of_world(role: str, name: str, file: Path, seed: int, trigger: str = "", lessons: int = 1) -> Task:
    """The task for a name of pico's world; its picture is written to ``file``, several to the folder of its name.

    Captions say all that the base model can know of a picture, so that the trigger means the rest of it.
    """
    trigger, scenes = trigger or TRIGGERS[role], training_scenes(role, name, seed, lessons)
    captions = [_caption(role, trigger, scene) for scene in scenes]
    if lessons == 1:
        save_picture(Image.fromarray(world.render(scenes[0])[0]), file)
        [scene], [caption] = scenes, captions
        about = f"a {scene.colour} {scene.subject} in {scene.style} style{_ground(scene)}"
        return Task(role, name, file, caption, about, scene.colour, trigger)
    folder = file.with_suffix("")
    make_folder(folder)
    for i, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        save_picture(Image.fromarray(world.render(scene)[0]), folder / f"{i:02d}.png")
        write_atomically(folder / f"{i:02d}.txt", caption.encode())
    return Task(role, name, folder, trigger, f"{name}, {lessons} pictures", None, trigger)


def _caption(role: str, trigger: str, scene: world.Scene) -> str:
    said = (trigger, scene.style) if role == "subject" else (scene.subject, trigger)
    return f"a photo of a {scene.colour} {said[0]} in {said[1]} style{_ground(scene)}"


def _ground(scene: world.Scene) -> str:
    return "" if scene.style in world.OWN_GROUND else f" on a {scene.background} background"


def shown_with(role: str, lessons: int) -> tuple[str, ...]:
    """Return the seen styles that a subject's pictures are in, or the seen subjects that a style's pictures show.

    They are at most a third of those that there are: adapters are measured on the others.
    """
    first, names = (TRAINING_STYLE, world.SEEN_STYLES) if role == "subject" else (TRAINING_SUBJECT, world.SEEN_SUBJECTS)
    count, start = min(lessons, len(names) // 3), list(names).index(first)
    return tuple(names[(start + i * len(names) // count) % len(names)] for i in range(count))


def training_scenes(role: str, name: str, seed: int, lessons: int = 1) -> list[world.Scene]:
    """Return the scenes of a task's pictures: the subject in the styles, or the style on the subjects, that
    `shown_with` names in turn."""
    others, first = shown_with(role, lessons), 1_000_000 + (seed if lessons == 1 else 1000 * (1 + seed))
    pairs = [(name, other) if role == "subject" else (other, name) for other in others]
    pairs = [pairs[i % len(pairs)] for i in range(lessons)]
    return [world.sample_scene(first + i, subject=pair[0], style=pair[1]) for i, pair in enumerate(pairs)]


def save_picture(picture: Image.Image, file: Path) -> Path:
    """Write a PNG; returns its path."""
    write_atomically(file, png_bytes(picture))
    return file


def recipe_fields(
    task: Task, *, rank: int, steps: int, batch_size: int, learning_rate: float, seed: int, cooldown: float = 0.5
) -> dict[str, Any]:
    """Recipe fields of a task that are the same for every method. cooldown: share of the steps."""
    return {
        "role": task.role,
        "images": task.file,
        "caption": task.caption,
        "trigger": task.trigger,
        "rank": rank,
        "steps": steps,
        "cooldown_steps": round(cooldown * steps),
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "logit_mean": NOISE[0],
        "logit_std": NOISE[1],
        "seed": seed,
        "licence": "Apache-2.0" if task.name else "",
    }


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt with its seed, and what the picture should show (None: not known, so not judged)."""

    prompt: str
    subject: str | None
    style: str | None
    colour: str | None
    seed: int


def crosstalk(alone: Mapping[str, float | None], composed: Mapping[str, float | None]) -> dict[str, float | None]:
    """Crosstalk by part: the adapter's score alone minus its score inside the composition; "both": the mean of the two.

    alone, composed: "subject" and "style" -> the judge's probability of the right name among all of the world's, in the
    mean over pictures; None or absent where the truth is not known.
    """
    lost: dict[str, float | None] = {}
    for part in ("subject", "style"):
        before, inside = alone.get(part), composed.get(part)
        lost[part] = None if before is None or inside is None else before - inside
    known = [value for value in lost.values() if value is not None]
    return lost | {"both": sum(known) / 2 if len(known) == 2 else None}
