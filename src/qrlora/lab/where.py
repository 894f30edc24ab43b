"""Locate subject and style in pico's blocks: ``qrlora lab where``.

The default adapter of each task is trained as `compare` trains it. Then it is used in part, and the judge says how
probable the right subject and the right style are, among all that the world has, in what the bench asks of an adapter
alone:

blocks   the layers of one block of the denoiser; and all but those
groups   the attention or the feed-forward layers, of the pictures' tokens or of the texts'; and all but those
steps    one third of the denoising steps, from noise alone to the picture; and the other two

A part that carries what was learned is enough by itself, or is missed when it is left out; these need not be the same.
Beside them stand all of the adapter and none of it. Adapters and tasks are kept in the folder, so that a second run
only draws; where.json and where.png are written there.
"""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qrlora._files import write_atomically
from qrlora.errors import DataError
from qrlora.lab.baselines.deltas import Learned
from qrlora.lab.baselines.merges import Schedule, blocks_of
from qrlora.lab.compare.cells import Bench, alone_wanted
from qrlora.lab.compare.identity import Cell, weights_digest
from qrlora.lab.compare.plan import DEFAULT, Scope, chosen
from qrlora.lab.speed.common import machine
from qrlora.pico import world

THIRDS = ("first third of the steps", "second third of the steps", "last third of the steps")
SCORES = ("among_subject", "among_style", "p_subject", "p_style", "recognised")
QUICK = {"pictures": 2, "steps": 60, "denoising_steps": 9}
"""The options that --quick changes: to see it work; too little to say anything."""
Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of an adapter, and the adapter without that part."""

    kind: str
    name: str
    only: Learned | Schedule
    without: Learned | Schedule


@dataclass(frozen=True)
class Window:
    """An adapter that acts only while the progress is from `first` to before `last`, or only outside of that."""

    learned: Learned
    first: float
    last: float
    inside: bool

    def at(self, progress: float) -> Learned:
        """Return the ΔW at this progress, as `Schedule` asks for it."""
        return self.learned if (self.first <= progress < self.last) == self.inside else {}


def group_of(layer: str) -> str:
    """The group of a layer of a joint block, one of four."""
    stream = "text" if re.search(r"add_|ff_context", layer) else "picture"
    return f"{'feed-forward' if '.ff' in layer else 'attention'}, {stream}"


def blocks(learned: Learned) -> Iterator[Part]:
    yield from _divided("blocks", learned, {name: f"block {number}" for name, number in blocks_of(learned).items()})


def groups(learned: Learned) -> Iterator[Part]:
    yield from _divided("groups", learned, {name: group_of(name) for name in learned})


def _divided(kind: str, learned: Learned, label: dict[str, str]) -> Iterator[Part]:
    for part in dict.fromkeys(label.values()):
        only = {name: delta for name, delta in learned.items() if label[name] == part}
        yield Part(kind, part, only, {name: delta for name, delta in learned.items() if name not in only})


def steps(learned: Learned) -> Iterator[Part]:
    for number, name in enumerate(THIRDS):
        both = (Window(learned, number / 3, (number + 1) / 3, inside) for inside in (True, False))
        yield Part("steps", name, *both)


KINDS: dict[str, Callable[[Learned], Iterator[Part]]] = {"blocks": blocks, "groups": groups, "steps": steps}


def main(options: SimpleNamespace, command: str) -> None:
    """Measure; raises DataError for a kind of part or a task that is not known."""
    if options.quick:
        vars(options).update(QUICK)
    options.pictures, options.steps = options.pictures or Scope.alone, options.steps or Scope.steps
    options.denoising_steps = options.denoising_steps or Scope.denoising_steps
    options.only = chosen("kind of part", options.only or KINDS, list(KINDS))
    chosen("task", options.tasks, [*world.SUBJECTS, *world.STYLES])
    if options.denoising_steps < len(THIRDS):
        raise DataError("too few denoising steps", expected=f"{len(THIRDS)} at least", got=options.denoising_steps)
    measure(options, options.only, options.tasks, command)


def measure(options: SimpleNamespace, wanted: Sequence[str], tasks: Sequence[str], command: str) -> None:
    """Train, sample and judge; print a table of each task, and write where.json and where.png."""
    started = time.perf_counter()
    scope = Scope(steps=options.steps, alone=options.pictures, denoising_steps=options.denoising_steps)
    bench = Bench.open(options.out, scope)
    found = []
    for name in tasks:
        found.append(parts_scored(bench, name, options.seed, wanted))
        print(table(found[-1]), flush=True)
    plain = {key: value for key, value in vars(options).items() if key != "out"}
    facts: dict[str, Any] = {"command": command, "machine": machine("cpu")}
    facts |= {"weights": weights_digest(), "adapter": DEFAULT, "options": plain, "found": found}
    facts["seconds"] = round(time.perf_counter() - started)
    write_atomically(options.out / "where.json", (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(options.out / "where.png", heat_map(found))
    print(f"{facts['seconds']} s; {options.out / 'where.json'}, {options.out / 'where.png'}")


def parts_scored(bench: Bench, name: str, seed: int, wanted: Sequence[str]) -> Found:
    """Train the adapter of a task and judge it in all its parts."""
    role = "subject" if name in world.SUBJECTS else "style"
    training = Cell("train", DEFAULT, seed, *((name, "") if role == "subject" else ("", name)))
    learned, asked = bench.learned(training), alone_wanted(bench, bench.task(role, name, seed), seed)
    parts = [Part("", "all of it", learned, {}), *(part for kind in wanted for part in KINDS[kind](learned))]
    rows = []
    for number, part in enumerate(parts, 1):
        row: Found = {"kind": part.kind, "part": part.name}
        for way, used in (("only", part.only), ("without", part.without)):
            verdict = bench.judged(asked, bench.draw(asked, used))
            row[way] = {score: round(verdict[score], 4) for score in SCORES}
        rows.append(row)
        print(f"{name}: {number} of {len(parts)} parts", file=sys.stderr, flush=True)
    return {"task": name, "role": role, "parts": rows}


def table(found: Found) -> str:
    """Probabilities of the right subject and the right style, of each part alone and of all but it."""
    width = max(len(row["part"]) for row in found["parts"])
    lines = [f"\n{found['task']} ({found['role']}): probability of the right subject and style, of the world's"]
    lines.append(f"  {'':<{width}}  only this     all but this")
    for row in found["parts"]:
        cells = ["{among_subject:.2f} {among_style:.2f}".format(**row[way]) for way in ("only", "without")]
        lines.append(f"  {row['part']:<{width}}  {cells[0]:<12}  {cells[1]}")
    return "\n".join(lines)


def heat_map(found: Sequence[Found]) -> bytes:
    """A PNG: parts down, tasks across, each by the probability of what was to be learned."""
    names = [row["part"] for row in found[0]["parts"]]
    columns = [(one, way) for one in found for way in ("only", "without")]
    values = [[one["parts"][i][way][f"among_{one['role']}"] for one, way in columns] for i in range(len(names))]
    figure = Figure((3.4 + 1.3 * len(columns), 1.4 + 0.32 * len(names)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    says = {"only": "only this", "without": "all but this"}
    axes.set_xticks(range(len(columns)), [f"{one['task']}\n{says[way]}" for one, way in columns], fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k")
    figure.colorbar(shown, label="probability of what was learned")
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
