"""Score pico by its own judge: ``python -m qrlora.pico.evaluate [--pictures 1000] [--out scores.json]``.

Half of the pictures show seen pairs of subject and style, half show pairs that pretraining held back. What the judge
calls right is said in ``judge``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qrlora.families import load_pipeline
from qrlora.files import write_atomically
from qrlora.generation import generate_jobs
from qrlora.pico import SETTINGS, path, world
from qrlora.pico.judge import Judge


def requests(pairs: tuple[tuple[str, str], ...], n: int, seed: int) -> list[world.Scene]:
    """n scenes over all pairs in turn, in random colours."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = [pairs[order[i % len(pairs)]] for i in range(n)]
    return [world.sample_scene(10_000_000 + seed + i, subject=s, style=t) for i, (s, t) in enumerate(chosen)]


def score(scenes: list[world.Scene], steps: int, guidance: float) -> dict[str, float]:
    """Generate one picture a scene from its first wording, and the judge's shares."""
    pipe, family = load_pipeline(path())
    jobs = [(world.caption(scene), scene.seed) for scene in scenes]
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "batch_size": 20, "progress": _tell}
    pictures = generate_jobs(pipe, family, jobs, **options)
    subjects, styles, colours = zip(*((s.subject, s.style, s.colour) for s in scenes), strict=True)
    verdict = Judge.load().verdict(np.stack([np.asarray(p) for p in pictures]), subjects, styles, colours)
    return {"n": len(scenes), **{k: round(v, 4) for k, v in verdict.rates().items()}}


def _tell(done: int, of: int) -> None:
    print(f"{done} of {of}", flush=True)


def main() -> None:
    """Print the scores as JSON, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(prog="python -m qrlora.pico.evaluate", description=__doc__.split(":")[0])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="denoising steps")
    parser.add_argument("--guidance", type=float, default=SETTINGS["guidance"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started, half = time.time(), args.pictures // 2
    groups = {"seen pairs": world.SEEN_PAIRS, "held-back pairs": world.HELD_BACK_PAIRS}
    scores = {k: score(requests(p, half, args.seed), args.steps, args.guidance) for k, p in groups.items()}
    options = {k: v for k, v in vars(args).items() if k != "out"}
    facts = {"scores": scores, **options, "seconds": round(time.time() - started), "torch": torch.__version__}
    text = json.dumps(facts, indent=2)
    print(text)
    if args.out:
        write_atomically(args.out, text.encode() + b"\n")


if __name__ == "__main__":
    main()
