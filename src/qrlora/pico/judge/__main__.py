"""Train pico's judge: ``python -m qrlora.pico.judge --work DIR``.

Four stages, resumable: render pictures of every pair of the world, train the network on them, set the limits on fresh
renders, and measure on renders that nothing before has seen. When only pico's autoencoder is new, ``--start`` keeps the
network of a trained judge.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import save
from torch import Tensor

import qrlora.pico as pico
from qrlora._files import claimed, write_atomically
from qrlora._interrupts import ended
from qrlora.pico import model, world
from qrlora.pico.judge import WEIGHTS, Judge, defects
from qrlora.pico.judge.network import Network
from qrlora.pico.judge.training import IGNORE, halved, train
from qrlora.pico.pretraining.plan import options_of
from qrlora.pico.pretraining.run import log
from qrlora.quality.metrics.colours import VISIBLE, quantiles

SUBJECTS, STYLES = list(world.SUBJECTS), list(world.STYLES)
PAIRS = [(s, t) for s in SUBJECTS for t in STYLES]
NONE_SUBJECT, NONE_STYLE = len(SUBJECTS), len(STYLES)
COLOURS, BACKGROUNDS = list(world.COLOURS), list(world.BACKGROUNDS)
PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Plan:
    """All settings that decide the result. A turn is one render of each of the 448 pairs."""

    seed: int = 0
    first_scene: int = 1_000_000_000  # scene seeds from here on: none that the base model was trained on
    train_turns: int = 40  # as many as there are colours x backgrounds: every pair in every one of them, once
    limit_turns: int = 8
    fresh_turns: int = 8
    steps: int = 1_400
    batch: int = 32
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    accepted: float = 0.985  # of true renders, by each limit alone
    start: str = ""  # a folder with a trained judge whose network is kept: only tables and limits are made anew


# ---------------------------------------------------------------- pictures


def rendered(work: Path, plan: Plan) -> list[np.ndarray]:
    """Render every turn: pictures (448, 128, 128, 4) uint8 of all pairs, the subject's mask as fourth channel."""
    paths = [work / f"turn-{i:02d}.npy" for i in range(plan.train_turns + plan.limit_turns + plan.fresh_turns)]
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_render_turn, paths, repeat(plan), range(len(paths))))
    return [np.load(path, mmap_mode="r") for path in paths]


def _render_turn(path: Path, plan: Plan, turn: int) -> None:
    cv2.setNumThreads(1)
    if not path.exists():
        pictures = np.empty((len(PAIRS), world.SIZE, world.SIZE, 4), np.uint8)
        for i, (s, t) in enumerate(PAIRS):
            seed, colour, ground = plan.first_scene + turn * len(PAIRS) + i, *_colours(turn)
            scene = world.sample_scene(seed, subject=s, style=t, colour=COLOURS[colour], background=BACKGROUNDS[ground])
            picture, mask = world.render(scene)
            pictures[i, ..., :3], pictures[i, ..., 3] = picture, np.round(mask * 255)
        write_atomically(path, lambda f: np.save(f, pictures))
        log(path.parent, "judge-render", turn=turn)


def _colours(turn: int) -> tuple[int, int]:
    return turn % len(COLOURS), turn % len(BACKGROUNDS)


# ---------------------------------------------------------------- network


class Examples:
    """Draws training pictures: true renders, and renders with a defect of the subject or of the style.

    A defect of the style leaves the subject's label as it is, and the other way round, wherever both cannot be meant.
    """

    def __init__(self, turns: list[np.ndarray]):
        self.turns = turns

    def _take(self, rng: np.random.Generator, s: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        raw = self.turns[rng.integers(len(self.turns))][s * len(STYLES) + t].astype(np.float32) / 255
        return raw[..., :3], raw[..., 3]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
        """A picture (128, 128, 3) float32, its subject's and its style's label."""
        s, t = int(rng.integers(len(SUBJECTS))), int(rng.integers(len(STYLES)))
        picture, mask = self._take(rng, s, t)
        kind = rng.choice(["true", "texture", "colour", "ground", "styles", "subjects", "shape"],
                          p=[0.56, 0.10, 0.09, 0.05, 0.08, 0.08, 0.04])  # fmt: skip
        label = {"true": (s, t), "texture": (s, NONE_STYLE), "shape": (NONE_SUBJECT, IGNORE)}.get(kind, (s, t))
        if kind == "texture":
            picture = rng.choice(np.array(defects.TEXTURE_DEFECTS))(picture, rng)
        elif kind == "shape":
            picture = defects.misshapen(picture, rng)
        elif kind == "colour":
            label, picture = self._colour(rng, s, picture, rng.choice(np.array(defects.COLOUR_DEFECTS))(picture, rng))
        elif kind == "ground":
            label, picture = self._colour(rng, s, picture, defects.faded_ground(picture, mask, rng))
        elif kind == "styles":
            label, picture = self._styles(rng, s, t, picture, mask)
        elif kind == "subjects":
            label, picture = self._subjects(rng, s, t, picture)
        return defects.mild(picture, rng), *label

    def _colour(self, rng: np.random.Generator, s: int, before: np.ndarray, after: np.ndarray) -> tuple:
        """Label a recoloured picture: a defect only if the change can be seen, since a grey picture keeps its
        colours."""
        change = np.abs(after - before).mean()
        return (s, NONE_STYLE if change > 0.05 else IGNORE), after

    def _styles(self, rng: np.random.Generator, s: int, t: int, picture: np.ndarray, mask: np.ndarray) -> tuple:
        """Mix two styles of the same subject."""
        other, _ = self._take(rng, s, (t + int(rng.integers(1, len(STYLES)))) % len(STYLES))
        if rng.random() < 0.35:
            return (s, NONE_STYLE), other + (picture - other) * mask[..., None]
        mixed = (defects.blended if rng.random() < 0.6 else defects.halved)(picture, other, rng)
        return (IGNORE, NONE_STYLE), mixed

    def _subjects(self, rng: np.random.Generator, s: int, t: int, picture: np.ndarray) -> tuple:
        """Mix two subjects in the same style."""
        other, _ = self._take(rng, (s + int(rng.integers(1, len(SUBJECTS)))) % len(SUBJECTS), t)
        if rng.random() < 0.6:
            return (NONE_SUBJECT, IGNORE), defects.blended(picture, other, rng)
        return (NONE_SUBJECT, t), defects.halved(picture, other, rng)


# ---------------------------------------------------------------- what true renders look like


def _plain(turn: np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
    return np.ascontiguousarray(turn[..., :3])


def miscoloured(turn: np.ndarray, seed: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Return the same pictures in wrong colours, which leave the subject as right as it was."""
    changes: tuple[Callable, ...] = (*defects.COLOUR_DEFECTS, defects.faded_ground)
    changed = np.empty((*turn.shape[:3], 3), np.uint8)
    for i, raw in enumerate(turn.astype(np.float32) / 255):
        rng = np.random.default_rng((seed, 4, i))
        change = changes[rng.integers(len(changes))]
        mask = (raw[..., 3],) if change is defects.faded_ground else ()
        changed[i] = (np.clip(change(raw[..., :3], *mask, rng), 0, 1) * 255 + 0.5).astype(np.uint8)
    return changed


def gaussian(features: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Whitening (d, d) by the covariance around the means over the dimensions ``over``; and those means, whitened."""
    features = features.double()
    means = features.mean(over, keepdim=True)
    within = (features - means).flatten(0, -2)
    covariance = within.T @ within / (len(within) - means[..., 0].numel())
    # a direction with next to no spread would decide everything: add a twentieth of the mean spread to all
    covariance += 0.05 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    return whiten.float(), (means.squeeze(over) @ whiten).float()


def tables_of(judge: Judge, turns: list[np.ndarray], seed: int) -> dict[str, Tensor]:
    """The judge's tables, from renders of every pair in every colour on every background.

    A subject's renders are those in all styles, in their own and in wrong colours; a style's are those of all subjects.
    """
    looks = [judge.look(_plain(turn)) for turn in turns]
    each = {f: torch.stack([look[f][0] for look in looks]).unflatten(1, (len(SUBJECTS), len(STYLES))) for f in looks[0]}
    odd = [judge.look(miscoloured(turn, seed + i))["subject"][0] for i, turn in enumerate(turns[::5])]
    subject = torch.cat([each["subject"], torch.stack(odd).unflatten(1, (len(SUBJECTS), len(STYLES)))])
    tables: dict[str, Tensor] = {}
    tables["subject.whiten"], tables["subject.means"] = gaussian(subject, (0, 2))
    tables["style.whiten"], tables["style.means"] = gaussian(each["style"], (0, 1))
    tables["pair.whiten"], tables["pair.means"] = gaussian(torch.cat(list(each.values()), -1), (0,))
    return tables | palettes_of(turns)


def palettes_of(turns: list[np.ndarray]) -> dict[str, Tensor]:
    """``palettes.<style>``: the colours of one render of every subject in every colour on every background."""
    found = np.stack([quantiles(turn[..., :3]) for turn in turns])
    grid = np.empty((len(COLOURS), len(BACKGROUNDS), *found.shape[1:]), np.float32)
    for turn, rows in enumerate(found):
        grid[_colours(turn)] = rows
    grid = grid.reshape(len(COLOURS), len(BACKGROUNDS), len(SUBJECTS), len(STYLES), -1)
    tables = {}
    for i, style in enumerate(STYLES):
        known = np.moveaxis(grid[:, :, :, i], 2, 0)  # (subjects, colours, backgrounds, 144)
        known = known.mean(2, keepdims=True) if style in world.OWN_GROUND else known
        tables[f"palettes.{style}"] = torch.from_numpy(np.clip(np.round(known), -127, 127).astype(np.int8))
    return tables


def measure(judge: Judge, pictures: UInt8[np.ndarray, "n h w 3"], colour: int) -> dict[str, np.ndarray]:
    """Distances of one turn's pictures, each held against its own pair."""
    pair = np.arange(len(PAIRS))
    return judge.evidence(pictures, pair // len(STYLES), pair % len(STYLES), np.full(len(PAIRS), colour)).distance


def limits_of(judge: Judge, turns: list[np.ndarray], first: int, plan: Plan) -> dict[str, np.ndarray]:
    """Limits by subject, or style: the distance that the share ``plan.accepted`` of its renders keeps.

    The renders are looked at as pico's autoencoder gives them back: what is judged is the picture, not the last
    sharpness of its pixels, which no picture that pico makes can have. Subjects in wrong colours count as subjects.
    Some styles vary less in colour than an eye can tell; their palettes are held to what it can.
    """
    vae = model.load(pico.path()).vae
    seen = [measure(judge, through_autoencoder(vae, _plain(t)), _colours(first + i)[0]) for i, t in enumerate(turns)]
    odd = [through_autoencoder(vae, miscoloured(t, plan.seed + first + i)) for i, t in enumerate(turns[::4])]
    limits = {}
    for name in seen[0]:
        rows = [d[name] for d in seen] + ([measure(judge, p, -1)[name] for p in odd] if name == "subject" else [])
        each = np.stack(rows).reshape(len(rows), len(SUBJECTS), len(STYLES))
        limits[name] = np.quantile(each, plan.accepted, axis=(0, 2) if name == "subject" else (0, 1))
        if name.endswith("palette"):
            limits[name] = np.maximum(limits[name], VISIBLE)
    return limits


@torch.no_grad()
def through_autoencoder(vae: Any, pictures: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures encoded and decoded again."""
    back = []
    for chunk in torch.from_numpy(pictures).split(32):
        latent = vae.encode(chunk.permute(0, 3, 1, 2).float() / 127.5 - 1).latent
        back.append(((vae.decode(latent).sample.clamp(-1, 1) + 1) * 127.5 + 0.5).permute(0, 2, 3, 1).byte())
    return torch.cat(back).numpy()


# ---------------------------------------------------------------- export


def scores(judge: Judge, turns: list[np.ndarray], first: int) -> dict[str, float]:
    """Shares of fresh renders classified right, and accepted, with their number."""
    pair, found, verdicts = np.arange(len(PAIRS)), [], []
    for i, turn in enumerate(turns):
        pictures, colour = _plain(turn), COLOURS[_colours(first + i)[0]]
        look = judge.look(pictures)
        found.append([
            look["subject"][1].argmax(1).numpy() == pair // len(STYLES),
            look["style"][1].argmax(1).numpy() == pair % len(STYLES),
        ])  # fmt: skip
        verdicts.append(judge.verdict(pictures, [s for s, _ in PAIRS], [t for _, t in PAIRS], colour).rates())
    right = np.stack(found).mean((0, 2))
    accepted = {f"accepted_{k}": float(np.mean([v[k] for v in verdicts])) for k in ("subject", "style", "both")}
    return {
        "fresh_renders": len(turns) * len(PAIRS),
        "named_subject": float(right[0]), "named_style": float(right[1]), **accepted,
    }  # fmt: skip


def export(work: Path, plan: Plan, target: Path, network: Network, turns: list[np.ndarray]) -> None:
    """Set the limits, score, and write judge.safetensors and judge.json."""
    weights = halved(network)
    network.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    judge = Judge(network, {}, {})
    judge.tables = tables_of(judge, turns[: plan.train_turns], plan.seed)
    fresh = plan.train_turns + plan.limit_turns
    judge.limits = limits_of(judge, turns[plan.train_turns : fresh], plan.train_turns, plan)
    measured = scores(judge, turns[fresh:], fresh)
    facts = {
        "command": "python -m qrlora.pico.judge --work DIR",
        "plan": asdict(plan),
        "machine": f"one core, {platform.machine()}, torch {torch.__version__}",
        "scores": measured,
        "limits": {k: [round(float(x), 4) for x in v] for k, v in judge.limits.items()},
        "subjects": SUBJECTS,
        "styles": STYLES,
    }
    tensors = {f"network.{k}": v for k, v in weights.items()} | judge.tables
    write_atomically(target / "judge.safetensors", save({k: v.contiguous() for k, v in tensors.items()}))
    write_atomically(target / "judge.json", (json.dumps(facts, indent=1) + "\n").encode())
    log(work, "judge-export", **measured)


@click.command()
@click.option("--work", type=PATH, required=True, help="Folder of pictures, checkpoints and the log.")
@click.option("--target", type=PATH, default=WEIGHTS, show_default=True, help="Folder of the trained judge.")
@options_of(Plan)
def main(work: Path, target: Path, **plan: Any) -> None:
    """Train pico's judge: what is left to do of it."""
    sys.exit(ended("qrlora.pico.judge", lambda: run(work, target, Plan(**plan))))


def run(work: Path, target: Path, plan: Plan) -> int:
    """Render, train, export; the exit code."""
    cv2.setNumThreads(1)
    with claimed(work, folder=True), claimed(target, folder=True):
        turns = rendered(work, plan)
        known = Judge.load(Path(plan.start)).network if plan.start else None
        examples = Examples(turns[: plan.train_turns])
        network = known or train(work, "judge", plan, (len(SUBJECTS), len(STYLES)), examples.draw, 3)
        export(work, plan, target, network, turns)
    return 0


if __name__ == "__main__":
    main()
