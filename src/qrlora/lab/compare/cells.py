"""Measure one cell: train an adapter; look at it alone, in a composition, over weights, among many.

A cell gives a record of JSON values, and those that sample give a strip of pictures. Both lie in the bench's folder
under the cell's digest (`identity`), so nothing is done twice, and a run can be interrupted anywhere.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from qrlora._files import make_folder, write_atomically
from qrlora.lab.baselines.adapters import train_method
from qrlora.lab.baselines.context import Context
from qrlora.lab.baselines.deltas import Learned, load_learned, save_learned, scaled
from qrlora.lab.baselines.file_measures import between
from qrlora.lab.baselines.merges import MERGES, Schedule, drawing
from qrlora.lab.compare.identity import Cell, Record, digest_of, rates_of, weights_digest
from qrlora.lab.compare.plan import ROWS, Scope, balance_of, rate_of
from qrlora.lab.tasks import (
    TRAINING_STYLE,
    TRAINING_SUBJECT,
    LabelledPrompt,
    Task,
    recipe_fields,
    shown_with,
    task_of_world,
)
from qrlora.models.families import load_pipeline
from qrlora.models.generation import one_batch, or_black
from qrlora.models.training.pictures import open_picture
from qrlora.models.training.recipe import Recipe
from qrlora.pico import world
from qrlora.pico.judge import Judge
from qrlora.quality.images.png import png_bytes

UNRELATED = (("mug", "ink"), ("lamp", "clay"), ("bottle", "risograph"), ("chair", "pixel"))
"""Seen pairs that no adapter should touch: asked for without a trigger, to see how far the pictures drift."""
BATCH = 8
TRUE_SCENES = 3_000_000
"""Scene seed of the first true render that pictures are held against: none that the base or the judge was made of."""


@dataclass(frozen=True)
class Bench:
    """The base model, the judge, and the folder that everything lies in."""

    folder: Path
    scope: Scope
    pipe: Any
    family: Any
    judge: Judge

    @classmethod
    def open(cls, folder: Path, scope: Scope) -> Bench:
        """Raises ModelError if pico or its judge is missing."""
        pipe, family = load_pipeline("pico")
        return cls(folder, scope, pipe, family, Judge.load())

    def file(self, cell: Cell, part: str) -> Path:
        """Return the path of a part of a cell: "records", "adapters" or "pictures"."""
        ending = {"records": "json", "adapters": "safetensors", "pictures": "png"}[part]
        path = self.folder / part / f"{digest_of(cell, self.scope, judged=part == 'records')}.{ending}"
        make_folder(path.parent)
        return path

    def task(self, role: str, name: str, seed: int) -> Task:
        """Return the task of a name; the seed decides its picture. Each subject and style has a trigger of its own, so
        that many can be composed."""
        names = list(world.SUBJECTS if role == "subject" else world.STYLES)
        lessons = self.scope.lessons
        of = f"{role}-{name.replace(' ', '-')}-{seed}" + (f"-of-{lessons}" if lessons > 1 else "")
        file = self.folder / "tasks" / f"{of}.png"
        make_folder(file.parent)
        trigger = f"<{'c' if role == 'subject' else 's'}{names.index(name)}>"
        return task_of_world(role, name, file, seed, trigger, lessons)

    def recipe(self, task: Task, adapter: str, seed: int, rate: float | None = None) -> Recipe:
        """Return the recipe of a task, equal for all methods but for the method and its learning rate.

        A style trains with another seed than a subject: LoRA's adapters would begin at one random A otherwise, read
        nearly the same directions ever after, and be merged at a disadvantage.
        """
        return Recipe.of(
            recipe_fields(
                task,
                rank=self.scope.rank,
                steps=self.scope.steps,
                batch_size=self.scope.batch_size,
                learning_rate=rate or rate_of(adapter, task.role, task.name, self.scope.rates),
                seed=2 * seed + (task.role == "style"),
            )
        )

    def learned(self, cell: Cell) -> Learned:
        """Return ΔW of a "train" cell, from its file or trained now."""
        file = self.file(cell, "adapters")
        if not file.exists():
            train(self, cell)
        return load_learned(file)

    def drawn(self, cell: Cell, draw: Callable[[], UInt8[np.ndarray, "n h w 3"]]) -> UInt8[np.ndarray, "n h w 3"]:
        """Return the cell's pictures, from its file or sampled now and saved side by side."""
        file = self.file(cell, "pictures")
        if not file.exists():
            write_atomically(file, png_bytes(Image.fromarray(np.concatenate(list(draw()), axis=1))))
        strip = np.asarray(open_picture(file).image)
        return np.stack(np.split(strip, strip.shape[1] // world.SIZE, axis=1))

    def draw(self, wanted: Sequence[LabelledPrompt], merged: Learned | Schedule | None) -> UInt8[np.ndarray, "n h w 3"]:
        """Sample the pictures asked for, with the merge's result in the base weights."""
        images: list[Image.Image] = []
        jobs = [(one.prompt, one.seed) for one in wanted]
        options = (self.scope.denoising_steps, self.scope.guidance)
        with drawing(self.family.denoiser_of(self.pipe), merged or {}) as on_step:
            for start in range(0, len(jobs), BATCH):
                batch = jobs[start : start + BATCH]
                images += or_black(
                    functools.partial(one_batch, self.pipe, self.family, batch, *options, on_step=on_step)
                )
        return np.stack([np.asarray(image) for image in images])

    def judged(self, wanted: Sequence[LabelledPrompt], pixels: UInt8[np.ndarray, "n h w 3"]) -> Record:
        """Return shares and means over the pictures, as `MEASURES` lists them."""
        subjects, styles, colours = zip(*((w.subject, w.style, w.colour) for w in wanted), strict=True)
        verdict = self.judge.verdict(pixels, subjects, styles, colours)
        seen = {factor: p.numpy() for factor, (_, p) in self.judge.look(pixels).items()}
        leak = {"subject": (TRAINING_SUBJECT, subjects, list(world.SUBJECTS))}
        leak["style"] = (TRAINING_STYLE, styles, list(world.STYLES))
        record: Record = dict(verdict.rates())
        record["named"] = float((verdict.p_subject * verdict.p_style).mean())
        record["p_subject"], record["p_style"] = float(verdict.p_subject.mean()), float(verdict.p_style.mean())
        record["recognised"] = float(verdict.recognised.mean())
        record |= {f"among_{factor}": float(found.mean()) for factor, found in verdict.among.items()}
        record["excess"] = float(verdict.excess.mean())
        record["obedience"] = float((verdict.distance["palette"] <= 1).mean())
        for factor, (name, asked, names) in leak.items():
            other = np.array([one != name for one in asked])
            record[f"leaked_{factor}"] = float(seen[factor][other, names.index(name)].mean()) if other.any() else None
        return record

    def keep(self, cell: Cell, record: Record) -> Record:
        """Write a cell's record to its file, and return it."""
        whole = {key: value for key, value in cell.__dict__.items() if value not in ("", 0, ()) or key == "seed"}
        whole |= {"digest": digest_of(cell, self.scope), "measured": record}
        write_atomically(self.file(cell, "records"), (json.dumps(whole) + "\n").encode())
        return whole


def train(bench: Bench, cell: Cell) -> Record:
    """Train one adapter; record the trained numbers, the mean loss of the last tenth of steps, and the seconds."""
    role = "subject" if cell.subject else "style"
    task = bench.task(role, cell.subject or cell.style, cell.seed)
    started = time.perf_counter()
    recipe = bench.recipe(task, cell.adapter, cell.seed, cell.rate(role))
    found = train_method(cell.adapter, recipe, pipe=bench.pipe, family=bench.family)
    facts = {"trained": found.trained, "loss": float(np.mean(found.losses[-max(1, recipe.steps // 10) :]))}
    save_learned(bench.file(cell, "adapters"), found.learned, {"facts": json.dumps(facts)})
    return bench.keep(cell, facts | {"seconds": round(time.perf_counter() - started, 1)})


def _wanted(subject: tuple[str, str], style: tuple[str, str], colour: str, seed: int) -> LabelledPrompt:
    """Return the prompt for a subject and a style, each given as (word in the prompt, name in the world)."""
    return LabelledPrompt(f"a photo of a {colour} {subject[0]} in {style[0]} style", subject[1], style[1], colour, seed)


def alone_wanted(bench: Bench, task: Task, seed: int) -> list[LabelledPrompt]:
    """Return prompts for a subject in the seen styles, or a style on seen subjects, without those that its own pictures
    show."""
    count, colours, own = bench.scope.alone, list(world.COLOURS), (task.trigger, str(task.name))
    but = (*shown_with(task.role, bench.scope.lessons), task.name)
    if task.role == "subject":
        names = [name for name in world.SEEN_STYLES if name not in but]
        pairs = [(own, (name, name)) for name in names]
    else:
        names = [name for name in world.SEEN_SUBJECTS if name not in but]
        pairs = [((name, name), own) for name in names[:: max(1, len(names) // count)]]
    return [_wanted(*pairs[i % len(pairs)], colours[i % len(colours)], 1000 * seed + i) for i in range(count)]


def pair_wanted(subject: Task, style: Task, count: int, seed: int) -> list[LabelledPrompt]:
    """Return prompts for both by their triggers, in every colour in turn."""
    colours = list(world.COLOURS)
    parts = (subject.trigger, str(subject.name)), (style.trigger, str(style.name))
    return [_wanted(*parts, colours[i % len(colours)], 1000 * seed + i) for i in range(count)]


def alone(bench: Bench, cell: Cell) -> Record:
    """Measure one adapter by itself, and its effect on prompts without its trigger."""
    task = bench.task("subject" if cell.subject else "style", cell.subject or cell.style, cell.seed)
    learned = bench.learned(cell.training(cell.subject, cell.style))
    return bench.keep(cell, with_drift(bench, cell, alone_wanted(bench, task, cell.seed), learned))


def with_drift(bench: Bench, cell: Cell, wanted: Sequence[LabelledPrompt], merged: Learned | Schedule) -> Record:
    """Return the judge's record of the prompts with the drift: root mean square difference, in levels of 255, of
    pictures of UNRELATED from the base model's own. They are the last of the strip."""
    unrelated = [_wanted((s, s), (t, t), "red", 1000 * cell.seed + i) for i, (s, t) in enumerate(UNRELATED)]
    pixels = bench.drawn(cell, lambda: bench.draw([*wanted, *unrelated], merged))
    key = (weights_digest(), cell.seed, bench.scope.denoising_steps, bench.scope.guidance)
    if key not in _UNTOUCHED:
        _UNTOUCHED[key] = bench.draw(unrelated, None)
    change = pixels[len(wanted) :].astype(float) - _UNTOUCHED[key]
    return bench.judged(wanted, pixels[: len(wanted)]) | {"drift": float(np.square(change).mean() ** 0.5)}


_UNTOUCHED: dict[Any, UInt8[np.ndarray, "n h w 3"]] = {}
"""The base model's own samples of UNRELATED."""


def parts_of(bench: Bench, cell: Cell, subject: str, style: str) -> tuple[Learned, Learned]:
    """Return the two adapters of a pair."""
    return bench.learned(cell.training(subject=subject)), bench.learned(cell.training(style=style))


def weights_of(bench: Bench, cell: Cell, subject: str, style: str) -> Sequence[float]:
    """Return both weights: the cell's own, or those chosen for its row."""
    return cell.weights or balance_of(cell.row, subject, style, bench.scope.balance)


def merged_of(
    bench: Bench, cell: Cell, parts: Sequence[Learned], weights: Sequence[float], tasks: Sequence[Task]
) -> Learned | Schedule:
    """Merge adapters at these weights, as the row does."""
    row = ROWS[cell.row]
    recipes = [bench.recipe(task, cell.adapter, cell.seed, cell.rate(task.role)) for task in tasks]
    context = Context(bench.pipe, bench.family, recipes, seed=cell.seed)
    merge, options = MERGES[row.merge], dict(row.options)
    if merge.once:
        parts = once(bench, cell, functools.partial(merge.once, parts, context, **options), len(parts))
        merge, options = MERGES["sum"], {}
    return merge([scaled(part, weight) for part, weight in zip(parts, weights, strict=True)], context, **options)


def once(bench: Bench, cell: Cell, make: Callable[[], list[Learned]], count: int) -> list[Learned]:
    """Return the parts after the step of the merge that does not depend on weights, from files or computed and saved
    now."""
    file = bench.file(replace(cell, kind="once", weights=()), "adapters")
    files = [file.with_name(f"{file.stem}-{i}{file.suffix}") for i in range(count)]
    if not all(one.exists() for one in files):
        for one, part in zip(files, make(), strict=True):
            save_learned(one, part)
    return [load_learned(one) for one in files]


def joint(bench: Bench, cell: Cell, tasks: Sequence[Task]) -> Learned:
    """Train one adapter on both at once, in twice the steps, so that each picture is seen as often as alone."""
    file = bench.file(replace(cell, kind="once", weights=()), "adapters")
    if not file.exists():
        (rate,) = rates_of(cell, (), bench.scope)
        recipes = [bench.recipe(task, cell.adapter, cell.seed, rate) for task in tasks]
        longer = {"steps": 2 * bench.scope.steps, "cooldown_steps": bench.scope.steps}
        recipes[0] = recipes[0].replace(**longer)
        found = train_method(cell.adapter, recipes[0], pipe=bench.pipe, family=bench.family, beside=recipes[1:])
        save_learned(file, found.learned)
    return load_learned(file)


def pair(bench: Bench, cell: Cell) -> Record:
    """Measure a composed pair: the judge's verdict, closeness to true renders, and the measures of the files."""
    tasks = [bench.task("subject", cell.subject, cell.seed), bench.task("style", cell.style, cell.seed)]
    started, record = time.perf_counter(), Record()
    weights = weights_of(bench, cell, cell.subject, cell.style)
    if ROWS[cell.row].joint:
        merged: Learned | Schedule = scaled(joint(bench, cell, tasks), weights[0])
    else:
        parts = parts_of(bench, cell, cell.subject, cell.style)
        merged = merged_of(bench, cell, parts, weights, tasks)
        record["files"] = between(*parts) if cell.row == cell.adapter else None
    record["merge_seconds"] = round(time.perf_counter() - started, 2)
    wanted = pair_wanted(tasks[0], tasks[1], bench.scope.pictures, cell.seed)
    pixels = bench.drawn(cell, lambda: bench.draw(wanted, merged))
    return bench.keep(cell, record | bench.judged(wanted, pixels) | closeness(bench, wanted, pixels, cell.seed))


def closeness(
    bench: Bench, wanted: Sequence[LabelledPrompt], pixels: UInt8[np.ndarray, "n h w 3"], seed: int
) -> Record:
    """Return the distance of the pictures' features from those of as many true renders, and their variety relative to
    these.

    energy: 2 E|X - Y| - E|X - X'| - E|Y - Y'| over whitened features of the judge (Székely and Rizzo 2013), 0 for the
    same distribution. It stands for the Fréchet distance, which needs thousands of pictures. diversity: E|X - X'| over
    E|Y - Y'|. None with fewer than two pictures.
    """
    if len(wanted) < 2:
        return {"energy": None, "diversity": None}
    scenes = [
        world.sample_scene(TRUE_SCENES + 1000 * seed + i, subject=w.subject, style=w.style, colour=w.colour)
        for i, w in enumerate(wanted)
    ]
    true = np.stack([world.render(scene)[0] for scene in scenes])
    x, y = (_whitened(bench.judge, pictures) for pictures in (pixels, true))
    within = [float(torch.pdist(points).mean()) for points in (x, y)]
    return {
        "energy": 2 * float(torch.cdist(x, y).mean()) - sum(within),
        "diversity": within[0] / within[1],
    }


def _whitened(judge: Judge, pixels: UInt8[np.ndarray, "n h w 3"]) -> Float[torch.Tensor, "n 96"]:
    features = torch.cat([found for found, _ in judge.look(pixels).values()], dim=1)
    return features @ judge.tables["pair.whiten"]


def grid(bench: Bench, cell: Cell) -> Record:
    """Measure the frontier: a pair at every two weights, two pictures each."""
    tasks = [bench.task("subject", cell.subject, cell.seed), bench.task("style", cell.style, cell.seed)]
    parts = parts_of(bench, cell, cell.subject, cell.style)
    wanted = pair_wanted(tasks[0], tasks[1], 2, cell.seed)
    both = list(product(bench.scope.grid_weights, repeat=2))

    def draw() -> UInt8[np.ndarray, "n h w 3"]:
        merged = (merged_of(bench, cell, parts, weights, tasks) for weights in both)
        return np.concatenate([bench.draw(wanted, one) for one in merged])

    strips = np.split(bench.drawn(cell, draw), len(both))
    found = [{"weights": list(at)} | bench.judged(wanted, strip) for at, strip in zip(both, strips, strict=True)]
    kept = ("weights", "named", "recognised", "among_subject", "among_style")
    return bench.keep(cell, {"points": [{name: point[name] for name in kept} for point in found]})


def many(bench: Bench, cell: Cell) -> Record:
    """Measure several subjects and as many styles in one composition; each is asked for with one of the others'
    kind."""
    each = cell.many // 2
    tasks = [bench.task("subject", name, cell.seed) for name in bench.scope.subjects[:each]]
    styles = [bench.task("style", name, cell.seed) for name in bench.scope.styles[:each]]
    pairs = [(a.called, b.called) for a, b in zip(tasks, styles, strict=True)]
    parts = [part for role in zip(*(parts_of(bench, cell, *pair) for pair in pairs), strict=True) for part in role]
    weights = [w for role in zip(*(weights_of(bench, cell, *pair) for pair in pairs), strict=True) for w in role]
    merged = merged_of(bench, cell, parts, weights, [*tasks, *styles])
    count = max(1, bench.scope.pictures // each)
    wanted = [w for a, b in zip(tasks, styles, strict=True) for w in pair_wanted(a, b, count, cell.seed)]
    return bench.keep(cell, with_drift(bench, cell, wanted, merged))


KINDS: dict[str, Callable[[Bench, Cell], Record]] = {
    "train": train,
    "alone": alone,
    "pair": pair,
    "grid": grid,
    "many": many,
}
"""kind -> what does it. What a cell needs that is not there is made on the way."""
MEASURES: Mapping[str, tuple[str, bool]] = {
    "both": ("both right, by the judge", True),
    "subject": ("subject right", True),
    "style": ("style right", True),
    "recognised": ("both are the likeliest of what the world has", True),
    "named": ("probability that the judge names both, mean", True),
    "obedience": ("palette of the style in the colour asked for", True),
    "leaked_subject": ("probability of the style picture's subject where another was asked for", False),
    "leaked_style": ("probability of the subject picture's style where another was asked for", False),
    "diversity": ("variety beside true renders", True),
    "energy": ("distance to true renders of the pair", False),
    "excess": ("how far beyond the judge's limits", False),
    "drift": ("change of pictures that call no adapter, in levels of 255", False),
}
"""Name -> (what it is, whether more is better)."""
