"""Score pico by its own judge: ``python -m qrlora.pico.evaluate [--pictures 1000] [--out scores.json]``.

Half of the pictures show seen pairs of subject and style, half show pairs that pretraining held back. What the judge
calls right is said in ``judge``. Beside them stands what could be reached at all: true renders of the held-back pairs,
as they are and after the autoencoder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

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
    return _shares(Judge.load(), pictures, scenes)


@torch.no_grad()
def bounds(scenes: list[world.Scene]) -> dict[str, dict[str, float]]:
    """The judge's shares for the true renders of scenes, as they are and encoded and decoded."""
    pipe, judge, decoded = load_pipeline(path())[0], Judge.load(), []
    true = [Image.fromarray(world.render(scene)[0]) for scene in scenes]
    for start in range(0, len(true), 50):
        pixels = pipe.image_processor.preprocess(true[start : start + 50]).to(pipe.device)
        decoded += pipe.image_processor.postprocess(pipe.vae.decode(pipe.vae.encode(pixels).latent).sample)
    found = {"true renders": true, "true renders through the autoencoder": decoded}
    return {name: _shares(judge, pictures, scenes) for name, pictures in found.items()}


def _shares(judge: Judge, pictures: list[Image.Image], scenes: list[world.Scene]) -> dict[str, float]:
    subjects, styles, colours = zip(*((s.subject, s.style, s.colour) for s in scenes), strict=True)
    rates = judge.verdict(np.stack([np.asarray(p) for p in pictures]), subjects, styles, colours).rates()
    return {"n": len(scenes), **{part: round(share, 4) for part, share in rates.items()}}


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
    scores |= bounds(requests(world.HELD_BACK_PAIRS, half, args.seed))
    options = {k: v for k, v in vars(args).items() if k != "out"}
    facts = {"scores": scores, **options, "seconds": round(time.time() - started), "torch": torch.__version__}
    text = json.dumps(facts, indent=2)
    print(text)
    if args.out:
        write_atomically(args.out, text.encode() + b"\n")


if __name__ == "__main__":
    main()
