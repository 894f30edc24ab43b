"""The published claims of QR-LoRA, measured on pico: ``qrlora lab claims``.

    parameters    half the trainable parameters of LoRA: counted, on public models too
    core          the SVD core before QR against QR of the weight itself
    nearest       whether QR gives the nearest orthonormal matrix
    tasks         what is alike across tasks: R, A, Q, ΔR, ΔW, and what a shared start and chance would give
    convergence   loss at the same step for ΔR alone, Q and R trained, and LoRA, at several learning rates
    stability     spread over seeds of the loss, and how alike ΔW of two seeds are, from one picture

Tasks are subjects and styles of pico's world, each trained on one picture; the last two look at
the first and the last of them only. Runs at one step see the same noise whatever trains, so their losses are paired.
The rest of the claims (less crosstalk) is measured by `qrlora lab compare`, on pictures.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

from qrlora._files import write_atomically
from qrlora.lab.baselines.adapters import train_method
from qrlora.lab.baselines.context import Context
from qrlora.lab.baselines.file_measures import between
from qrlora.lab.claims import measures as claims
from qrlora.lab.compare.identity import weights_digest
from qrlora.lab.compare.plan import chosen, rate_of
from qrlora.lab.speed.common import machine
from qrlora.lab.tasks import RECIPES, Task, recipe_fields, task
from qrlora.method.basis import Basis
from qrlora.models.families import load_pipeline
from qrlora.models.training.loop import train
from qrlora.models.training.recipe import Recipe
from qrlora.pico import world

PUBLISHED = "qrlora_published"
METHODS = (PUBLISHED, "qrlora_trained", "lora")
PUBLISHED_RANK = 64
Found = dict[str, Any]


@dataclass
class Bench:
    """pico, the tasks, and how long each is trained."""

    pipe: Any
    family: Any
    tasks: Sequence[Task]
    options: SimpleNamespace

    @property
    def ends(self) -> list[Task]:
        """The first and the last of the tasks."""
        return list({id(task): task for task in (self.tasks[0], self.tasks[-1])}.values())

    def recipe(self, task: Task, **fields: Any) -> Recipe:
        options = self.options
        rate = rate_of(PUBLISHED, task.role, task.name)
        common = recipe_fields(task, rank=options.rank, steps=options.steps, batch_size=4, learning_rate=rate, seed=0)
        return Recipe.of({"model": "pico", **RECIPES[PUBLISHED], **common, **fields})

    def train_delta(self, method: str, task: Task, **fields: Any) -> tuple[Any, float]:
        """Train; return the result and its loss under new noise."""
        recipe = self.recipe(task, **fields)
        found = train_method(method, recipe, pipe=self.pipe, family=self.family)
        context = Context(self.pipe, self.family, [recipe])
        return found, claims.held_out_loss(context, 0, found.learned)


def main(options: SimpleNamespace) -> None:
    """Measure the claims wanted. Raises DataError for a claim or task that is not known."""
    chosen("task", options.tasks, [*world.SUBJECTS, *world.STYLES])
    measure(options, chosen("claim", options.only or CLAIMS, list(CLAIMS)))


def measure(options: SimpleNamespace, wanted: Sequence[str]) -> None:
    """Measure every claim wanted; print and write each as it is found. Other claims in the file stay."""
    pipe, family = load_pipeline("pico", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for name in options.tasks:
            place = Path(folder) / name
            place.mkdir()
            tasks.append(task("subject" if name in world.SUBJECTS else "style", name, place, 0, world.SIZE))
        bench = Bench(pipe, family, tasks, options)
        for name in wanted:
            found = CLAIMS[name](bench)
            print(f"\n{name}\n{_table(found)}", flush=True)
            _keep(options, name, found)


def _keep(options: SimpleNamespace, name: str, found: Found) -> None:
    kept = json.loads(options.json.read_text()) if options.json.exists() else {}
    plain = {key: value for key, value in vars(options).items() if key not in ("json", "only")}
    about = {"machine": machine("cpu"), "weights": weights_digest(judged=False), "options": plain}
    kept[name] = about | {"found": found}
    write_atomically(options.json, (json.dumps(kept, indent=1, allow_nan=False) + "\n").encode())


def parameters(bench: Bench) -> Found:
    sizes = {"pico": claims.sizes_of(bench.family.denoiser_of(bench.pipe), bench.family), **claims.public_sizes()}
    ranks = {name: bench.options.rank if name == "pico" else PUBLISHED_RANK for name in sizes}
    return {f"{name}, rank {ranks[name]}": claims.half_the_parameters(own, ranks[name]) for name, own in sizes.items()}


def _weights(bench: Bench) -> dict[str, Any]:
    denoiser = bench.family.denoiser_of(bench.pipe)
    return {name: denoiser.get_submodule(name).weight for name in claims.sizes_of(denoiser, bench.family)}


def core(bench: Bench) -> Found:
    return {f"rank {bench.options.rank}": claims.core_before_qr(_weights(bench), bench.options.rank)}


def nearest(bench: Bench) -> Found:
    return {f"rank {bench.options.rank}": claims.nearest_orthonormal(_weights(bench), bench.options.rank)}


def tasks(bench: Bench) -> Found:
    """Compare all pairs of tasks; LoRA once from one start (one seed), and once from a start of each task's own."""
    made: dict[str, list[dict[str, Any]]] = {
        PUBLISHED: [{"method": "qrlora"}] * len(bench.tasks),
        "qrlora_trained": [{"method": "qrlora", "train_basis": True}] * len(bench.tasks),
        "lora, one seed": [{"method": "lora"}] * len(bench.tasks),
        "lora, a seed each": [{"method": "lora", "seed": seed} for seed in range(len(bench.tasks))],
    }
    basis, found = Basis.of(_weights(bench), bench.options.rank), {}
    for name, fields in made.items():
        recipes = [bench.recipe(task, **own) for task, own in zip(bench.tasks, fields, strict=True)]
        adapters = [train(recipe, pipe=bench.pipe, family=bench.family) for recipe in recipes]
        trained = name.endswith("trained")
        found[name] = claims.alike_trained(adapters) if trained else claims.alike(adapters, basis)
    return found


def convergence(bench: Bench) -> Found:
    """Mean training losses of the steps up to a quarter, a half and all of them, without cooldown, mean over the tasks.

    Every mean is over a sixth of the steps; the held-out loss is that after the last.
    """
    steps = bench.options.steps
    window = max(1, steps // 6)
    found = {}
    for rate, method in itertools.product(bench.options.rates, METHODS):
        runs = [bench.train_delta(method, task, learning_rate=rate, cooldown_steps=0) for task in bench.ends]
        row: dict[str, float] = {"trained": runs[0][0].trained}
        for mark in sorted({max(window, steps // 4), max(window, steps // 2), steps}):
            row[f"to step {mark}"] = fmean(fmean(run.losses[mark - window : mark]) for run, _ in runs)
        found[f"{method}, rate {rate:g}"] = row | {"held_out": fmean(loss for _, loss in runs)}
    return found


def stability(bench: Bench) -> Found:
    """Measure the spread over seeds of start and noise, for each task alone; return the mean over the tasks."""
    found = {}
    for method in METHODS:
        losses, cosines, energies = [], [], []
        for end in bench.ends:
            runs = [bench.train_delta(method, end, seed=seed) for seed in range(bench.options.seeds)]
            losses.append([loss for _, loss in runs])
            pairs = [between(a.learned, b.learned) for (a, _), (b, _) in itertools.combinations(runs, 2)]
            cosines += [pair["cosine"] for pair in pairs]
            energies.append([between(run.learned, run.learned)["energy_a"] for run, _ in runs])
        found[method] = {
            "loss": fmean(map(fmean, losses)),
            "loss_deviation": fmean(map(deviation, losses)),
            "relative_deviation": fmean(deviation(each) / fmean(each) for each in losses),
            "cosine_of_seeds": fmean(cosines) if cosines else 1.0,
            "size_deviation": fmean(deviation(each) / fmean(each) for each in energies),
        }
    return found


def deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation; 0 for one value."""
    return stdev(values) if len(values) > 1 else 0.0


CLAIMS: dict[str, Callable[[Bench], Found]] = {
    "parameters": parameters,
    "core": core,
    "nearest": nearest,
    "tasks": tasks,
    "convergence": convergence,
    "stability": stability,
}


def _table(rows: Found) -> str:
    """Format a line for each row, its numbers by name."""
    width = max(map(len, rows))
    lines = [
        f"  {name:<{width}}  " + "  ".join(f"{k} {_number(v)}" for k, v in row.items()) for name, row in rows.items()
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
