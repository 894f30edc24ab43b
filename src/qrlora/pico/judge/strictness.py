"""Measure the judge's strictness: ``python -m qrlora.pico.judge.strictness``.

The judge's shares for true renders of held-back pairs, as they are and after small changes of which a person would say
that the picture is still right, and larger ones of which nobody would.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import cv2
import numpy as np

from qrlora.pico import world
from qrlora.pico.judge import Judge

Change = Callable[[np.ndarray], np.ndarray]


def requests(pairs: tuple[tuple[str, str], ...], n: int, seed: int) -> list[world.Scene]:
    """n scenes over all pairs in turn, in random colours."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = [pairs[order[i % len(pairs)]] for i in range(n)]
    return [world.sample_scene(10_000_000 + seed + i, subject=s, style=t) for i, (s, t) in enumerate(chosen)]


def _blurred(pixels: float) -> Change:
    return lambda picture: cv2.GaussianBlur(picture, (0, 0), pixels)


def _moved(pixels: int) -> Change:
    matrix = np.array([[1, 0, pixels], [0, 1, 0]], np.float32)
    return lambda p: cv2.warpAffine(p, matrix, p.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


def _grained(strength: float) -> Change:
    grain = np.random.default_rng(0).normal(0, strength * 255, (world.SIZE, world.SIZE, 3))
    return lambda picture: np.clip(picture + grain, 0, 255).astype(np.uint8)


CHANGES: dict[str, Change] = {
    "as it is": lambda picture: picture, "blurred by 0.5 pixels": _blurred(0.5), "by 0.75": _blurred(0.75),
    "by 1": _blurred(1.0), "by 1.5": _blurred(1.5), "by 3": _blurred(3.0), "moved by 2 pixels": _moved(2),
    "grain of 0.02": _grained(0.02), "grain of 0.1": _grained(0.1), "mirrored": lambda p: p[:, ::-1].copy(),
    "brighter by 4 %": lambda p: np.clip(p * 1.04, 0, 255).astype(np.uint8),
}  # fmt: skip


def main() -> None:
    """Print a table: a row a change, and the shares of subject, style and both right, and recognised."""
    parser = argparse.ArgumentParser(prog="python -m qrlora.pico.judge.strictness", description=__doc__)
    parser.add_argument("--pictures", type=int, default=300)
    scenes = requests(world.HELD_BACK_PAIRS, parser.parse_args().pictures, 0)
    true, judge = [world.render(scene)[0] for scene in scenes], Judge.load()
    subjects, styles, colours = zip(*((s.subject, s.style, s.colour) for s in scenes), strict=True)
    print(f"{'':24}subject  style   both  recognised")
    for name, change in CHANGES.items():
        verdict = judge.verdict(np.stack([change(p) for p in true]), subjects, styles, colours)
        rates = [*verdict.rates().values(), float(verdict.recognised.mean())]
        print(f"{name:24}" + "".join(f"{rate:7.3f}" for rate in rates), flush=True)


if __name__ == "__main__":
    main()
