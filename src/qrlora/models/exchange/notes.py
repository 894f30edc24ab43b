"""Header fields that other programs read from a LoRA: Stability's ModelSpec (version 1.0.0) and kohya's ss_* fields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone

from qrlora.method.adapter import Adapter


@dataclass(frozen=True)
class _Architecture:
    """A family's names elsewhere: ModelSpec's architecture id, kohya's model version, and its original code."""

    modelspec: str
    kohya: str
    implementation: str


_ARCHITECTURES = {
    "sdxl": _Architecture(
        "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "https://github.com/Stability-AI/generative-models"
    ),
    "sd3": _Architecture("stable-diffusion-3", "sd3", "diffusers"),
    "flux": _Architecture("flux-1", "flux1", "diffusers"),
}
_RECIPE = {  # recipe field -> kohya's
    "learning_rate": "ss_learning_rate",
    "steps": "ss_max_train_steps",
    "seed": "ss_seed",
    "batch_size": "ss_total_batch_size",
    "accumulation": "ss_gradient_accumulation_steps",
    "dtype": "ss_mixed_precision",
}


def notes_for(adapter: Adapter, family: str, title: str, resolution: int) -> dict[str, str]:
    """The metadata beside our own, for programs that know nothing of qrlora; alpha is the rank, as in the file."""
    meta = adapter.metadata
    found = _ARCHITECTURES.get(family)
    rank = str(meta.rank)
    notes = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{found.modelspec if found else family}/lora",
        "modelspec.implementation": found.implementation if found else "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.description": f"QR-LoRA {meta.role or 'adapter'}, rank {rank}",
        "modelspec.license": meta.licence,
        "modelspec.trigger_phrase": meta.trigger,
        "modelspec.usage_hint": f"Trigger: {meta.trigger}" if meta.trigger else "",
        "modelspec.merged_from": ", ".join(str(part["name"]) for part in meta.provenance.get("parts", [])),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": str(float(meta.rank)),
        "ss_base_model_version": found.kohya if found else family,
        "ss_sd_model_name": meta.base_model,
        "ss_output_name": title,
        "ss_training_comment": f"qrlora, method {meta.method}; other settings under qrlora.recipe",
    }
    notes |= {theirs: _text(meta.recipe[ours]) for ours, theirs in _RECIPE.items() if ours in meta.recipe}
    return {key: value for key, value in notes.items() if value}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
