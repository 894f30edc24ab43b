"""Train a judge that knows the wide world: ``python -m qrlora.pico.judge.wide --work DIR``.

It names every thing that has been drawn, reserved ones included, and every style that has a name, the designers' sets
among them; "none of these" is the answer to nameless ones and to defects. It answers *recognised* on the wide world
(the likeliest of the names is the one asked for). The limits that make *right* are set for pairs that have many true
renders in every colour, which a designer's one drawing has not: for those the shipped judge (``qrlora.pico.judge``)
stays. Resumable; writes ``judge-wide.safetensors`` and ``judge-wide.json`` to DIR.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from safetensors.torch import save

from qrlora._files import write_atomically
from qrlora._interrupts import ended
from qrlora.pico import world
from qrlora.pico.judge import defects
from qrlora.pico.judge.network import Network
from qrlora.pico.judge.training import IGNORE, halved, train
from qrlora.pico.pretraining.plan import options_of
from qrlora.pico.pretraining.run import log
from qrlora.pico.world import nameless, wide
from qrlora.pico.world.canvas import Pose
from qrlora.pico.world.drawings import SETS, THINGS, designers

SUBJECTS = [*world.SUBJECTS, *(t for t in THINGS if t not in world.SUBJECTS)]
STYLES = [*world.STYLES, *(s.name for s in SETS)]
NONE_SUBJECT, NONE_STYLE = len(SUBJECTS), len(STYLES)
SHARD, _FIRST = 500, 2_000_000_000
PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Plan:
    """All settings that decide the result."""

    seed: int = 0
    shards: int = 80  # of 500 pictures each, the last ``fresh`` of which only measure
    fresh: int = 8
    steps: int = 12_000
    batch: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    workers: int = 2


def sample(number: int) -> tuple[world.Scene, int, int]:
    """Return a scene of any subject in any style, and the labels of both. A third of the styles are nameless: "none of
    these"."""
    rng = np.random.default_rng((_FIRST, number))
    subject = SUBJECTS[rng.integers(len(SUBJECTS))]
    kind = rng.random()
    own = sorted(designers(subject))
    if kind < 0.33:
        style, label = f"style {rng.integers(nameless.STYLE_COUNT)}", NONE_STYLE
    elif kind < 0.55 and own:
        style = own[rng.integers(len(own))]
        label = STYLES.index(style)
    else:
        style = list(world.STYLES)[rng.integers(len(world.STYLES))]
        label = STYLES.index(style)
    scene = wide.posed(rng, world.Scene(subject, style, "red", "white", _FIRST + number, Pose()))
    return scene, SUBJECTS.index(subject), label


def _render(path: Path, first: int) -> None:
    cv2.setNumThreads(1)
    if not path.exists():
        pictures = np.stack([wide.render(sample(first + i)[0])[0] for i in range(SHARD)])
        write_atomically(path, partial(np.save, arr=pictures))


def rendered(work: Path, plan: Plan) -> list[np.ndarray]:
    """Return all shards; render those that are missing."""
    paths = [work / f"wide-judge-{i:03d}.npy" for i in range(plan.shards)]
    with ProcessPoolExecutor(plan.workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_render, paths, range(0, plan.shards * SHARD, SHARD)))
    return [np.load(path, mmap_mode="r") for path in paths]


def example(shards: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """A picture (128, 128, 3) float32 with its labels: seven of ten true, the others with a defect of one factor."""
    number = int(rng.integers(len(shards) * SHARD))
    _, subject, style = sample(number)
    picture = shards[number // SHARD][number % SHARD].astype(np.float32) / 255
    kind = rng.random()
    if kind > 0.82:
        picture, style = rng.choice(np.array(defects.TEXTURE_DEFECTS))(picture, rng), NONE_STYLE
    elif kind > 0.7:
        picture, subject, style = defects.misshapen(picture, rng), NONE_SUBJECT, IGNORE
    return defects.mild(picture, rng), subject, style


@torch.inference_mode()
def scores(network: Network, shards: list[np.ndarray], first: int) -> dict[str, float]:
    """Shares of fresh renders of which the likeliest name is the right one, "none of these" left out."""
    network.eval()
    right: dict[str, list[np.ndarray]] = {"subject": [], "style": []}
    for turn, shard in enumerate(shards):
        labels = [sample((first + turn) * SHARD + i)[1:] for i in range(SHARD)]
        found = network(torch.from_numpy(np.array(shard)).permute(0, 3, 1, 2).float() / 127.5 - 1)
        for column, factor in enumerate(("subject", "style")):
            asked = np.array([pair[column] for pair in labels])
            named = asked < found[factor][1].shape[1] - 1
            right[factor].append((found[factor][1][:, :-1].argmax(1).numpy() == asked)[named])
    return {f"named_{factor}": round(float(np.concatenate(hits).mean()), 4) for factor, hits in right.items()}


@click.command()
@click.option("--work", type=PATH, required=True, help="Folder of pictures, checkpoints, the log and the result.")
@options_of(Plan)
def main(work: Path, **options: Any) -> None:
    """Train a judge that knows the wide world: what is left to do of it."""
    plan = Plan(**options)
    sys.exit(ended("qrlora.pico.judge.wide", lambda: run(work, plan)))


def run(work: Path, plan: Plan) -> int:
    """Render, train, measure, write; the exit code."""
    work.mkdir(parents=True, exist_ok=True)
    shards, seen = rendered(work, plan), plan.shards - plan.fresh
    draw, sizes = partial(example, shards[:seen]), (len(SUBJECTS), len(STYLES))
    network = train(work, "judge-wide", plan, sizes, draw, 7, seconds=(300.0, 60.0))
    measured = scores(network, shards[seen:], seen)
    facts = {"plan": asdict(plan), "scores": measured, "subjects": SUBJECTS, "styles": STYLES}
    write_atomically(work / "judge-wide.safetensors", save(halved(network)))
    write_atomically(work / "judge-wide.json", (json.dumps(facts, indent=1) + "\n").encode())
    log(work, "judge-wide", **measured)
    return 0


if __name__ == "__main__":
    main()
