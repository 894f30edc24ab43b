"""Train a judge that knows the wide world: ``python -m qrlora.pico.judge.wide --work DIR``.

It names every thing that has been drawn, reserved ones included, and every style that has a name, the designers' sets
among them; "none of these" is the answer to nameless ones and to defects. It answers *recognised* on the wide world
(the likeliest of the names is the one asked for). The limits that make *right* are set for pairs that have many true
renders in every colour, which a designer's one drawing has not: for those the shipped judge (``qrlora.pico.judge``)
stays. Resumable; writes ``judge-wide.safetensors`` and ``judge-wide.json`` to DIR.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from qrlora._files import write_atomically
from qrlora.pico import world
from qrlora.pico.judge import defects
from qrlora.pico.judge.network import Network, optimisers
from qrlora.pico.pretraining.run import Run, log, trapezoid
from qrlora.pico.world import nameless, wide
from qrlora.pico.world.canvas import Pose
from qrlora.pico.world.drawings import SETS, THINGS, designers

SUBJECTS = [*world.SUBJECTS, *(t for t in THINGS if t not in world.SUBJECTS)]
STYLES = [*world.STYLES, *(s.name for s in SETS)]
NONE_SUBJECT, NONE_STYLE, IGNORE = len(SUBJECTS), len(STYLES), -100
SHARD, _FIRST = 500, 2_000_000_000


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result."""

    seed: int = 0
    shards: int = 80  # of 500 pictures each, the last ``fresh`` of which only measure
    fresh: int = 8
    steps: int = 12_000
    batch: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    workers: int = 2


def sample(number: int) -> tuple[world.Scene, int, int]:
    """A scene of anything in any style, and the labels of both. A third of the styles are nameless: "none of these"."""
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
    """All shards, rendered where they are missing."""
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
        picture = (defects.melted if rng.random() < 0.5 else defects.scrambled)(picture, rng)
        subject, style = NONE_SUBJECT, IGNORE
    return defects.mild(picture, rng), subject, style


def train(work: Path, plan: Plan, shards: list[np.ndarray]) -> Network:
    """Cross-entropy on both factors."""
    torch.manual_seed(plan.seed)
    network = Network(len(SUBJECTS), len(STYLES)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    both = optimisers(network, plan.muon_lr, plan.adam_lr)
    run = Run(work, "judge-wide", {"network": network}, both, plan.steps, trapezoid, seconds=(300.0, 60.0))
    run.restore()

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((plan.seed, 7, step))
        pictures, subjects, styles = zip(*(example(shards, rng) for _ in range(plan.batch)), strict=True)
        found = network(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1)
        subject = F.cross_entropy(found["subject"][1], torch.tensor(subjects), label_smoothing=0.02)
        return subject + F.cross_entropy(found["style"][1], torch.tensor(styles), label_smoothing=0.02)

    run.go(loss_of)
    return network


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


def main() -> None:
    """Run what is left to do."""
    parser = argparse.ArgumentParser(
        prog="python -m qrlora.pico.judge.wide", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for pictures, checkpoints, the log, the result"
    )
    for name, value in asdict(Plan()).items():
        parser.add_argument("--" + name, type=type(value), default=value)
    args = parser.parse_args()
    plan = replace(Plan(), **{name: getattr(args, name) for name in asdict(Plan())})
    args.work.mkdir(parents=True, exist_ok=True)
    shards = rendered(args.work, plan)
    seen = plan.shards - plan.fresh
    network = train(args.work, plan, shards[:seen])
    measured = scores(network, shards[seen:], seen)
    weights = {k: v.half() if v.ndim > 1 else v for k, v in network.state_dict().items()}
    weights = {k: v.contiguous() for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    facts = {"plan": asdict(plan), "scores": measured, "subjects": SUBJECTS, "styles": STYLES}
    write_atomically(args.work / "judge-wide.safetensors", save(weights))
    write_atomically(args.work / "judge-wide.json", (json.dumps(facts, indent=1) + "\n").encode())
    log(args.work, "judge-wide", **measured)


if __name__ == "__main__":
    main()
