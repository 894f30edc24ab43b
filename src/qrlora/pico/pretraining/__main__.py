"""Train pico: ``python -m qrlora.pico.pretraining --work DIR``.

On the small world, in six stages, each resumable from what lies in DIR: ``render`` pictures, solve for a linear
``autoencoder``, encode ``latents``, train the ``denoiser`` (with both text encoders), train the ``decoder`` on the same
latents, ``export`` the pipeline. On the wide world, from a trained pipeline: ``--start PIPELINE --stages wide,export``
renders, encodes and trains at once, for as long as it is left to. The same code runs on CPU and GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

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


def main() -> None:
    """Run the stages named on the command line.

    The trainer is imported here: processes that only render import this file too, and should not load torch for it.
    """
    import torch

    from qrlora.pico.pretraining import autoencoder, denoiser, export, pictures, wide

    args = _arguments()
    plan = Plan(**{name: getattr(args, name) for name in asdict(Plan())})
    args.work.mkdir(parents=True, exist_ok=True)
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
    for stage in args.stages.split(","):
        stages[stage](args.work, plan)


if __name__ == "__main__":
    main()
