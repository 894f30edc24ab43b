"""Assemble the trained parts as a pipeline folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qrlora.pico import model, world
from qrlora.pico.pretraining.pictures import scenes_of
from qrlora.pico.pretraining.plan import Plan
from qrlora.pico.pretraining.run import log
from qrlora.pico.pretraining.text import all_captions, widen, words
from qrlora.pico.world import wide


def _trained(work: Path, name: str, pipe: Any) -> None:
    state = torch.load(work / f"{name}.pt", weights_only=True)
    for part, weights in state["modules"].items():
        getattr(pipe, part).load_state_dict(weights)


def averaged(work: Path, plan: Plan) -> Any:
    """The pipeline that training on the wide world has come to: the moving average of its weights."""
    pipe, state = widen(model.load(Path(plan.start))), torch.load(work / "wide.pt", weights_only=True)
    parts = [getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")]
    for weight, mean in zip((p for part in parts for p in part.parameters()), state["average"], strict=True):
        weight.data.copy_(mean)
    met = [wide.caption(wide.sample(i), i) for i in range(20_000)]
    model.tell_words_apart(pipe, met)
    return pipe


def export_stage(work: Path, plan: Plan, target: Path) -> None:
    """Write the pipeline directory; after training on the wide world its average, else see ``_assembled``."""
    pipe = averaged(work, plan) if (work / "wide.pt").exists() else _assembled(work, plan)
    model.save(pipe, target)
    log(work, "export", path=target.name, plan=asdict(plan))


def _assembled(work: Path, plan: Plan) -> Any:
    """Assemble the trained parts. Without a denoiser trained here, all but the decoder is the start's."""
    alone = bool(plan.start) and not (work / "denoiser.pt").exists()
    pipe = model.load(Path(plan.start)) if alone else model.build(words(work, plan), plan.seed)
    for name in ("decoder",) if alone else ("autoencoder", "decoder", "denoiser"):
        if name != "decoder" or (work / "decoder.pt").exists():
            _trained(work, name, pipe)
    if not alone:
        pipe.vae.register_to_config(**json.loads((work / "latents.json").read_text()))
        novel = [world.caption(scene, i) for i, scene in enumerate(scenes_of(plan)[plan.pictures :])]
        model.tell_words_apart(pipe, all_captions() + novel)
    return pipe
