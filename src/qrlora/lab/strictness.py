"""Measure the strictness of pico's judge: `qrlora lab judge`.

True renders of every reserved pair, made worse step by step: what share is still right, how probably it is named, and
what share is recognised. Nothing is wrong in any of these pictures but how well they are drawn, so a measure that falls
here measures drawing, and one that stays measures what is shown. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import cv2
import numpy as np
from jaxtyping import UInt8

from qrlora._files import write_atomically
from qrlora.pico import world
from qrlora.pico.judge import Judge

FIRST_SCENE = 22_000_000
"""Scene seeds that neither pico nor its judge was made of."""
Pictures = UInt8[np.ndarray, "n h w 3"]


def blurred(pictures: Pictures, sigma: float) -> Pictures:
    """Gaussian, sigma in pixels of 128."""
    return np.stack([cv2.GaussianBlur(picture, (0, 0), sigma) for picture in pictures])


def noisy(pictures: Pictures, level: float) -> Pictures:
    """Gaussian noise, its deviation in levels of 255."""
    noise = np.random.default_rng(0).normal(0, level, pictures.shape)
    return np.clip(pictures + noise, 0, 255).astype(np.uint8)


def contrasted(pictures: Pictures, factor: float) -> Pictures:
    """Away from, or towards, middle grey."""
    return np.clip((pictures.astype(float) - 128) * factor + 128, 0, 255).astype(np.uint8)


WORSE: dict[str, tuple[Callable[[Pictures, float], Pictures], tuple[float, ...]]] = {
    "blur": (blurred, (0.5, 1, 1.5, 2, 3)),
    "noise": (noisy, (10, 20, 40)),
    "contrast": (contrasted, (0.8, 0.6, 0.4)),
}


def measured(judge: Judge, pictures: Pictures, scenes: list[world.Scene]) -> dict[str, float]:
    """right, recognised: shares; named: mean probability of both."""
    asked = ([getattr(scene, part) for scene in scenes] for part in ("subject", "style", "colour"))
    verdict = judge.verdict(pictures, *asked)
    found = {"right": verdict.both, "named": verdict.p_subject * verdict.p_style, "recognised": verdict.recognised}
    return {name: round(float(values.mean()), 4) for name, values in found.items()}


def main(options: SimpleNamespace) -> None:
    """Measure, print, write."""
    pairs = [(s, t) for s in world.RESERVED_SUBJECTS for t in world.RESERVED_STYLES] * options.each
    scenes = [world.sample_scene(FIRST_SCENE + i, subject=s, style=t) for i, (s, t) in enumerate(pairs)]
    true = np.stack([world.render(scene)[0] for scene in scenes])
    judge = Judge.load()
    found = {"as they are": measured(judge, true, scenes)}
    for name, (worse, degrees) in WORSE.items():
        found |= {f"{name} {degree:g}": measured(judge, worse(true, degree), scenes) for degree in degrees}
    print(f"{'':14}{'right':>8}{'named':>8}{'recognised':>12}")
    for name, row in found.items():
        print(f"{name:14}{row['right']:8.2f}{row['named']:8.2f}{row['recognised']:12.2f}")
    facts = {"pictures": len(scenes), "measured": found}
    write_atomically(options.json, (json.dumps(facts, indent=1) + "\n").encode())
