"""A space of adapters against other spaces: ``qrlora lab space``.

So many nameless styles are each trained from a few pictures of different subjects, under one trigger; or nameless
things, each in a few styles. Their mean and principal components span a space, and a reserved style, or subject, is
trained from one picture as coefficients of it. The same is done with as many components of

qrlora            ΔR on the shared basis: the capability itself
lora_one_start    both factors of LoRA, all adapters from one random start
lora_own_start    both factors of LoRA, each adapter from a start of its own
delta_w           ΔW of those of `lora_own_start`

and, for comparison, without a space ("alone", the default adapter from one picture). Adapters and records lie in the
folder: a second run measures only what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qrlora._files import make_folder, write_atomically
from qrlora.errors import DataError
from qrlora.lab.baselines.deltas import Delta, Learned
from qrlora.lab.baselines.training import Attached, train_attached
from qrlora.lab.compare.cells import Bench, alone_wanted
from qrlora.lab.compare.identity import weights_digest
from qrlora.lab.compare.plan import Scope, chosen, rate_of
from qrlora.lab.tasks import Task, recipe_fields, save_picture, task_of_world
from qrlora.method.adapter import Adapter, load_adapter
from qrlora.method.space import Principal, place, principal
from qrlora.models.training.attach import ADAPTER_NAME, adapter_on
from qrlora.models.training.loop import train
from qrlora.models.training.recipe import TRIGGERS, Recipe
from qrlora.pico import world
from qrlora.pico.world import wide
from qrlora.pico.world.canvas import Pose
from qrlora.quality.images.png import png_bytes

WAYS = ("qrlora", "lora_one_start", "lora_own_start", "delta_w")
RATES = {"qrlora": 7.5e-3, "lora": 1.5e-3}
"""Learning rates of the nameless styles and things, by method."""
FIRST_SCENE = 2_050_000_000
"""Seed of the first picture: none that pretraining or a judge has seen."""
SHOWN = ("subject", "style", "both", "recognised", "among_style")

Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Study:
    """The numbers of one run; see the command's options."""

    bench: Bench
    role: str
    count: int
    pictures: int
    library_steps: int
    components: int
    rate: float
    decay: float
    seed: int
    cache: dict[str, Principal] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Return the folder of adapters and records of this base model; adapters depend on few of the numbers."""
        return self.bench.folder / f"{weights_digest()}-{self.role}-{self.pictures}x{self.library_steps}"


def pictures_of(role: str, number: int, count: int, folder: Path) -> Path:
    """Render a nameless style on so many seen subjects, or a nameless thing in so many seen styles, with captions in
    which the trigger stands for it; return the folder."""
    make_folder(folder)
    beside = world.SEEN_SUBJECTS if role == "style" else world.SEEN_STYLES
    for i in range(count):
        other = beside[(number + i * len(beside) // count) % len(beside)]
        names = (other, f"style {number}") if role == "style" else (f"thing {number}", other)
        seed = FIRST_SCENE + 1000 * number + i
        scene = wide.posed(np.random.default_rng(seed), world.Scene(*names, "red", "white", seed, Pose()))
        save_picture(Image.fromarray(wide.render(scene)[0]), folder / f"{i:02d}.png")
        said = (other, "[trigger]") if role == "style" else ("[trigger]", other)
        ground = f" on a {scene.background} background" if wide.shows_background(scene) else ""
        text = f"a photo of a {scene.colour} {said[0]} in {said[1]} style{ground}"
        write_atomically(folder / f"{i:02d}.txt", text.encode())
    return folder


def adapter_of(study: Study, way: str, number: int) -> Adapter:
    """Return the adapter of a nameless style or thing: from its file, or trained now."""
    file = study.folder / way / f"{number:03d}.safetensors"
    if not file.exists():
        method = "qrlora" if way == "qrlora" else "lora"
        images = pictures_of(study.role, number, study.pictures, study.folder / "pictures" / f"{number:03d}")
        task = Task(study.role, None, images, "[trigger]", f"a nameless {study.role}")
        numbers = {"rank": study.bench.scope.rank, "steps": study.library_steps, "batch_size": 4}
        seed = 1 + number if way == "lora_own_start" else study.seed
        fields = recipe_fields(task, learning_rate=RATES[method], seed=seed, **numbers)
        make_folder(file.parent)
        recipe = Recipe.of(fields | {"method": method, "output": file, "log_with": "none"})
        train(recipe, pipe=study.bench.pipe, family=study.bench.family, restart=True)  # of one that was interrupted
    return load_adapter(file)


def rows_of(way: str, adapter: Adapter) -> Rows:
    """Return the tensors that span the space: ΔR, both factors, or ΔW."""
    if way == "delta_w":
        return {layer: adapter.delta_weight(layer) for layer in adapter.deltas}
    downs = {f"{layer}.lora_A": delta for layer, delta in adapter.deltas.items()}
    return downs | {f"{layer}.lora_B": up for layer, up in (adapter.ups or {}).items()}


def space_of(study: Study, way: str, say: Callable[[str], None]) -> Principal:
    if way not in study.cache:
        trained = "lora_own_start" if way == "delta_w" else way
        rows = []
        for number in range(study.count):
            rows.append(rows_of(way, adapter_of(study, trained, number)))
            say(f"{way}: {number + 1} of {study.count} nameless {study.role}s")
        study.cache.clear()  # ΔW of many adapters fill the memory: one space at a time
        study.cache[way] = principal(rows, study.components)
    return study.cache[way]


@contextlib.contextmanager
def on_delta_weights(space: Principal, denoiser: Any) -> Iterator[Attached[Learned]]:
    """The denoiser's own weights plus a point of a space of ΔW."""
    layers = {name: denoiser.get_submodule(name) for name in space.mean}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    z = place(layers, space.mean, space.components, 1.0)
    for layer in layers.values():
        layer.parametrizations.weight.original.requires_grad_(False)
    try:
        yield Attached({"z": z}, lambda: {n: Delta(matrix=(m.weight - before[n]).detach()) for n, m in layers.items()})
    finally:
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


@contextlib.contextmanager
def on_adapter(
    space: Principal | None, share: float, denoiser: Any, family: Any, recipe: Recipe
) -> Iterator[Attached[Learned]]:
    """The recipe's adapter: itself, or what of it spans the space as a point of it."""
    with adapter_on(denoiser, family, recipe):
        layers: dict[str, Any] = {name: m for name, m in denoiser.named_modules() if isinstance(m, LoraLayer)}
        if space is not None:
            parts: dict[str, nn.Module] = {}
            for name in space.mean:
                layer, _, factor = name.rpartition(".")
                parts[name] = getattr(layers[layer], factor)[ADAPTER_NAME]
                parts[name].weight.data.zero_()  # type: ignore[union-attr,operator]  # LoRA's start is in the mean
            place(parts, space.mean, space.components, share)
        moving = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        yield Attached(
            moving,
            lambda: {n: Delta(matrix=m.get_delta_weight(ADAPTER_NAME).detach().flatten(1)) for n, m in layers.items()},
        )


def measured(study: Study, way: str, name: str, share: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the record of one reserved style or subject from one picture: from the folder, or trained, sampled and
    judged now."""
    scope = study.bench.scope
    numbers: list[float] = [scope.steps, scope.alone, study.seed]
    numbers += [] if way == "alone" else [share, study.count, study.components, study.rate, study.decay]
    file = study.folder / "records" / ("-".join([way, name, *(f"{n:g}" for n in numbers)]) + ".json")
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return found
    space = None if way == "alone" else space_of(study, way, say)
    started = time.perf_counter()
    make_folder(file.parent)
    # All of one trigger: a space says what the trigger means.
    task = task_of_world(study.role, name, study.folder / f"{name}.png", study.seed, TRIGGERS[study.role])
    rate = rate_of("qrlora", study.role, name, scope.rates) if space is None else study.rate
    fields = recipe_fields(
        task, rank=scope.rank, steps=scope.steps, batch_size=scope.batch_size, learning_rate=rate, seed=study.seed
    )
    fields["method"] = "lora" if way.startswith("lora") else "qrlora"
    fields |= {} if space is None else {"weight_decay": study.decay}

    def attach(denoiser: Any, family: Any, recipe: Recipe, _: Any) -> Any:
        if way == "delta_w":
            return on_delta_weights(space, denoiser)  # type: ignore[arg-type]
        return on_adapter(space, share, denoiser, family, recipe)

    learned = train_attached(attach, Recipe.of(fields), pipe=study.bench.pipe, family=study.bench.family)
    seconds = time.perf_counter() - started
    asked = alone_wanted(study.bench, task, study.seed)
    pixels = study.bench.draw(asked, learned)
    write_atomically(file.with_suffix(".png"), _strip(pixels))
    verdict = study.bench.judged(asked, pixels)
    found = {"way": way, "task": name, "share": share, "seconds": round(seconds, 1)}
    found |= {name: round(verdict[name], 4) for name in SHOWN}
    if space is not None:
        found["variances"] = [round(v / sum(space.variances), 4) for v in space.variances[:10]]
    write_atomically(file, json.dumps(found).encode())
    return found


def _strip(pixels: Any) -> bytes:
    return png_bytes(Image.fromarray(np.concatenate(list(pixels), axis=1)))


def main(options: SimpleNamespace, say: Callable[[str], None]) -> None:
    """Build the spaces, train the reserved styles or subjects in them, print a table."""
    chosen("way", options.ways, ("alone", *WAYS))
    reserved = world.RESERVED_STYLES if options.role == "style" else world.RESERVED_SUBJECTS
    names = chosen(options.role, options.names or reserved, reserved)
    if not 2 <= options.components + 1 <= options.count:
        raise DataError(
            "more components than the adapters have",
            expected=f"--components from 1 to {options.count - 1}, one less than --count",
            got=options.components,
        )
    numbers = {one.name: getattr(options, one.name) for one in dataclasses.fields(Study) if hasattr(options, one.name)}
    study = Study(Bench.open(options.out, Scope(steps=options.steps, alone=options.asked)), **numbers)
    found = []
    for way in options.ways:
        for share in options.remainders if way not in ("alone", "delta_w") else (0.0,):
            for name in names:
                found.append(measured(study, way, name, share, say))
                say(row_of(found[-1]))
    print(table(found))


def row_of(one: Mapping[str, Any]) -> str:
    scores = "".join(f"{one[name]:>12.2f}" for name in SHOWN)
    return f"{one['way']:<16}{one['task']:<12}{one['share']:>9g}{scores}{one['seconds']:>9.0f} s"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    head = f"{'way':<16}{'task':<12}{'remainder':>9}" + "".join(f"{name:>12}" for name in SHOWN) + f"{'training':>11}"
    return "\n".join([head, *map(row_of, found)])
