"""The wide world: rendered, encoded and trained on at once, in pictures that grow in number with the steps."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qrlora._files import write_atomically
from qrlora.pico import model
from qrlora.pico.pretraining import processes
from qrlora.pico.pretraining.denoiser import Batch, train
from qrlora.pico.pretraining.pictures import CHUNK, tensor
from qrlora.pico.pretraining.plan import Plan
from qrlora.pico.pretraining.run import log, trapezoid
from qrlora.pico.pretraining.text import widen
from qrlora.pico.world import wide

PART = 25
"""Pictures that one process renders at a time."""


class Shards:
    """Latents of ``CHUNK`` scenes a file. Step s draws from the first ``count(s)`` of them, so a run that is resumed
    draws what it would have drawn; what is missing is rendered then, by all processes."""

    def __init__(self, work: Path, plan: Plan, vae: Any):
        self.work, self.plan, self.vae = work, plan, vae
        self.latents: list[np.ndarray] = []
        self.workers = plan.threads * processes.COUNT or multiprocessing.cpu_count()

    def count(self, step: int) -> int:
        """The number of shards that a step draws from."""
        return min(self.plan.wide, self.plan.first_shards + step // self.plan.shard_steps)

    def at(self, step: int) -> list[np.ndarray]:
        """The shards of a step, each (CHUNK, 16, 16, 16) float16."""
        missing = range(len(self.latents), self.count(step))
        rendered = [i for i in missing if not self._file(i).exists()]
        if rendered and not processes.RANK:
            self._make(rendered)
        while not all(self._file(i).exists() for i in rendered):  # the first process renders
            time.sleep(0.2)
        self.latents += [np.load(self._file(i)) for i in missing]
        return self.latents[: self.count(step)]

    def _file(self, number: int) -> Path:
        return self.work / f"wide-{number:05d}.npy"

    def _make(self, numbers: list[int]) -> None:
        # spawn: threads of OpenMP and OpenCV do not survive a fork. What a worker imports has to be light, see __main__
        with ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn")) as pool:
            for number in numbers:
                parts = pool.map(wide.render_range, range(number * CHUNK, (number + 1) * CHUNK, PART), repeat(PART))
                write_atomically(self._file(number), partial(np.save, arr=self._encoded(np.concatenate(list(parts)))))
                log(self.work, "render", shard=number)

    @torch.no_grad()
    def _encoded(self, pictures: np.ndarray) -> np.ndarray:
        device = next(self.vae.parameters()).device
        parts = [self.vae.encode(x.to(device)).latent.half().cpu() for x in tensor(pictures).split(50)]
        return torch.cat(parts).numpy()


def batches(shards: Shards, plan: Plan, scale: float) -> Batch:
    """Batches of the shards that are there at a step."""

    def batch(step: int) -> tuple[Tensor, list[str], np.random.Generator]:
        rng = np.random.default_rng((plan.seed, 5, step))
        pool = shards.at(step)
        picks = rng.integers(len(pool) * CHUNK, size=plan.denoiser_batch)
        phrasings = rng.integers(1 << 20, size=len(picks))
        captions = [wide.caption(wide.sample(int(i)), int(p)) for i, p in zip(picks, phrasings, strict=True)]
        captions = ["" if rng.random() < plan.caption_dropout else c for c in captions]
        latents = np.stack([pool[i // CHUNK][i % CHUNK] for i in picks]).astype(np.float32)
        return torch.from_numpy(latents) * scale, captions, rng

    return batch


def wide_stage(work: Path, plan: Plan) -> None:
    """Flow matching on the wide world, from a trained pipeline whose autoencoder stays as it is."""
    if not plan.start:
        raise SystemExit("the wide world starts from a trained pipeline; got no --start; give the folder of one")
    pipe = widen(model.load(Path(plan.start)))
    vae = pipe.vae.to(plan.device, memory_format=torch.channels_last).eval()
    batch = batches(Shards(work, plan, vae), plan, float(pipe.vae.config.scaling_factor))
    schedule = partial(trapezoid, warm=plan.warm, cool=plan.cool)
    train(work, "wide", plan, pipe, batch, schedule, ema=plan.ema, seconds=(300.0, 60.0), keep_last=True)
