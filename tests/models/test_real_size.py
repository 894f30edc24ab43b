"""A model of real size, by the commands that a user types: Stable Diffusion 1.5 with random weights, on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from qrlora.method.adapter import load_adapter
from real_size import build

RANK = "16"


COMMAND = """
import sys
from qrlora.apps.cli import main
status = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(status)
"""


def qrlora(folder: Path, *arguments: str) -> tuple[str, int]:
    """What a command prints, and the most memory that its process had, in bytes."""
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, int(done.stderr.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the memory of a process")
def test_stable_diffusion_1_5_from_plan_to_stock_load(tmp_path: Path) -> None:
    build("sd", tmp_path / "sd")
    for role in ("subject", "style"):
        Image.radial_gradient("L").resize((640, 560)).convert("RGB").save(tmp_path / f"{role}.png")
    fields = ["--model", "sd", "--rank", RANK, "--batch-size", "1", "--resolution", "512"]
    fields += ["--dtype", "bfloat16", "--gradient-checkpointing"]
    subject = ["--subject", "subject.png", "--steps", "2", *fields]
    style = ["--style", "style.png", "--steps", "1", *fields]

    assert "128 layers" in qrlora(tmp_path, "basis", "sd", "--rank", RANK, "--dtype", "bfloat16")[0]
    found = json.loads(qrlora(tmp_path, "plan", *subject, "--json")[0])
    planned = sum(found["estimates"]["qrlora"]["memory"].values()) + found["program_bytes"]
    _, peak = qrlora(tmp_path, "train", *subject, "-o", "subject.safetensors")
    assert peak == pytest.approx(planned, rel=0.2)
    qrlora(tmp_path, "train", *style, "-o", "style.safetensors")
    adapter = load_adapter(tmp_path / "subject.safetensors")
    assert found["estimates"]["qrlora"]["parameters"] == adapter.parameters().trained
    assert all(bool(delta.any()) and bool(delta.isfinite().all()) for delta in adapter.deltas.values())

    qrlora(tmp_path, "compose", "subject.safetensors", "style.safetensors", "-o", "both.safetensors")
    picture = ["--prompt", "a photo of a <c> dog", "--steps", "1", "--guidance", "1", "--resolution", "512"]
    qrlora(tmp_path, "generate", "--model", "sd", "--dtype", "bfloat16", "--adapter", "both.safetensors", *picture)
    qrlora(tmp_path, "export", "both.safetensors", "--model", "sd", "--for", "comfyui")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", dtype=torch.bfloat16)
    pipe.load_lora_weights(tmp_path / "both-kohya.safetensors")
    active = [name for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A") and module.lora_A]
    assert len(active) == len(adapter.deltas) == 128
    with torch.no_grad():
        noise = pipe.unet(torch.zeros(1, 4, 64, 64).bfloat16(), 500, torch.zeros(1, 77, 768).bfloat16()).sample
    assert bool(noise.isfinite().all())
    assert np.asarray(Image.open(next((tmp_path / "pictures").glob("*.png")))).ndim == 3
