"""Measure the distance of nameless styles from reserved ones: ``python -m qrlora.pico.judge.neighbours``.

A style that is kept from the base model must not be among the nameless ones that it is trained on. By the judge's own
style features: for each reserved style the nearest nameless one, in units of the limit within which a true render of
the style lies (1 would be accepted), the same for the named styles that the base model knows, and the share of all
nameless pictures that the judge would call right in a reserved style.
"""

from __future__ import annotations

import json
from dataclasses import replace

import click
import cv2
import numpy as np

from qrlora.pico import world
from qrlora.pico.judge import Judge
from qrlora.pico.world import nameless, wide

_SUBJECTS = ("mug", "car", "chair", "guitar")


def pictures(style: str) -> np.ndarray:
    """Renders (n, 128, 128, 3) of the same few subjects in a style."""
    rng, pose = np.random.default_rng(5), world.sample_scene(0).pose
    scenes = [wide.posed(rng, world.Scene(subject, style, "red", "white", 0, pose)) for subject in _SUBJECTS]
    return np.stack([wide.render(replace(scene, pose=pose))[0] for scene in scenes])


def distances(judge: Judge, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to each reserved style, in units of its limit, mean over pictures; and the shares called right."""
    away, right = [], []
    for style in world.RESERVED_STYLES:
        verdict = judge.verdict(shown, _SUBJECTS, style)
        away.append(verdict.distance["style"].mean())
        right.append(verdict.style.mean())
    return np.array(away), np.array(right)


@click.command()
@click.option("--styles", default=nameless.STYLE_COUNT, show_default=True, help="Nameless styles, from the first.")
def main(styles: int) -> None:
    """Measure the distance of nameless styles from reserved ones: a JSON object a reserved style."""
    cv2.setNumThreads(1)
    judge = Judge.load()
    found = [distances(judge, pictures(f"style {number}")) for number in range(styles)]
    away, right = (np.stack(part) for part in zip(*found, strict=True))
    named = np.stack([distances(judge, pictures(style))[0] for style in world.SEEN_STYLES])
    own = {style: distances(judge, pictures(style))[0][i] for i, style in enumerate(world.RESERVED_STYLES)}
    for i, style in enumerate(world.RESERVED_STYLES):
        near = int(away[:, i].argmin())
        facts = {
            "style": style, "itself": round(float(own[style]), 3), "nearest_nameless": round(float(away[near, i]), 3),
            "number": near, "description": ", ".join(nameless.description(near)),
            "nearest_named": round(float(named[:, i].min()), 3), "share_called_right": float(right[:, i].mean()),
        }  # fmt: skip
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
