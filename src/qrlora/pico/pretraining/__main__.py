"""Train pico: ``python -m qrlora.pico.pretraining --work DIR``.

On the small world, in six stages, each resumable from what lies in DIR: ``render`` pictures, solve for a linear
``autoencoder``, encode ``latents``, train the ``denoiser`` (with both text encoders), train the ``decoder`` on the same
latents, ``export`` the pipeline. On the wide world, from a trained pipeline: ``--start PIPELINE --stages wide,export``
renders, encodes and trains at once, for as long as it is left to. The same code runs on CPU and GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from qrlora._files import claimed
from qrlora._interrupts import ended
from qrlora.pico import WEIGHTS
from qrlora.pico.pretraining.plan import Plan

SMALL = "render,autoencoder,latents,denoiser,decoder,export"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m qrlora.pico.pretraining", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for pictures, latents, checkpoints and the log"
    )
    parser.add_argument("--stages", default=SMALL, help=f"comma-separated; default: {SMALL}")
    parser.add_argument("--target", type=Path, default=WEIGHTS / "pipeline")
    for name, value in asdict(Plan()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    return parser.parse_args()


def main() -> int:
    """Run the stages named on the command line; the exit code.

    The trainer is imported here: processes that only render import this file too, and should not load torch for it.
    """
    import torch

    from qrlora.pico.pretraining import autoencoder, denoiser, export, pictures, wide

    args = _arguments()
    plan = Plan(**{name: getattr(args, name) for name in asdict(Plan())})
    if plan.threads:
        torch.set_num_threads(plan.threads)
    stages: dict[str, Callable[[Path, Plan], None]] = {
        "render": pictures.render_stage,
        "autoencoder": autoencoder.autoencoder_stage,
        "latents": pictures.latents_stage,
        "denoiser": denoiser.denoiser_stage,
        "decoder": autoencoder.decoder_stage,
        "wide": wide.wide_stage,
        "export": partial(export.export_stage, target=args.target),
    }
    asked = args.stages.split(",")
    with contextlib.ExitStack() as claims:
        for folder in (args.work, args.target) if "export" in asked else (args.work,):
            claims.enter_context(claimed(folder, folder=True))
        for stage in asked:
            stages[stage](args.work, plan)
    return 0


if __name__ == "__main__":
    sys.exit(ended("qrlora.pico.pretraining", main))
