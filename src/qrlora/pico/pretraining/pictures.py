"""The small world rendered to files, and encoded."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qrlora._files import check_room, write_atomically
from qrlora.pico import model, world
from qrlora.pico.pretraining.plan import Plan
from qrlora.pico.pretraining.run import log

CHUNK = 500
"""Pictures a file."""
NOVEL_SCENES = 5_000_000
"""Scene seed of the first picture with something nameless in it."""


def scenes_of(plan: Plan) -> list[world.Scene]:
    """The scenes of all pictures: of the world, then those with something nameless in them."""
    known = [world.sample_scene(i) for i in range(plan.pictures)]
    return known + [world.sample_novelty(NOVEL_SCENES + i) for i in range(plan.novelties)]


def _render_chunk(path: Path, scenes: list[world.Scene]) -> None:
    torch.set_num_threads(1)
    pictures = np.stack([world.render(scene)[0] for scene in scenes])
    write_atomically(path, lambda f: np.save(f, pictures))


def chunks(work: Path, plan: Plan, kind: str) -> list[Path]:
    """Files of known pictures, then of novel ones; the first stay valid when the second are added."""
    known = [work / f"{kind}-{i:04d}.npy" for i in range(plan.pictures // CHUNK)]
    return known + [work / f"novel-{kind}-{i:04d}.npy" for i in range(plan.novelties // CHUNK)]


def render_stage(work: Path, plan: Plan) -> None:
    """Render picture i from scene seed i, in files of ``CHUNK`` pictures; those with something nameless after them."""
    scenes = scenes_of(plan)
    files = [(p, scenes[i * CHUNK : (i + 1) * CHUNK]) for i, p in enumerate(chunks(work, plan, "pictures"))]
    todo = [(path, part) for path, part in files if not path.exists()]
    check_room(work, len(todo) * CHUNK * world.SIZE**2 * 3, folder=True)
    with ProcessPoolExecutor(2) as pool:
        for done, _ in enumerate(pool.map(_render_chunk, *zip(*todo, strict=True)) if todo else []):
            log(work, "render", step=done + 1, of=len(todo))


def tensor(pictures: np.ndarray) -> Float[Tensor, "b 3 h w"]:
    """uint8 pictures as float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def linear_autoencoder(work: Path, plan: Plan) -> Any:
    """The autoencoder that the stage of this name left, on the plan's device."""
    vae = model.autoencoder()
    vae.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True)["modules"]["vae"])
    return vae.to(plan.device, memory_format=torch.channels_last)


@torch.no_grad()
def latents_stage(work: Path, plan: Plan) -> None:
    """Encode every picture once; the scale to unit variance goes into the autoencoder's config."""
    vae = linear_autoencoder(work, plan).eval()
    for source, target in zip(chunks(work, plan, "pictures"), chunks(work, plan, "latents"), strict=True):
        if not target.exists():
            parts = tensor(np.load(source)).split(50)
            z = torch.cat([vae.encode(x.to(plan.device)).latent.cpu() for x in parts]).half().numpy()
            write_atomically(target, partial(np.save, arr=z))
    sample = np.load(chunks(work, plan, "latents")[0]).astype(np.float32)
    facts = {"scaling_factor": float(1 / sample.std())}
    (work / "latents.json").write_text(json.dumps(facts))
    log(work, "latents", **facts)
