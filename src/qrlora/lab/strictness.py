"""Measure the strictness of pico's judge: `qrlora lab judge`.

True renders of every reserved and every held-back pair, changed a little (a person would still call them right) and
then more: the share that is still right, the probability of its name, and the share that is recognised. Then renders
that nobody would call right: another style, another subject, halves of two, a shape in pieces, wrong colours. The
limits of "right" have to keep the first and refuse the last; between them they say how much a drawing may suffer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
from jaxtyping import UInt8

from qrlora._files import write_atomically
from qrlora.lab.base import requests
from qrlora.pico import world
from qrlora.pico.judge import Judge, defects

FIRST_SCENE = 22_000_000
"""Scene seeds that neither pico nor its judge was trained on."""
Pictures = UInt8[np.ndarray, "n h w 3"]


def blurred(pictures: Pictures, sigma: float) -> Pictures:
    """Gaussian blur, sigma in pixels of 128."""
    return np.stack([cv2.GaussianBlur(picture, (0, 0), sigma) for picture in pictures])


def noisy(pictures: Pictures, level: float) -> Pictures:
    """Gaussian noise, its deviation in levels of 255."""
    return _levels(pictures + np.random.default_rng(0).normal(0, level, pictures.shape))


def moved(pictures: Pictures, pixels: float) -> Pictures:
    """Moved to the right, the left edge repeated."""
    return np.pad(pictures, ((0, 0), (0, 0), (int(pixels), 0), (0, 0)), mode="edge")[:, :, : -int(pixels)]


def _levels(pictures: np.ndarray) -> Pictures:
    return np.clip(pictures, 0, 255).astype(np.uint8)


CHANGES: dict[str, tuple[Callable[[Pictures, float], Pictures], tuple[float, ...]]] = {
    "moved": (moved, (2,)),
    "brightness": (lambda pictures, factor: _levels(pictures * factor), (1.04,)),
    "blur": (blurred, (0.5, 0.75, 1, 1.5, 2, 3)),
    "noise": (noisy, (5, 10, 20, 25, 40)),
    "contrast": (lambda pictures, factor: _levels((pictures.astype(float) - 128) * factor + 128), (0.8, 0.6, 0.4)),
    "mirrored": (lambda pictures, _: np.ascontiguousarray(pictures[:, :, ::-1]), (0,)),
}


def _with_defect(defect: Callable[..., np.ndarray]) -> Callable[[Pictures, float], Pictures]:
    def change(pictures: Pictures, _: float) -> Pictures:
        rngs = (np.random.default_rng((0, i)) for i in range(len(pictures)))
        whole = pictures.astype(np.float32) / 255
        return _levels(255 * np.stack([defect(one, rng) for one, rng in zip(whole, rngs, strict=True)]) + 0.5)

    return change


WRONG = (defects.misshapen, *defects.COLOUR_DEFECTS)
CHANGES |= {"as a person accepts": (_with_defect(defects.mild), (0,))}
CHANGES |= {one.__name__.replace("_", " "): (_with_defect(one), (0,)) for one in WRONG}
MEASURES = ("subject", "style", "right", "named", "recognised")


def measured(judge: Judge, pictures: Pictures, scenes: list[world.Scene]) -> dict[str, float]:
    """Shares of pictures by MEASURES; "right" is both, "named" the mean probability of both."""
    asked = ([getattr(scene, part) for scene in scenes] for part in ("subject", "style", "colour"))
    verdict = judge.verdict(pictures, *asked)
    each = (verdict.subject, verdict.style, verdict.both, verdict.p_subject * verdict.p_style, verdict.recognised)
    return {name: round(float(values.mean()), 4) for name, values in zip(MEASURES, each, strict=True)}


def main(options: SimpleNamespace) -> None:
    """Measure, print, write."""
    reserved = [(s, t) for s in world.RESERVED_SUBJECTS for t in world.RESERVED_STYLES] * options.each
    groups = {
        "reserved pairs": [
            world.sample_scene(FIRST_SCENE + i, subject=s, style=t) for i, (s, t) in enumerate(reserved)
        ],
        "held-back pairs": requests(world.HELD_BACK_PAIRS, options.each * len(world.HELD_BACK_PAIRS), 0),
    }
    judge, facts = Judge.load(), {}
    for group, scenes in groups.items():
        true = np.stack([world.render(scene)[0] for scene in scenes])
        rows = changed(judge, true, scenes)
        facts[group] = {"pictures": len(scenes), "measured": rows}
        print(f"{group:16}" + "".join(f"{name:>12}" for name in MEASURES))
        for name, row in rows.items():
            print(f"{name:16}" + "".join(f"{row[measure]:12.3f}" for measure in MEASURES))
    write_atomically(options.json, (json.dumps(facts, indent=1) + "\n").encode())


def changed(judge: Judge, true: Pictures, scenes: list[world.Scene]) -> dict[str, dict[str, float]]:
    """The measures of these renders as they are, and after every change."""
    found = {"as they are": measured(judge, true, scenes)}
    for name, (change, degrees) in CHANGES.items():
        for degree in degrees:
            found[f"{name} {degree:g}".removesuffix(" 0")] = measured(judge, change(true, degree), scenes)
    for part in ("style", "subject"):
        names = list(world.STYLES if part == "style" else world.SUBJECTS)
        after = {name: following for name, following in zip(names, names[1:] + names[:1], strict=True)}
        others = [
            replace(scene, style=after[scene.style])
            if part == "style"
            else replace(scene, subject=after[scene.subject])
            for scene in scenes
        ]
        wrong = np.stack([world.render(scene)[0] for scene in others])
        found[f"another {part}"] = measured(judge, wrong, scenes)
        halves = zip(true, wrong, strict=True)
        found[f"half another {part}"] = measured(judge, np.stack([_halves(*pair) for pair in halves]), scenes)
    return found


def _halves(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([one[:, : world.SIZE // 2], other[:, world.SIZE // 2 :]], 1)
