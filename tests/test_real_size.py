"""A model of real size, by the commands that a user types: Stable Diffusion 1.5 with random weights, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from qrlora.adapter import load_adapter
from real_size import build

RANK = "16"


def qrlora(folder: Path, *arguments: str) -> tuple[str, int]:
    """What a command prints, and the most memory that its process had, in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qrlora.cli", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = process.stdout, process.stderr
    assert output and errors
    text, said, (_, status, usage) = output.read().decode(), errors.read().decode(), os.wait4(process.pid, 0)
    assert status == 0, said
    return text, usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.skipif(psutil.virtual_memory().total < 6 * 2**30, reason="takes 3 GB")
def test_stable_diffusion_1_5_from_plan_to_stock_load(tmp_path: Path) -> None:
    build("sd", tmp_path / "sd")
    for role in ("subject", "style"):
        Image.radial_gradient("L").resize((640, 560)).convert("RGB").save(tmp_path / f"{role}.png")
    fields = ["--model", "sd", "--rank", RANK, "--steps", "2", "--batch-size", "1", "--resolution", "512"]
    fields += ["--dtype", "bfloat16", "--gradient-checkpointing"]

    def of(role: str) -> list[str]:
        return ["--role", role, "--images", f"{role}.png", *fields]

    assert "128 layers" in qrlora(tmp_path, "basis", "sd", "--rank", RANK, "--dtype", "bfloat16")[0]
    found = json.loads(qrlora(tmp_path, "plan", *of("subject"), "--no-time", "--json")[0])
    planned = max(sum(found["estimates"]["qrlora"]["memory"].values()), found["loading_bytes"]) + found["program_bytes"]
    _, peak = qrlora(tmp_path, "train", *of("subject"), "-o", "subject.safetensors")
    assert peak == pytest.approx(planned, rel=0.2)
    qrlora(tmp_path, "train", *of("style"), "-o", "style.safetensors")
    adapter = load_adapter(tmp_path / "subject.safetensors")
    assert found["estimates"]["qrlora"]["parameters"] == adapter.parameters().trained
    assert all(bool(delta.any()) and bool(delta.isfinite().all()) for delta in adapter.deltas.values())

    qrlora(tmp_path, "compose", "subject.safetensors", "style.safetensors", "-o", "both.safetensors")
    picture = ["--prompt", "a photo of a <c> dog", "--steps", "1", "--guidance", "1", "--resolution", "512"]
    qrlora(tmp_path, "generate", "--model", "sd", "--dtype", "bfloat16", "--adapter", "both.safetensors", *picture)
    qrlora(tmp_path, "export", "both.safetensors", "--model", "sd", "--for", "comfyui")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", torch_dtype=torch.bfloat16)
    pipe.load_lora_weights(tmp_path / "both-kohya.safetensors")
    active = [name for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A") and module.lora_A]
    assert len(active) == len(adapter.deltas) == 128
    with torch.no_grad():
        noise = pipe.unet(torch.zeros(1, 4, 64, 64).bfloat16(), 500, torch.zeros(1, 77, 768).bfloat16()).sample
    assert bool(noise.isfinite().all())
    assert np.asarray(Image.open(next(tmp_path.glob("*.png")))).ndim == 3
