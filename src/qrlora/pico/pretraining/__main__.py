"""Train pico: ``python -m qrlora.pico.pretraining --work DIR``.

On the small world, in six stages, each resumable from what lies in DIR: ``render`` pictures, solve for a linear
``autoencoder``, encode ``latents``, train the ``denoiser`` (with both text encoders), train the ``decoder`` on the same
latents, ``export`` the pipeline. On the wide world, from a trained pipeline: ``--start PIPELINE --stages wide,export``
renders, encodes and trains at once, for as long as it is left to. The same code runs on CPU and GPU. The denoiser
trains in several processes, each on a part of every batch, under ``torchrun --nproc-per-node 2 -m
qrlora.pico.pretraining --threads 1``. On two cores with bfloat16 units, 64 pictures took 0.42 s (``seconds_per_step``
in the log of that command) where one process with two threads took 0.57 s.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from qrlora._files import claimed
from qrlora._interrupts import ended
from qrlora.pico import WEIGHTS
from qrlora.pico.pretraining.plan import Plan, options_of

SMALL = "render,autoencoder,latents,denoiser,decoder,export"
PATH = click.Path(path_type=Path)


@click.command()
@click.option("--work", type=PATH, required=True, help="Folder of pictures, latents, checkpoints and the log.")
@click.option("--stages", default=SMALL, show_default=True, help="Separated by commas.")
@click.option("--target", type=PATH, default=WEIGHTS / "pipeline", show_default=True)
@options_of(Plan)
def main(work: Path, stages: str, target: Path, **plan: Any) -> None:
    """Train pico, by the stages named."""
    sys.exit(ended("qrlora.pico.pretraining", lambda: run(work, stages.split(","), target, Plan(**plan))))


def run(work: Path, asked: list[str], target: Path, plan: Plan) -> int:
    """Run these stages; the exit code.

    The trainer is imported here: processes that only render import this file too, and should not load torch for it.
    """
    import torch

    from qrlora.pico.pretraining import autoencoder, denoiser, export, pictures, processes, wide

    if plan.threads:
        torch.set_num_threads(plan.threads)
    stages: dict[str, Callable[[Path, Plan], None]] = {
        "render": pictures.render_stage,
        "autoencoder": autoencoder.autoencoder_stage,
        "latents": pictures.latents_stage,
        "denoiser": denoiser.denoiser_stage,
        "decoder": autoencoder.decoder_stage,
        "wide": wide.wide_stage,
        "export": partial(export.export_stage, target=target),
    }
    with contextlib.ExitStack() as claims:
        claims.enter_context(processes.joined())
        if processes.RANK:
            asked = [stage for stage in asked if stage in ("denoiser", "wide")]
        else:
            for folder in (work, target) if "export" in asked else (work,):
                claims.enter_context(claimed(folder, folder=True))
        for stage in asked:
            stages[stage](work, plan)
    return 0


if __name__ == "__main__":
    main()
