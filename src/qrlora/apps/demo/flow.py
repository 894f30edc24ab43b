"""The demo's steps: train, generate, judge, and collect the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from qrlora.apps.demo.plan import (
    DEFAULT,
    METHODS,
    Budget,
    LabelledPrompt,
    Task,
    null_space_of,
    questions,
    recipe_of,
    weights_of,
)
from qrlora.lab.tasks import task
from qrlora.method.adapter import Adapter, basis_of, save_adapter
from qrlora.method.composition import Composition, project_out, similarity
from qrlora.models.families import ModelFamily, load_pipeline
from qrlora.models.generation import generate_jobs, weight_sampler
from qrlora.models.training.loop import train
from qrlora.models.training.recipe import Recipe
from qrlora.pico import world
from qrlora.pico.judge import Judge
from qrlora.quality.metrics.shares import Share

SETS = ("subject_alone", "style_alone", "composed")
PARTS = ("subject", "style", "both")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """Pictures for a list of LabelledPrompt, and the judge's verdict on each.

    pixels (n, h, w, 3) uint8. right: "subject", "style", "both", and "recognised" (both asked for are the likeliest
    of the world's, however drawn) -> n verdicts, or None where the truth is not known.
    among: "subject" and "style" -> the judge's probability of the right name among the world's, in the mean over the
    pictures; None where the truth is not known.
    likeness: mean cosine of the judge's subject features to the user's own picture, if there is one.
    """

    wanted: Sequence[LabelledPrompt]
    pixels: UInt8[np.ndarray, "n h w 3"]
    right: dict[str, Bool[np.ndarray, " n"] | None] = field(default_factory=dict)
    among: dict[str, float | None] = field(default_factory=dict)
    likeness: float | None = None

    def share(self, part: str) -> Share | None:
        """Return the share of pictures in which ``part``, of `right`, holds; None if not known."""
        verdicts = self.right.get(part)
        return None if verdicts is None else Share.of(verdicts)


@dataclass
class Setting:
    """State that all steps share. ``seconds``: stage -> time spent in it so far."""

    pipe: Any
    family: ModelFamily
    judge: Judge
    budget: Budget
    seed: int
    say: Say
    model: str = "pico"
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, said: str = "") -> Iterator[None]:
        """Measure a stage; a stage entered again adds to its time."""
        self.say(f"{name}{': ' if said else ''}{said}")
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def train(self, task: Task, method: str, **fields: Any) -> Adapter:
        """Train one adapter by a method of METHODS; ``fields`` change its recipe."""
        planned = recipe_of(task, self.budget, self.seed, method)
        recipe = Recipe.of({"model": self.model, **planned, **fields})
        return replace(train(recipe, pipe=self.pipe, family=self.family), name=f"{method}-{task.role}")

    def draw(self, wanted: Sequence[LabelledPrompt], adapters: Sequence[tuple[Adapter, float]] = ()) -> Answer:
        """Generate every picture asked for, not yet judged."""
        options = {"steps": self.budget.denoising_steps, "guidance": self.budget.guidance}
        jobs = [(one.prompt, one.seed) for one in wanted]
        images = generate_jobs(self.pipe, self.family, jobs, adapters=adapters, **options)  # type: ignore[arg-type]
        return Answer(wanted, np.stack([np.asarray(image) for image in images]))

    def judged(self, answer: Answer, picture: Task | None = None) -> Answer:
        """Return the answer with its verdicts; with ``picture``, also how like the user's own picture it is."""
        anything = {"subject": next(iter(world.SUBJECTS)), "style": next(iter(world.STYLES))}
        asked = {part: [getattr(w, part) or name for w in answer.wanted] for part, name in anything.items()}
        verdict = self.judge.verdict(answer.pixels, **asked, colour=[w.colour for w in answer.wanted])
        # what is said of one part does not change the verdict on the other, so any name may stand for the user's own
        known = {part: getattr(answer.wanted[0], part) is not None for part in anything}
        known["both"] = all(known.values())
        known["recognised"] = known["both"]
        right = {part: getattr(verdict, part) if known[part] else None for part in known}
        likeness = self._likeness(answer, picture) if picture else None
        among = {part: float(verdict.among[part].mean()) if known[part] else None for part in anything}
        return replace(answer, right=right, among=among, likeness=likeness)

    def _likeness(self, answer: Answer, picture: Task) -> float:
        from qrlora.models.training.pictures import read_picture

        own = np.asarray(read_picture(picture.file, answer.pixels.shape[1]))[None]
        return fmean(self.judge.likeness("subject", answer.pixels, own))


@dataclass(frozen=True)
class Outcome:
    """All results of one run, ready to be put on a page."""

    setting: Setting
    subject: Task
    style: Task
    learned: dict[str, tuple[Adapter, Adapter]]
    answers: dict[str, dict[str, Answer]]
    base: Answer
    grid: list[list[Answer]]
    interference: dict[str, dict[str, float]]
    file_bytes: dict[str, int]
    command: str

    def share(self, method: str, name: str, part: str) -> Share | None:
        """Return one score."""
        return self.answers[method][name].share(part)


def load(model: str, judge: Judge | None, budget: Budget, seed: int, say: Say | None) -> Setting:
    """Load the base model and the judge. Their modules are imported before; weights are read here."""
    started = time.perf_counter()
    say = say or _stderr(started)
    say("load: base model and judge")
    pipe, family = load_pipeline(model)
    setting = Setting(pipe, family, judge or Judge.load(), budget, seed, say, model)
    setting.seconds["load"] = time.perf_counter() - started
    return setting


def _stderr(started: float) -> Say:
    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    return say


def experiment(setting: Setting, out: Path, subject: str, style: str, command: str) -> Outcome:
    resolution = world.SIZE
    with setting.stage("pictures", f"the subject ({subject}) and the style ({style})"):
        tasks = [task(r, w, out, setting.seed, resolution) for r, w in (("subject", subject), ("style", style))]
    learned = _train_all(setting, tasks)
    answers, base = _generate_all(setting, tasks, learned)
    grid = _grid(setting, tasks, learned[DEFAULT])
    with setting.stage("files", "adapters in both spellings"):
        sizes = _save(setting, out, learned, weights_of(DEFAULT, *tasks))
        interference = {method: _interference(setting, pair) for method, pair in learned.items()}
    return Outcome(setting, tasks[0], tasks[1], learned, answers, base, grid, interference, sizes, command)


def _train_all(setting: Setting, tasks: Sequence[Task]) -> dict[str, tuple[Adapter, Adapter]]:
    learned = {}
    for method in METHODS:
        adapters = []
        for one in tasks:
            with setting.stage(f"train {method}", f"{one.role}, {setting.budget.steps} steps"):
                adapters.append(setting.train(one, method))
        learned[method] = (adapters[0], adapters[1])
    return learned


def _generate_all(
    setting: Setting, tasks: Sequence[Task], learned: dict[str, tuple[Adapter, Adapter]]
) -> tuple[dict[str, dict[str, Answer]], Answer]:
    """Sample and judge every method's answer to every question, and the base model's to the plain words."""
    asked = questions(tasks[0], tasks[1], setting.budget, setting.seed)
    with setting.stage("generate", "the base model alone"):
        base = setting.draw(asked["base"][: len(asked["composed"])])
    answers: dict[str, dict[str, Answer]] = {}
    for method, (subject, style) in learned.items():
        used = {
            "subject_alone": [(subject, 1.0)],
            "style_alone": [(style, 1.0)],
            "composed": _parts(method, (subject, style), tasks),
        }
        with setting.stage("generate", f"{method}, {sum(len(asked[name]) for name in SETS)} pictures"):
            answers[method] = {name: setting.draw(asked[name], used[name]) for name in SETS}
    own = tasks[0] if tasks[0].name is None else None
    with setting.stage("judge"):
        base = setting.judged(base, own)
        for sets in answers.values():
            for name in SETS:
                sets[name] = setting.judged(sets[name], own if name != "style_alone" else None)
    return answers, base


def _parts(method: str, pair: tuple[Adapter, Adapter], tasks: Sequence[Task]) -> list[tuple[Adapter, float]]:
    """Return the parts that a method of METHODS composes: both adapters at its weights, after null-space projection."""
    weights = weights_of(method, tasks[0], tasks[1])
    return project_out(list(zip(pair, weights, strict=True)), null_space_of(method, pair))


def _grid(setting: Setting, tasks: Sequence[Task], pair: tuple[Adapter, Adapter]) -> list[list[Answer]]:
    """Sample one prompt and seed at every pair of weights: the subject's down the rows, the style's along the
    columns."""
    weights, budget = setting.budget.weights, setting.budget
    first = questions(tasks[0], tasks[1], budget, setting.seed)["composed"][0]
    adapters = dict(zip(("subject", "style"), pair, strict=True))
    samples = [((subject, style), first.prompt, first.seed) for subject in weights for style in weights]
    options: dict[str, Any] = {"steps": budget.denoising_steps, "guidance": budget.guidance}
    strength = null_space_of(DEFAULT, pair)
    with (
        setting.stage("generate", f"{len(weights)} x {len(weights)} weights"),
        weight_sampler(setting.pipe, setting.family, adapters, null_space=strength, **options) as sampler,
    ):
        images = sampler(samples)
    answers = [Answer([first], np.asarray(image)[None]) for image in images]
    return [answers[start : start + len(weights)] for start in range(0, len(answers), len(weights))]


def _save(
    setting: Setting, out: Path, learned: dict[str, tuple[Adapter, Adapter]], weights: tuple[float, float]
) -> dict[str, int]:
    """Save all adapters, and the default's pair composed at these weights; return the bytes of the subject's files:
    both spellings of the default's, and plain LoRA's."""
    folder = out / "adapters"
    for pair in learned.values():
        for adapter in pair:
            spelling = "compact" if adapter.metadata.on_basis else "lora"
            save_adapter(adapter, folder / f"{adapter.name}.safetensors", spelling)
    pair = learned[DEFAULT]
    basis = basis_of(setting.family.denoiser_of(setting.pipe), pair[0])
    parts = list(zip(pair, weights, strict=True))
    both = replace(Composition(parts, null_space_of(DEFAULT, pair)).adapter(), name=f"{DEFAULT}-composed")
    for adapter in (*pair, both):
        save_adapter(adapter, folder / f"{adapter.name}.lora.safetensors", "lora", basis)
    name = pair[0].name
    kept = {
        "compact": f"{name}.safetensors",
        "lora": f"{name}.lora.safetensors",
        "plain_lora": "lora-subject.safetensors",
    }
    return {key: (folder / file).stat().st_size for key, file in kept.items()}


def _interference(setting: Setting, pair: tuple[Adapter, Adapter]) -> dict[str, float]:
    """Return the interference from the files alone: cosine of the two ΔW; on a basis also the row space they share."""
    if not pair[0].metadata.on_basis:
        return {"cosine": similarity(*pair).total["delta_w"]}
    total = Composition([(adapter, 1.0) for adapter in pair]).interference().total
    common = set(pair[0].metadata.columns) & set(pair[1].metadata.columns)
    return {
        "cosine": total.cosine[0][1],
        "shared_rows": total.shared_rows[0][1],
        "shared_rows_by_chance": fmean(len(delta) / delta.shape[1] for delta in pair[0].deltas.values()),
        "shared_columns": len(common),
        "energy_of_sum": total.sum_energy / sum(total.energy),
    }
