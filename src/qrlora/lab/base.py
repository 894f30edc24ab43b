"""Score pico by its own judge: ``qrlora lab base [--pictures 1000] [--by pair] [--json scores.json]``.

Half of the pictures show seen pairs of subject and style, half show pairs that pretraining held back. What the judge
calls right is said in ``judge``. Beside them stands what could be reached at all: true renders of the held-back pairs,
as they are and after the autoencoder. The shares of each pair, subject and style, the worst first, are in the JSON of
``--json``, and ``--by`` prints those of one kind.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from qrlora._files import write_atomically
from qrlora.models.families import load_pipeline
from qrlora.models.generation import generate_jobs
from qrlora.pico import SETTINGS, path, world
from qrlora.pico.judge import Judge, Verdict

KINDS: dict[str, Callable[[world.Scene], str]] = {
    "pair": lambda scene: f"{scene.subject} in {scene.style}",
    "subject": lambda scene: scene.subject,
    "style": lambda scene: scene.style,
}
PARTS = ("both", "style", "subject")


def requests(pairs: tuple[tuple[str, str], ...], n: int, seed: int) -> list[world.Scene]:
    """Return n scenes over all pairs in turn, in random colours."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = [pairs[order[i % len(pairs)]] for i in range(n)]
    return [world.sample_scene(10_000_000 + seed + i, subject=s, style=t) for i, (s, t) in enumerate(chosen)]


def score(scenes: list[world.Scene], steps: int, guidance: float) -> dict[str, Any]:
    """Generate one picture a scene from its first wording, and the judge's shares."""
    pipe, family = load_pipeline(path())
    jobs = [(world.caption(scene), scene.seed) for scene in scenes]
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "batch_size": 20, "progress": _tell}
    pictures = generate_jobs(pipe, family, jobs, **options)
    return _shares(Judge.load(), pictures, scenes)


@torch.no_grad()
def bounds(scenes: list[world.Scene]) -> dict[str, dict[str, Any]]:
    """The judge's shares for the true renders of scenes, as they are and encoded and decoded."""
    pipe, judge, decoded = load_pipeline(path())[0], Judge.load(), []
    true = [Image.fromarray(world.render(scene)[0]) for scene in scenes]
    for start in range(0, len(true), 50):
        pixels = pipe.image_processor.preprocess(true[start : start + 50]).to(pipe.device)
        decoded += pipe.image_processor.postprocess(pipe.vae.decode(pipe.vae.encode(pixels).latent).sample)
    found = {"true renders": true, "true renders through the autoencoder": decoded}
    return {name: _shares(judge, pictures, scenes) for name, pictures in found.items()}


def _shares(judge: Judge, pictures: list[Image.Image], scenes: list[world.Scene]) -> dict[str, Any]:
    subjects, styles, colours = zip(*((s.subject, s.style, s.colour) for s in scenes), strict=True)
    return shares(judge.verdict(np.stack([np.asarray(p) for p in pictures]), subjects, styles, colours), scenes)


def shares(verdict: Verdict, scenes: list[world.Scene]) -> dict[str, Any]:
    """Shares of pictures right; under "by" those of each pair, subject and style, the worst (by "both") first."""
    right = {part: getattr(verdict, part) for part in reversed(PARTS)}

    def of(places: Iterable[int]) -> dict[str, float]:
        chosen = list(places)
        return {"n": len(chosen), **{part: round(float(hits[chosen].mean()), 4) for part, hits in right.items()}}

    found: dict[str, Any] = {**of(range(len(scenes))), "by": {}}
    for kind, name_of in KINDS.items():
        places = defaultdict(list)
        for place, scene in enumerate(scenes):
            places[name_of(scene)].append(place)
        rows = {name: of(chosen) for name, chosen in places.items()}
        found["by"][kind] = dict(sorted(rows.items(), key=lambda row: (*(row[1][part] for part in PARTS), row[0])))
    return found


def table(group: str, kind: str, rows: dict[str, dict[str, float]]) -> str:
    """The shares of every pair, subject or style, a line each."""
    lines = [f"{group}, by {kind}", " ".join(f"{head:>7}" for head in (*PARTS, "n"))]
    lines += [" ".join([*(f"{row[p]:7.3f}" for p in PARTS), f"{row['n']:7}", f" {name}"]) for name, row in rows.items()]
    return "\n".join(lines)


def _tell(done: int, of: int) -> None:
    print(f"{done} of {of}", flush=True)


def main(args: SimpleNamespace) -> None:
    """Print the scores as JSON, and write them where ``args.json`` says."""
    args.steps, args.guidance = args.steps or SETTINGS["steps"], args.guidance or SETTINGS["guidance"]
    started, half = time.time(), args.pictures // 2
    groups = {"seen pairs": world.SEEN_PAIRS, "held-back pairs": world.HELD_BACK_PAIRS}
    scores = {k: score(requests(p, half, args.seed), args.steps, args.guidance) for k, p in groups.items()}
    scores |= bounds(requests(world.HELD_BACK_PAIRS, half, args.seed))
    options = {k: v for k, v in vars(args).items() if k not in ("json", "by")}
    facts = {**options, "seconds": round(time.time() - started), "torch": torch.__version__}
    short = {group: {part: share for part, share in found.items() if part != "by"} for group, found in scores.items()}
    print(json.dumps({"scores": short, **facts}, indent=2))
    for group, found in scores.items() if args.by else ():
        print("\n" + table(group, args.by, found["by"][args.by]))
    if args.json:
        write_atomically(args.json, json.dumps({"scores": scores, **facts}, indent=2).encode() + b"\n")
